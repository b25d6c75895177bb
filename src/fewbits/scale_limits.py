"""Scales at the smallest normal number of what they are stored in: a finer one was asked for, and codes are coarser."""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.notes import Note

# By stored dtype: integers of its width, the bits of its smallest normal number, and that number as it is shown.
SMALLEST_NORMAL = {
    "BF16": (np.uint16, 0x0080, "1.2e-38 (bf16)"),
    "F16": (np.uint16, 0x0400, "6.1e-05 (fp16)"),
    "F32": (np.uint32, 0x00800000, "1.2e-38 (fp32)"),
}


def count_at_limit(scales: np.ndarray[Any, Any], dtype: str) -> int:
    """How many of the scales, stored in `dtype`, have the least magnitude that is allowed."""
    unsigned, bits, _ = SMALLEST_NORMAL[dtype]
    # Shifted, since a sign does not count.
    return int(np.count_nonzero(scales.view(unsigned) << unsigned(1) == unsigned(bits << 1)))


def note_at_limit(layer: str, count: int, total: int, dtype: str) -> Note:
    """What is to be said of a layer with such scales."""
    shown = SMALLEST_NORMAL[dtype][2]
    what = f"{count:,} of {total:,} scales held at {shown}"
    return Note(layer, what, "its weights are too small for scales of the checkpoint's dtype")
