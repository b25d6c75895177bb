"""A sample of the tokens that entered a linear: evenly chosen rows, for what no sum over all of them can tell.

What a token's largest channel is once channels are scaled is such a thing; a Gram does not know it.
"""

from __future__ import annotations

import torch

SAMPLED_TOKENS = 1024


class TokenSample:
    """Keeps every n-th row of what it is given, about SAMPLED_TOKENS of `tokens`.

    Args:
        tokens: how many rows will come at most.
    """

    def __init__(self, tokens: int) -> None:
        self._stride = max(1, tokens // SAMPLED_TOKENS)
        self._seen = 0
        self._kept: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor) -> None:
        """Look at rows [..., in]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        first = -self._seen % self._stride
        self._kept.append(rows[first :: self._stride].clone())
        self._seen += len(rows)

    @property
    def rows(self) -> torch.Tensor:
        """The rows kept so far, fp32 [n, in]."""
        return torch.cat(self._kept).float()
