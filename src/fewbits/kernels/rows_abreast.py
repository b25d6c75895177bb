"""Small 4-bit weights, for few tokens: a second copy of the codes, arranged so that each lane multiplies a row."""

from __future__ import annotations

import torch

from fewbits.kernels.few_tokens import BLOCK
from fewbits.kernels.spec import LinearSpec, LinearWeight, Run, not_compiled

# Larger weights come from memory as fast as it gives them in either arrangement, but for narrow ones, whose rows are
# too short to hide their ends; more tokens are faster in tiles. Measured in bench/linear.py.
MOST_WEIGHTS, NARROW, MOST_TOKENS = 2**20, 768, 8
# Sums of so many products of a code and a whole number fit 32 bits.
MOST_IN_GROUP = 2**12


class RowsAbreast:
    """int4 with groups, where products of bytes are the fastest: no row's sums have to be added up in the end."""

    name = "rows abreast"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := not_compiled(spec)) is not None:
            return reason
        scheme, size = spec.scheme, spec.scheme.group_size
        if scheme.kind != "int" or scheme.bits != 4 or scheme.activations is not None or size == 0:
            return "multiplies int4 with groups only, and unrounded activations"
        if "prefers_bytes" not in spec.machine.features:
            return "needs a processor whose products of bytes (AVX-512 VNNI) are faster than those of bf16"
        if size % BLOCK and size not in (8, 16, 32, 64):
            return f"groups of {size}: activations come in blocks of {BLOCK}, which must hold 1 to 16 groups or a part"
        if size > MOST_IN_GROUP:
            return f"sums of groups above {MOST_IN_GROUP} might not fit 32 bits"
        if spec.in_features > NARROW and spec.in_features * spec.out_features > MOST_WEIGHTS:
            most = f"2^{MOST_WEIGHTS.bit_length() - 1} weights of more than {NARROW} inputs"
            return f"no faster than decoding in registers above {most}, and keeps them twice"
        if spec.tokens > MOST_TOKENS:
            return f"slower than tiles above {MOST_TOKENS} tokens"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels import rows_abreast_run

        return rows_abreast_run.RowsAbreast(weight, bias)
