"""The head's product with both factors rounded to int8: logits near enough to draw labels from, in half the time.

Rows of the head are rounded as they come, each to 255 levels of its own, and hidden states token by token: nothing is
kept of either but while rows are multiplied. Whether predictions bear it is tried on some tokens (`is_close`).
"""

from __future__ import annotations

import torch

from fewbits.kernels.int8_run import ByteTiles
from fewbits.kernels.lanes import HAS_VNNI
from fewbits.kernels.matrix_rows_run import ByteRows
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS, LINE
from fewbits.kernels.spec import LinearWeight
from fewbits.kernels.tokens_run import int8_tokens
from fewbits.methods import Int8Symmetric

# Tokens that it is tried on, and the mean KL divergence of predictions that they bear. 0.007 was seen of two models.
TRIED = 16
MOST_KL = 0.05

_SCHEME = Int8Symmetric().scheme


def fits(weight: torch.Tensor) -> bool:
    """Whether this processor multiplies a head's rows as bytes sooner than in bf16."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % 4 == 0
    return is_plain and HAS_VNNI


class RoundedRows:
    """x · weightᵀ + bias [..., rows] of bf16 x [..., in] and weight [rows, in], both rounded to int8.

    weight is rounded once, for all x.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        codes, scales = int8_tokens(weight)
        rounded = LinearWeight((codes ^ 128).view(torch.int8), scales, None, (len(weight), weight.shape[1]), _SCHEME)
        made = ByteRows if HAS_MATRIX_UNITS and weight.shape[1] % LINE == 0 else ByteTiles
        self._products, self._rows = made(rounded, bias), len(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._products(x.flatten(0, -2)).view(*x.shape[:-1], self._rows)


def is_close(exact: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Whether predictions by these logits [tokens, vocabulary] are as good as the same."""
    wanted, found = exact.float().log_softmax(-1), rounded.float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).nansum(-1).mean()
    return bool(divergence <= MOST_KL)
