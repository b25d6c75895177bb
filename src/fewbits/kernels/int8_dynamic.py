"""W8A8: int8 weights times activations rounded to int8 per token, with exact int32 sums."""

from __future__ import annotations

import torch

from fewbits.kernels.activations import round_tokens
from fewbits.kernels.spec import LinearSpec, LinearWeight, Run, not_compiled
from fewbits.schemes import Scheme

# Above these many tokens, tiles or oneDNN's blocked products are faster: of small weights, and of larger ones.
MOST_TOKENS_SMALL, MOST_TOKENS, SMALL = 8, 2, 2**22
# Above so many weights, oneDNN's copy of them, laid out for the processor, comes from memory faster. All measured in
# bench/linear.py.
MOST_WEIGHTS = 2**22
# Inputs that matrix units take at once.
LINE = 64
# 127 · 127 · this many products stay below 2^24, where fp32 sums of integers are exact.
EXACT_IN_FP32 = 1024


def is_int8_dynamic(scheme: Scheme) -> bool:
    """Whether weights are int8 per channel and activations int8 per token."""
    return (
        scheme.kind == "int" and scheme.bits == 8 and scheme.symmetric and scheme.group_size == 0
        and scheme.activations is not None
    )  # fmt: skip


def other_scheme(spec: LinearSpec) -> str | None:
    """Why a kernel of this scheme cannot run `spec`; None if it is of this scheme."""
    return None if is_int8_dynamic(spec.scheme) else "multiplies int8 per channel with int8 per token only"


def _why_not_compiled(spec: LinearSpec) -> str | None:
    return other_scheme(spec) or not_compiled(spec)


class Int8FewTokens:
    """Compiled dot products over the codes as files hold them."""

    name = "int8 dot products"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := _why_not_compiled(spec)) is not None:
            return reason
        most = MOST_TOKENS_SMALL if spec.in_features * spec.out_features <= SMALL else MOST_TOKENS
        if spec.tokens > most:
            return f"slower than int8 tiles and oneDNN above {most} tokens"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.int8_run import FewTokensInt8

        return FewTokensInt8(weight, bias)


class Int8Rows:
    """Compiled products in matrix units: activations as they lie, and a second copy of the codes, arranged for it."""

    name = "int8 rows"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := _why_not_compiled(spec)) is not None:
            return reason
        if "matrix_units" not in spec.machine.features:
            return "needs a processor with matrix units (AMX)"
        if spec.in_features % LINE:
            return f"takes inputs by {LINE}, not {spec.in_features}"
        if spec.in_features * spec.out_features > MOST_WEIGHTS:
            return f"no faster than int8 tiles above 2^{MOST_WEIGHTS.bit_length() - 1} weights, and keeps them twice"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.matrix_rows_run import ByteRows

        return ByteRows(weight, bias)


class Int8Tiles:
    """Compiled products over the codes as files hold them, in tiles of sums that stay in registers."""

    name = "int8 tiles"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := _why_not_compiled(spec)) is not None:
            return reason
        if "byte_products" not in spec.machine.features:
            return "needs a processor with products of bytes (AVX-512 VNNI)"
        if spec.in_features % 4:
            return f"takes inputs by fours, not {spec.in_features}"
        in_matrices = "matrix_units" in spec.machine.features and spec.in_features % LINE == 0
        is_large = spec.in_features * spec.out_features > MOST_WEIGHTS
        if "exact_u8s8" in spec.machine.features and is_large and not in_matrices:
            return f"slower than oneDNN above 2^{MOST_WEIGHTS.bit_length() - 1} weights"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.int8_run import ByteTiles

        return ByteTiles(weight, bias)


class OneDnnInt8:
    """oneDNN's unsigned-by-signed GEMM on a weight that it lays out for this processor."""

    name = "oneDNN int8"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := _why_not_compiled(spec)) is not None:
            return reason
        if "exact_u8s8" not in spec.machine.features:
            return "int8 products saturate on this processor (no VNNI), or this PyTorch has no oneDNN"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.int8_run import OneDnnInt8Run

        return OneDnnInt8Run(weight, bias)


class FloatInt8:
    """The integers as fp32, in slices of inputs short enough for exact sums: any processor, any device."""

    name = "int8 as fp32"

    def why_not(self, spec: LinearSpec) -> str | None:
        return other_scheme(spec)

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        row_scales = weight.scales.to(torch.float32).view(1, -1)
        wide_bias = None if bias is None else bias.to(torch.float32)

        def run(x: torch.Tensor) -> torch.Tensor:
            codes, scales = round_tokens(x, "int")
            sums = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.int32, device=x.device)
            for start in range(0, weight.shape[1], EXACT_IN_FP32):
                run = slice(start, start + EXACT_IN_FP32)
                sums += (codes[:, run] @ weight.codes[:, run].to(torch.float32).t()).to(torch.int32)
            y = sums.to(torch.float32) * scales * row_scales
            return (y if wide_bias is None else y + wide_bias).to(x.dtype)

        return run
