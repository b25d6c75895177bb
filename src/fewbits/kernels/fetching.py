"""Rows of weights on their way from memory: how far ahead kernels for few tokens ask for them.

Processors look ahead in a stream of memory, but not beyond a page, and only once they have seen it begin. So kernels
ask for what is some thousand bytes ahead, and for as much at once where a piece of the rows begins.
"""

from __future__ import annotations

from typing import Any

from fewbits.kernels.compiling import inlined
from fewbits.kernels.lanes import HAS_AMX, fetch

LINE = 64
# Some rows of a small layer are multiplied before memory answers; measured on 576 inputs, and on 4096 and 14336.
AHEAD_BYTES, AHEAD_BYTES_OF_LONG = 2**13, 2**14
# Zen 5 drops what it is asked for while it waits for much already, and has to be asked again nearer. Processors with
# matrix units don't: asked once, half as far ahead, Emerald Rapids reads int4 of large layers 1.1 times as fast.
ASKS_TWICE = not HAS_AMX


def bytes_ahead(row_bytes: int, rows: int) -> int:
    """A multiple of so many rows, no less than AHEAD_BYTES."""
    together = rows * row_bytes
    return together * -(-AHEAD_BYTES // together)


@inlined
def fetch_lines(start: Any, stop: Any) -> None:
    """Ask for all that lies between two addresses."""
    for address in range(start, stop, LINE):
        fetch(address)
