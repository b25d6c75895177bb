"""How far one model's next-token distribution is from another's, per position.

KL(P ‖ Q) = Σ_v P(v) (log P(v) − log Q(v)), in nats; Kullback and Leibler 1951.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Logits of one model compared at a time: few enough for a cache.
PART_BYTES = 8 * 2**20


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
    rows = max(1, PART_BYTES // (4 * reference.shape[-1]))
    parts = zip(*(torch.split(whole, rows) for whole in (reference, candidate, following)), strict=True)
    figures = (torch.cat(column) for column in zip(*(_compared(*part) for part in parts), strict=True))
    return TokenDivergence(*figures)


def _compared(
    reference: torch.Tensor, candidate: torch.Tensor, following: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The figures of `TokenDivergence`, in its order."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(candidate.float(), -1)
    index = following[:, None]
    return (
        -log_p.gather(1, index)[:, 0].double(),
        -log_q.gather(1, index)[:, 0].double(),
        (log_p.exp() * (log_p - log_q)).sum(-1).double(),
        (log_p.argmax(-1) == log_q.argmax(-1)).double(),
    )
