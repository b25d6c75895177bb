"""Weights decoded into the cache and multiplied there by many tokens, in tiles of sums that stay in registers."""

from __future__ import annotations

import torch

from fewbits.kernels.spec import LinearSpec, LinearWeight, Run, not_compiled

# Codes that are decoded together.
VECTOR = 32


class Tiles:
    """Any scheme but W8A8: blocks of rows and inputs to bf16, then products of bf16 pairs summed in registers."""

    name = "tiles"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := not_compiled(spec)) is not None:
            return reason
        if spec.scheme.kind == "int" and spec.scheme.activations is not None:
            return "leaves activations unrounded"
        if spec.dtype != torch.bfloat16:
            return "multiplies bf16 activations"
        if "bf16_products" not in spec.machine.features:
            return "needs a processor with bf16 products (AVX-512 BF16)"
        size = spec.scheme.group_size or spec.in_features
        if size % VECTOR:
            return f"groups of {size}: decodes {VECTOR} codes of a group at once"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.token_tiles_run import TokenTiles

        return TokenTiles(weight, bias)
