"""The Triton kernel behind `triton_int4`: y = x Ŵᵀ + b, a tile of tokens times a tile of outputs to a program.

Codes are the words that files hold: code k of a row is field k mod 8 of word k div 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewbits.kernels.spec import LinearWeight

OUTPUTS, INPUTS = 64, 64
# Tokens of a tile: the matrix units' least for few tokens, more where there are more.
FEW, MANY = 16, 64


# Triton reads what arguments are annotated with as part of the kernel, and knows no types but its own.
@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    x_at, codes_at, scales_at, zeros_at, bias_at, y_at, tokens, outputs, inputs, words, groups, group_size,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    row, token = n[:, None].to(tl.int64), m[:, None].to(tl.int64)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, inputs, K):
        k = start + tl.arange(0, K)
        inside = (n[:, None] < outputs) & (k[None, :] < inputs)
        x = tl.load(x_at + token * inputs + k[None, :], (m[:, None] < tokens) & (k[None, :] < inputs), 0.0)
        word = tl.load(codes_at + row * words + k[None, :] // 8, inside, 0)
        code = (word >> (k[None, :] % 8 * 4)) & 15
        at = row * groups + k[None, :] // group_size
        scale = tl.load(scales_at + at, inside, 0.0).to(tl.float32)
        zero = tl.load(zeros_at + at, inside, 0).to(tl.int32) if HAS_ZEROS else 8
        weight = ((code - zero).to(tl.float32) * scale).to(x.dtype)
        sums += tl.dot(x, tl.trans(weight), input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_at + n, n < outputs, 0.0).to(tl.float32)[None, :]
    at = token * outputs + n[None, :]
    tl.store(y_at + at, sums.to(y_at.dtype.element_ty), (m[:, None] < tokens) & (n[None, :] < outputs))


class TritonInt4Run:
    """y = x Ŵᵀ + b on a GPU, or in Triton's interpreter."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        self._codes, self._scales = weight.codes.contiguous(), weight.scales.contiguous()
        self._zeros = None if weight.zero_points is None else weight.zero_points.contiguous()
        self._bias = bias
        self._out, self._in = weight.shape
        self._groups = weight.scheme.groups(self._in)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        y = torch.empty((tokens, self._out), dtype=x.dtype, device=x.device)
        if tokens == 0:
            return y
        tile = FEW if tokens <= FEW else MANY
        # Pointers that are not read still need a tensor.
        zeros = self._codes if self._zeros is None else self._zeros
        bias = self._scales if self._bias is None else self._bias
        _tile[(triton.cdiv(tokens, tile), triton.cdiv(self._out, OUTPUTS))](
            x.contiguous(), self._codes, self._scales, zeros, bias, y,
            tokens, self._out, self._in, self._codes.shape[1], self._groups, self._in // self._groups,
            HAS_ZEROS=self._zeros is not None, HAS_BIAS=self._bias is not None, M=tile, N=OUTPUTS, K=INPUTS,
        )  # fmt: skip
        return y
