"""Compiled rearrangement of a bf16 matrix [in, out], outputs as columns, for kernels.matrix_rows: pairs of inputs of 32
outputs beside each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import CODES, I64, Bf16Lanes, indices, load
from fewbits.kernels.memory import copy_bytes, pointer_to
from fewbits.kernels.team import OWN, WORDS, compiled_work

# The fields of a block; a row is up to RUN pairs of rows of 32 columns. X_AT: rows of COLUMNS numbers, two a pair.
X_AT, COLUMNS, PAIRS, OUT_AT = range(OWN, OWN + 4)
RUN = 64


@intrinsic  # type: ignore[untyped-decorator]
def _interleave(typing_context: Any, first: Any, second: Any, target: Any) -> Any:
    """32 numbers at an address, each with one of 32 at another, as words at a third."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *sources, target = arguments
        rows = [load(builder, source, Bf16Lanes.vector) for source in sources]
        for half in range(2):
            places = (
                place + other for place in range(half * CODES // 2, (half + 1) * CODES // 2) for other in (0, CODES)
            )
            words = builder.shuffle_vector(*rows, indices(places))
            at = builder.add(target, ir.Constant(I64, 2 * CODES * half))
            builder.store(words, builder.inttoptr(at, words.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@inner
def _work_on(fields: Any, start: Any, stop: Any, room: Any) -> None:
    columns, pairs = fields[COLUMNS], fields[PAIRS]
    runs = (pairs + RUN - 1) // RUN
    room[:] = np.uint8(0)
    second = room.ctypes.data + 2 * CODES
    for number in range(start, stop):
        tile, begin = number // runs, number % runs * RUN
        there = min(CODES, columns - tile * CODES)
        for pair in range(begin, min(begin + RUN, pairs)):
            source = fields[X_AT] + 2 * (2 * pair * columns + tile * CODES)
            target = fields[OUT_AT] + 4 * CODES * (tile * pairs + pair)
            if there == CODES:
                _interleave(source, source + 2 * columns, target)
                continue
            copy_bytes(room.ctypes.data, source, 2 * there)
            copy_bytes(second, source + 2 * columns, 2 * there)
            _interleave(room.ctypes.data, second, target)


def _work(address: Any, start: Any, stop: Any) -> None:
    """[inputs, outputs] to [tiles, pairs of inputs, 32 outputs]; zeros for outputs that are not there."""
    _work_on(carray(pointer_to(address), (WORDS,), np.int64), start, stop, np.empty(4 * CODES, np.uint8))


def runs_of(columns: int, pairs: int) -> int:
    """Rows of the step."""
    return -(-columns // CODES) * -(-pairs // RUN)


@cache
def column_pairs() -> Any:
    """The compiled work."""
    return compiled_work(_work)
