"""The outputs of products of rows (kernels.matrix_rows): sums [tokens, 32] scaled and rounded to some dtype.

y = sum · scale of the token · scale of the output + bias, in fp32 and in that order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import F32, HAS_BF16, I64, LANES, IntSums, Sums, load, repeat, rounded, spread
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32
from fewbits.kernels.tile_outputs import ROUNDED

# Outputs beside each other, and vectors of them.
OUTPUTS = 32
_HALVES = range(OUTPUTS // LANES)


class RowWriter:
    """Writes rows of sums of 32 outputs in some dtype; what the outputs need is loaded where it is made.

    Args:
        of_bytes: whether sums are int32 and begin with `begins`. scales: the address of the outputs' scales, None for
            none. biases, begins: addresses of fp32 and int32 numbers of the outputs.
    """

    def __init__(self, builder: Any, kind: int, of_bytes: bool, scales: Any | None, biases: Any, begins: Any) -> None:
        self._builder, self._kind, self._of_bytes = builder, kind, of_bytes
        self._bias = self._vectors(biases)
        self._by_output = None if scales is None else self._vectors(scales)
        self._starts = self._vectors(begins, IntSums.vector) if of_bytes else []

    def _vectors(self, address: Any, vector: ir.VectorType = Sums.vector) -> list[Any]:
        shifts = [ir.Constant(I64, 4 * LANES * half) for half in _HALVES]
        return [load(self._builder, self._builder.add(address, shift), vector) for shift in shifts]

    def write(self, sums: Any, token_scale: Any, place: Any) -> None:
        """Outputs of the sums at an address to another; the token's scale is at a third."""
        builder = self._builder
        values = self._vectors(sums, IntSums.vector if self._of_bytes else Sums.vector)
        if self._of_bytes:
            totals = [builder.add(value, start) for value, start in zip(values, self._starts, strict=True)]
            values = [builder.sitofp(total, Sums.vector) for total in totals]
        if self._by_output is not None:
            of_token = spread(builder, load(builder, token_scale, F32))
            scaled = [builder.fmul(value, of_token) for value in values]
            values = [builder.fmul(value, scale) for value, scale in zip(scaled, self._by_output, strict=True)]
        values = [builder.fadd(value, added) for value, added in zip(values, self._bias, strict=True)]
        if self._kind == BFLOAT16 and HAS_BF16:
            stored = [rounded(builder, values)]
        else:
            stored = [ROUNDED[self._kind](builder, value) for value in values]
        bits = OUTPUTS // len(stored) * (4 if self._kind == FLOAT32 else 2)
        for number, part in enumerate(stored):
            at = builder.add(place, ir.Constant(I64, number * bits))
            builder.store(part, builder.inttoptr(at, part.type.as_pointer()), align=1)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _finish(
    typing_context: Any, tile: Any, kind: Any, scaled: Any, sums: Any, scales: Any, biases: Any, begins: Any,
    token_scales: Any, out: Any, stride: Any, rows: Any,
) -> Any:  # fmt: skip
    if not isinstance(kind, types.Literal) or not isinstance(scaled, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of_bytes, kind = signature.args[0].of_bytes, signature.args[1].literal_value
        sums, scales, biases, begins, token_scales, out, stride, rows = arguments[3:]
        has_scales = of_bytes or bool(signature.args[2].literal_value)
        writer = RowWriter(builder, kind, of_bytes, scales if has_scales else None, biases, begins)

        def body(row: Any, carried: list[Any]) -> list[Any]:
            writer.write(
                builder.add(sums, builder.mul(row, ir.Constant(I64, 4 * OUTPUTS))),
                builder.add(token_scales, builder.mul(row, ir.Constant(I64, 4))),
                builder.add(out, builder.mul(row, stride)),
            )
            return []

        repeat(builder, rows, [], body)
        return context.get_dummy_value()

    return types.none(tile, kind, scaled, *[types.int64] * 8), generate


@inner
def finish_rows(
    tile: Any, kind: Any, scaled: Any, sums: Any, scales: Any, biases: Any, begins: Any, token_scales: Any, out: Any,
    stride: Any, rows: Any,
) -> None:  # fmt: skip
    """Sums of `rows` tokens, at least one, at an address, to outputs at another, `stride` bytes from token to token.

    Args:
        tile: of bytes if sums are int32; these always have scales. scaled: whether fp32 sums have, of bf16 outputs.
        scales, biases: addresses of fp32 numbers of the outputs. begins: that of int32 ones, which sums of bytes are
            too small by. token_scales: that of fp32 ones of the tokens.
    """
    if kind == BFLOAT16 and scaled:
        _finish(tile, BFLOAT16, 1, sums, scales, biases, begins, token_scales, out, stride, rows)
    elif kind == BFLOAT16:
        _finish(tile, BFLOAT16, 0, sums, scales, biases, begins, token_scales, out, stride, rows)
    elif kind == FLOAT16:
        _finish(tile, FLOAT16, 0, sums, scales, biases, begins, token_scales, out, stride, rows)
    else:
        _finish(tile, FLOAT32, 0, sums, scales, biases, begins, token_scales, out, stride, rows)
