"""Small weights decoded for matrix units, and multiplied there by many tokens as they lie."""

from __future__ import annotations

import torch

from fewbits.kernels.spec import LinearSpec, LinearWeight, Run
from fewbits.kernels.tiles import Tiles

# Fewer tokens are no faster than in tiles, nor are larger weights, of which decoding takes longer than tiles' outputs,
# that come turned. Measured in bench/linear.py.
LEAST_TOKENS, MOST_WEIGHTS = 256, 2**19


class DecodedRows:
    """What tiles take: the whole weight to bf16, arranged by outputs, then products of bf16 pairs in matrix units."""

    name = "decoded rows"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := Tiles().why_not(spec)) is not None:
            return reason
        if "matrix_units" not in spec.machine.features:
            return "needs a processor with matrix units (AMX)"
        if spec.in_features * spec.out_features > MOST_WEIGHTS:
            return f"no faster than tiles above 2^{MOST_WEIGHTS.bit_length() - 1} weights"
        if spec.tokens < LEAST_TOKENS:
            return f"slower than tiles below {LEAST_TOKENS} tokens"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels import decoded_rows_run

        return decoded_rows_run.DecodedRows(weight, bias)
