"""How far one model's next-token distribution is from another's, per position.

KL(P ‖ Q) = Σ_v P(v) (log P(v) − log Q(v)), in nats; Kullback and Leibler 1951.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenDivergence:
    """Per-position figures of one window, each fp64 [positions].

    nll_reference, nll: −log probability of the token that followed. kl: KL(reference ‖ candidate).
    agrees: 1.0 where both put the same token first.
    """

    nll_reference: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor


def token_divergence(reference: torch.Tensor, candidate: torch.Tensor, following: torch.Tensor) -> TokenDivergence:
    """Compare two models' logits on one window.

    Args:
        reference, candidate: logits [positions, vocabulary], any float dtype; computed in fp32.
        following: int64 [positions], the token that followed each position.
    """
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(candidate.float(), -1)
    index = following[:, None]
    return TokenDivergence(
        nll_reference=-log_p.gather(1, index)[:, 0].double(),
        nll=-log_q.gather(1, index)[:, 0].double(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).double(),
        agrees=(log_p.argmax(-1) == log_q.argmax(-1)).double(),
    )
