"""Weights decoded in registers, for few tokens: the codes are read from memory once, as files hold them."""

from __future__ import annotations

import torch

from fewbits.kernels.spec import LinearSpec, LinearWeight, Run, not_compiled
from fewbits.kernels.tiles import Tiles

# Above these, tiles are faster, or panels where tiles can't run; measured in bench/linear.py.
MOST_BESIDE_TILES, MOST_BESIDE_PANELS = 4, 16
# Inputs whose codes are decoded together.
BLOCK = 128


class FewTokens:
    """Any scheme but W8A8: every row is decoded to bf16 in registers and multiplied with up to four tokens at once."""

    name = "decode in registers"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := not_compiled(spec)) is not None:
            return reason
        if spec.scheme.kind == "int" and spec.scheme.activations is not None:
            return "leaves activations unrounded"
        size = spec.scheme.group_size
        if size % BLOCK and size not in (8, 16, 32, 64):
            return f"groups of {size}: decodes in blocks of {BLOCK}, which must hold 1, 2, 4, 8 or 16 groups or a part"
        beside_tiles = Tiles().why_not(spec) is None
        most, faster = (MOST_BESIDE_TILES, "tiles") if beside_tiles else (MOST_BESIDE_PANELS, "panels")
        if spec.tokens > most:
            return f"slower than {faster} above {most} tokens"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.few_tokens_run import few_tokens

        return few_tokens(weight, bias)
