"""Token weights: how much each token counts in a Gram, from the importance of its consumers, tamed.

Importance is heavy-tailed: on Gemma 3 a few hundred tokens out of 32,768 would carry half of H, which then overfits to
them. Weights are therefore capped until the effective number of tokens, (Σw)² / Σw², is twice the width of H.
Measured on two models in docs/methods/gptq.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

EFFECTIVE_TOKENS_PER_CHANNEL = 2.0
# Halvings of the interval in which the cap is sought: enough to fix fp32's mantissa.
BISECTIONS = 40


def effective_tokens(weights: torch.Tensor) -> float:
    """(Σw)² / Σw²: how many equal weights would spread as thinly."""
    wide = weights.double()
    squares = wide.square().sum().item()
    return wide.sum().item() ** 2 / squares if squares else 0.0


def shared_weights(consumers: Sequence[torch.Tensor], width: int) -> torch.Tensor | None:
    """One weight a token for the Gram that several linears share: the mean of theirs, capped, of mean 1.

    Args:
        consumers: importance of every token to each linear, fp32 [tokens].
        width: channels of the Gram.

    Returns:
        fp32 [tokens], or None where no token has any importance, or there are too few to weigh any differently.
    """
    seen = [weights / weights.mean() for weights in consumers if bool((weights > 0).any())]
    if not seen:
        return None
    mean = torch.stack(seen).mean(0)
    wanted = EFFECTIVE_TOKENS_PER_CHANNEL * width
    if wanted >= mean.numel():
        return None
    return capped(mean, wanted)


def capped(weights: torch.Tensor, wanted: float) -> torch.Tensor:
    """Weights no larger than the largest cap that leaves `wanted` effective tokens, scaled to mean 1."""
    if effective_tokens(weights) < wanted:
        low, high = 0.0, weights.max().item()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if effective_tokens(weights.clamp_max(middle)) > wanted:
                low = middle
            else:
                high = middle
        if low > 0:
            weights = weights.clamp_max(low)
    return weights / weights.mean()
