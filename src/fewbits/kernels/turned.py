"""16 vectors of 16 numbers turned in registers: rows to columns."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inlined
from fewbits.kernels.lanes import I64, LANES, IntSums, indices, load


def turned(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 rows: numbers 8, 4, 2 and 1 off the diagonal change places, block by block.

    Of 8 rows, the columns of either half: column 8 + k behind column k.
    """
    rows = list(rows)
    for distance in (8, 4, 2, 1):
        if distance >= len(rows):
            continue
        back = indices(LANES + place - distance if place & distance else place for place in range(LANES))
        forth = indices(LANES + place if place & distance else place + distance for place in range(LANES))
        for row in range(len(rows)):
            if not row & distance:
                pair = rows[row], rows[row + distance]
                rows[row] = builder.shuffle_vector(*pair, back)
                rows[row + distance] = builder.shuffle_vector(*pair, forth)
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def turn_words(typing_context: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """16 rows of 16 words at an address, some bytes apart, to 16 columns at another, some bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, target, target_stride = arguments
        places = [ir.Constant(I64, row) for row in range(LANES)]
        rows = [load(builder, builder.add(source, builder.mul(stride, place)), IntSums.vector) for place in places]
        for place, column in zip(places, turned(builder, rows), strict=True):
            at = builder.add(target, builder.mul(target_stride, place))
            builder.store(column, builder.inttoptr(at, IntSums.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


@inlined
def turn_rows(rows: Any, stride: Any, columns: Any, column_stride: Any, height: Any, count: Any) -> None:
    """Rows of `count` words at an address to columns of `height` at another; multiples of 16, strides in bytes."""
    for j in range(0, count, LANES):
        for i in range(0, height, LANES):
            turn_words(rows + i * stride + 4 * j, stride, columns + j * column_stride + 4 * i, column_stride)
