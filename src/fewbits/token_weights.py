"""Token weights: how much each token counts in a Gram, from the importance of its consumers, tamed.

Importance is heavy-tailed: on Gemma 3 a few hundred tokens out of 32,768 would carry half of H, which then overfits to
them. Its square root keeps the order and a third to four fifths of all tokens in play. Measured against caps and other
powers on two models in docs/methods/gptq.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shared_weights(consumers: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One weight a token for the Gram that several linears share: the root of the mean of theirs, of mean 1.

    Args:
        consumers: importance of every token to each linear, fp32 [tokens]; each counts alike, whatever its scale.

    Returns:
        fp32 [tokens], or None where no token has any importance.
    """
    seen = [weights / weights.mean() for weights in consumers if bool((weights > 0).any())]
    if not seen:
        return None
    roots = torch.stack(seen).mean(0).sqrt()
    return roots / roots.mean()
