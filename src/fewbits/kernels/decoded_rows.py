"""Small weights decoded for matrix units, and multiplied there by many tokens as they lie."""

from __future__ import annotations

import torch

from fewbits.kernels.spec import LinearSpec, LinearWeight, Run
from fewbits.kernels.tiles import Tiles

# Fewer tokens are no faster than in tiles, of larger weights many more, of which decoding takes longer than tiles'
# outputs, that come turned. Measured in bench/linear.py.
LEAST_TOKENS, SMALL, LEAST_TOKENS_OF_LARGER, MOST_WEIGHTS = 256, 2**19, 1024, 2**20


class DecodedRows:
    """What tiles take: the whole weight to bf16, arranged by outputs, then products of bf16 pairs in matrix units."""

    name = "decoded rows"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := Tiles().why_not(spec)) is not None:
            return reason
        if "matrix_units" not in spec.machine.features:
            return "needs a processor with matrix units (AMX)"
        weights = spec.in_features * spec.out_features
        if weights > MOST_WEIGHTS:
            return f"no faster than tiles above 2^{MOST_WEIGHTS.bit_length() - 1} weights"
        least = LEAST_TOKENS if weights <= SMALL else LEAST_TOKENS_OF_LARGER
        if spec.tokens < least:
            return f"slower than tiles below {least} tokens"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels import decoded_rows_run

        return decoded_rows_run.DecodedRows(weight, bias)
