"""Fold records: what a fold divided and multiplied, with its scales, as the manifest keeps them.

Without them nothing could say whether a rescaled tensor still stands for the source's: a norm's could be computed from
both files, those that codes took up could not.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewbits.errors import CheckpointError

FP32_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class FoldRecord:
    """One fold as it was used.

    divided: by the name of a source tensor, what each of its rows (its columns if `transposed`) was divided by, fp32.
    multiplied: source tensors whose columns were multiplied by `inputs`, fp32 [in].
    norm_offset: a norm was divided as w + offset; None for a linear.
    """

    divided: Mapping[str, torch.Tensor]
    multiplied: tuple[str, ...]
    inputs: torch.Tensor
    norm_offset: float | None
    transposed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As stored: scales as base64 of little-endian fp32."""
        return {
            "tensors": list(self.divided),
            "layers": list(self.multiplied),
            "norm_offset": self.norm_offset,
            "transposed": self.transposed,
            "divided_by": [_text(scales) for scales in self.divided.values()],
            # Rows lead to channels one by one, as a rule.
            "multiplied_by": None if self._same_as_rows else _text(self.inputs),
        }

    @property
    def _same_as_rows(self) -> bool:
        return torch.equal(next(iter(self.divided.values())), self.inputs)

    @classmethod
    def from_dict(cls, content: object) -> FoldRecord:
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: `content` is anything else.
        """
        if not isinstance(content, dict):
            raise CheckpointError(f"a fold is {content!r:.80}; expected an object.")
        tensors, layers = (_names(content, key) for key in ("tensors", "layers"))
        offset, by_rows = content.get("norm_offset"), content.get("divided_by")
        if not isinstance(by_rows, list) or len(by_rows) != len(tensors) or not tensors:
            raise CheckpointError(f"a fold's `divided_by` is {by_rows!r:.80}; expected scales for each of `tensors`.")
        if not (offset is None or isinstance(offset, int | float)):
            raise CheckpointError(f"a fold's `norm_offset` is {offset!r:.80}; expected a number or null.")
        divided = dict(zip(tensors, map(_scales, by_rows), strict=True))
        by_inputs = content.get("multiplied_by")
        inputs = next(iter(divided.values())) if by_inputs is None else _scales(by_inputs)
        return cls(divided, layers, inputs, offset, bool(content.get("transposed", False)))


def unscaled(weight: torch.Tensor, tensor: str, folds: Iterable[FoldRecord], start: int = 0) -> torch.Tensor:
    """What a stored weight stands for in the source: rows multiplied back, then columns divided.

    Args:
        weight: decoded rows from `start` on, fp32 [rows, in]. tensor: its name in the source.
    """
    for fold in folds:
        if tensor in fold.divided:
            weight = weight * fold.divided[tensor][start : start + len(weight), None]
    for fold in folds:
        if tensor in fold.multiplied:
            weight = weight / fold.inputs
    return weight


def misfit(tensor: str, shape: Sequence[int], folds: Iterable[FoldRecord]) -> str | None:
    """Why the scales recorded for a tensor cannot be its own; None if their lengths are those of its shape."""
    for fold in folds:
        for scales, axis in (
            (fold.divided.get(tensor), -1 if fold.transposed else 0),
            (fold.inputs if tensor in fold.multiplied else None, -1),
        ):
            if scales is not None and len(scales) != shape[axis]:
                return f"{len(scales)} scales of a fold for shape {list(shape)}"
    return None


def differing(original: torch.Tensor, stored: torch.Tensor, tensor: str, folds: Iterable[FoldRecord]) -> torch.Tensor:
    """Where an unquantized tensor is not what dividing the source's left, bool of its shape."""
    dividing = [fold for fold in folds if tensor in fold.divided]
    wrong = torch.zeros(original.shape, dtype=torch.bool) if dividing else stored != original
    for fold in dividing:
        scales = fold.divided[tensor]
        if fold.norm_offset is not None and original.dim() == 1 and tensor == next(iter(fold.divided)):
            # The scale is the quotient of what multiplied before and after, so their product is off by fp32 at most.
            before, after = (values.float() + fold.norm_offset for values in (original, stored))
            within = (after * scales - before).abs() <= FP32_TOLERANCE * before.abs()
        else:
            divided = original.float() / (scales if fold.transposed or original.dim() == 1 else scales[:, None])
            within = divided.to(original.dtype) == stored
        wrong |= ~within
    return wrong


def _names(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"a fold's `{key}` is {names!r:.80}; expected names of tensors.")
    return tuple(names)


def _text(scales: torch.Tensor) -> str:
    return base64.b64encode(scales.to(torch.float32).numpy().astype("<f4").tobytes()).decode("ascii")


def _scales(text: object) -> torch.Tensor:
    try:
        stored = np.frombuffer(base64.b64decode(text if isinstance(text, str) else "?", validate=True), "<f4")
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"a fold's scales are {text!r:.40}; expected base64 of fp32 numbers.") from error
    scales = torch.from_numpy(stored.astype(np.float32))
    if not len(scales) or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise CheckpointError(f"a fold's scales are {text!r:.40}; expected positive, finite fp32 numbers.")
    return scales
