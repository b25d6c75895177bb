"""Compiled work on the threads that torch has already.

A second pool beside torch's would find its processors taken: OpenMP's threads spin for milliseconds after each of
torch's own operations. So work is handed to the OpenMP library that torch carries; where it carries none, to plain
threads. Work is one C function that takes the address of a block of integers and, again and again, the next piece
of what is to be done (`next_piece`); any number of threads may run it at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.threads import on_threads

# A block's first fields: how far the work has been handed out, how many rows it has, and how many make a piece.
TAKEN, ROWS, PIECE = 0, 1, 2
# Pieces per thread: enough to even out what other processes take.
PIECES = 8
# OpenMP's threads wake in the time of this many products.
ALONE = 2**16


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, for all threads at once; returns what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the library that torch carries, or None."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        parallel = ctypes.CDLL(str(file)).GOMP_parallel
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return parallel
    return None


class Work:
    """A compiled C function, and those fields of its block that stay from call to call."""

    def __init__(self, compiled: Any, fields: int, fixed: Mapping[int, int]) -> None:
        self._compiled = compiled
        self._address = compiled.address
        self._block = ctypes.c_int64 * fields
        self._fixed = self._block(*(fixed.get(field, 0) for field in range(fields)))
        self._parallel = _openmp()

    def run(self, rows: int, multiple: int, threads: int, fields: Mapping[int, int]) -> None:
        """Work through all rows, in pieces that are multiples of `multiple`; returns when all threads are done."""
        # A block of its own for each call: several threads may call the same layer.
        block = self._block.from_buffer_copy(self._fixed)
        for field, value in fields.items():
            block[field] = value
        block[ROWS] = rows
        block[PIECE] = max(1, -(-rows // (threads * PIECES * multiple))) * multiple
        address = ctypes.addressof(block)
        if threads == 1:
            self._compiled.ctypes(address)
        elif self._parallel is not None:
            self._parallel(self._address, address, threads, 0)
        else:
            on_threads(lambda: self._compiled.ctypes(address), threads)


def team_size(products: int) -> int:
    """Threads worth waking for this many products."""
    return torch.get_num_threads() if products > ALONE else 1
