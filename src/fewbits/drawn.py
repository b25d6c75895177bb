"""Labels drawn from a model's predictions while its logits come in tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fewbits.kernels.compiling import as_numpy
from fewbits.kernels.drawn_labels import draw_labels
from fewbits.kernels.lanes import HAS_BF16

# Of a token. A power of two and one, so that the shares of all labels are numbers of bf16 and add up to 0.
LABELS = 17
# Numbers that Philox makes at a time.
AT_A_TIME = 4


@dataclass
class Drawn:
    """Labels of some tokens, drawn from the logits seen so far.

    largest, totals: fp32 and fp64 [tokens]: the largest logit, and the sum of e^(logit − largest). labels, numbers:
    int64 and fp32 [tokens, LABELS]: the labels and their logits.
    """

    largest: torch.Tensor
    totals: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, tokens: int, device: torch.device) -> Drawn:
        """Of tokens of which no logit was seen."""
        return cls(
            torch.full((tokens,), -math.inf, device=device),
            torch.zeros(tokens, dtype=torch.float64, device=device),
            torch.zeros(tokens, LABELS, dtype=torch.int64, device=device),
            torch.zeros(tokens, LABELS, device=device),
        )

    def see(self, logits: torch.Tensor, first: int, uniforms: torch.Tensor, tokens: slice = slice(None)) -> None:
        """Let logits [tokens, columns], which begin at column `first`, take part in the draw.

        Args:
            uniforms: fp64 [tokens, LABELS], in [0, 1), for these columns alone. tokens: which of all they are of.
        """
        largest, totals, labels, numbers = (
            state[tokens] for state in (self.largest, self.totals, self.labels, self.numbers)
        )
        if HAS_BF16 and logits.dtype == torch.bfloat16 and logits.device.type == "cpu":
            state = (largest.numpy(), totals.numpy(), labels.numpy(), numbers.numpy())
            return draw_labels(as_numpy(logits), uniforms.numpy(), first, *state)
        logits = logits.float()
        highest = torch.maximum(largest, logits.amax(-1))
        base = highest.masked_fill(highest == -math.inf, 0.0)
        cumulated = (logits - base[:, None]).exp().cumsum(-1, dtype=torch.float64)
        added = cumulated[:, -1:]
        totals.mul_((largest - base).exp().double()).add_(added[:, 0])
        largest.copy_(highest)
        target = uniforms.to(logits.device) * totals[:, None]
        places = torch.searchsorted(cumulated, target, right=True).clamp_max_(logits.shape[-1] - 1)
        anew = target < added
        labels.copy_(torch.where(anew, places + first, labels))
        numbers.copy_(torch.where(anew, logits.gather(-1, places), numbers))

    @property
    def loss(self) -> float:
        """Sum over tokens of the mean negative log-probability of a token's labels; NaN if a logit was no number."""
        normalized = self.largest.double() + self.totals.log()
        return float((normalized - self.numbers.double().mean(-1)).sum())


def uniforms(seed: int, first_token: int, tokens: int, column: int) -> torch.Tensor:
    """Numbers in [0, 1) for every label of some tokens, at the tile that begins at a column: fp64 [tokens, LABELS].

    Each depends on its seed, token, label and column alone (Philox, Salmon et al. 2011).
    """
    steps = -(-LABELS // AT_A_TIME)
    numbers = np.random.Philox(key=np.array([seed % 2**64, column], np.uint64), counter=first_token * steps)
    drawn = np.random.Generator(numbers).random((tokens, steps * AT_A_TIME))
    return torch.from_numpy(drawn)[:, :LABELS].contiguous()
