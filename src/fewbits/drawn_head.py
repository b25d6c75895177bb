"""The loss's gradient in front of the head, for labels drawn from the model's own predictions.

With labels y₀ … y₁₆ drawn from a token's predictions p, the gradient of √(16/17) (mean of z_y₁ … z_y₁₆ − z_y₀) by the
logits z has mean 0 and covariance diag(p) − ppᵀ, as that of one label's negative log-probability, p − e_y, has. So it
estimates the same Fisher information, and differs from zero in 17 logits: nothing of the vocabulary's size is kept, or
multiplied on the way back, and on the way forward a tile of logits is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from fewbits.drawn import LABELS, Drawn, uniforms
from fewbits.errors import CalibrationError
from fewbits.matrix_products import KeptWeight, linear
from fewbits.pass_memory import LOGITS
from fewbits.rounded_head import TRIED, RoundedRows, fits, is_close
from fewbits.skeleton import Skeleton

# Logits of a token in a tile: as a power of two, rows of logits would fall on the same lines of a cache. And tokens
# whose logits are there at once, and stay near the processor until they were looked at.
TILE, TOKENS = 4032, 1024
# Tokens whose labels' rows of the head are gathered at a time.
GATHERED = 256
# (rows of the head, their bias) → what makes logits of hidden states
Prepared = Callable[[torch.Tensor, torch.Tensor | None], Callable[[torch.Tensor], torch.Tensor]]


def _exact(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    kept = KeptWeight(weight, bias)
    return lambda x: linear(x, weight, bias, kept)


class DrawnHead:
    """The head of a model, with labels drawn for every token by a seed: not by how tokens are grouped."""

    def __init__(self, skeleton: Skeleton, seed: int) -> None:
        self._skeleton, self._seed = skeleton, seed
        self._in_tiles: bool | None = None
        self._prepare: Prepared = _exact
        self.loss = 0.0
        self._shares = torch.full((LABELS,), 1.0 / (LABELS - 1))
        self._shares[0] = -1.0

    def gradient(self, hidden: torch.Tensor, first_token: int, output_type: type) -> torch.Tensor:
        """The gradient by last hidden states [tokens, width], those from `first_token` on; `loss` grows by theirs."""
        if self._in_tiles is None:
            self._in_tiles = self._can_be_cut(hidden[:1], output_type)
            if self._in_tiles and self._bears_rounding(hidden, output_type):
                self._prepare = RoundedRows
        one = self._of_tiles if self._in_tiles else self._of_all
        return one(hidden, first_token, output_type).mul_(math.sqrt(1 - 1 / LABELS))

    def _can_be_cut(self, hidden: torch.Tensor, output_type: type) -> bool:
        """Whether each logit depends on its own row of the head alone, and rows can be taken as one likes."""
        if self._skeleton.head_linear is None:
            return False
        whole = self._skeleton.head(hidden[None], output_type)[0]
        columns = torch.linspace(0, whole.shape[-1] - 1, LABELS).long()[None].to(hidden.device)
        try:
            cut = self._joined(hidden, output_type, _exact)
            some = self._logits_of(hidden, columns, output_type)
        except (IndexError, RuntimeError):  # it does something to columns that are not there
            return False
        bound = 2**-5 * float(whole.abs()[whole.isfinite()].max()) if bool(whole.isfinite().any()) else 0.0
        return (
            whole.shape == cut.shape
            and torch.allclose(whole.float(), cut.float(), rtol=0, atol=bound)
            and torch.allclose(whole.float().gather(-1, columns), some.float(), rtol=0, atol=bound)
        )

    def _bears_rounding(self, hidden: torch.Tensor, output_type: type) -> bool:
        """Whether labels may be drawn from logits whose factors are rounded, by some of the tokens."""
        head = self._skeleton.head_linear
        if head is None or not fits(head.weight):
            return False
        some = hidden[torch.linspace(0, len(hidden) - 1, TRIED).long()]
        return is_close(*(self._joined(some, output_type, prepare) for prepare in (_exact, RoundedRows)))

    def _joined(self, hidden: torch.Tensor, output_type: type, prepare: Prepared) -> torch.Tensor:
        """All logits of a few tokens, made tile by tile."""
        return torch.cat([tile for _, _, tile in self._tiles(hidden, output_type, prepare)], -1)

    def _tiles(
        self, hidden: torch.Tensor, output_type: type, prepare: Prepared
    ) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Logits [up to TOKENS, up to TILE] with which tokens they are of and the column that they begin at.

        Rows of the head are prepared once, for all tokens.
        """
        head = self._skeleton.head_linear
        assert head is not None
        weight, bias = head.weight, head.bias
        for first in range(0, len(weight), TILE):
            rows = slice(first, first + TILE)
            product = prepare(weight[rows], None if bias is None else bias[rows])
            for tokens in _parts(hidden, TOKENS if hidden.device.type == "cpu" else LOGITS // TILE):
                yield tokens, first, self._skeleton.head(hidden[None, tokens], output_type, product)[0]

    def _logits_of(self, hidden: torch.Tensor, labels: torch.Tensor, output_type: type) -> torch.Tensor:
        """Logits of labels [tokens, LABELS]."""
        head = self._skeleton.head_linear
        assert head is not None
        weight, bias = head.weight[labels].float(), 0 if head.bias is None else head.bias[labels].float()

        def product(x: torch.Tensor) -> torch.Tensor:
            return ((weight @ x[0].float()[..., None])[..., 0] + bias).to(x.dtype)[None]

        return self._skeleton.head(hidden[None], output_type, product)[0]

    def _of_tiles(self, hidden: torch.Tensor, first_token: int, output_type: type) -> torch.Tensor:
        labels = self._draw(self._tiles(hidden, output_type, self._prepare), hidden, first_token)
        gradient = torch.empty_like(hidden)
        for part in _parts(hidden, GATHERED):
            rows = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = self._logits_of(rows, labels[part], output_type)
            pull = self._shares.to(logits).expand_as(logits)
            (gradient[part],) = torch.autograd.grad(logits, rows, pull)
        return gradient

    def _of_all(self, hidden: torch.Tensor, first_token: int, output_type: type) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        for part in _parts(hidden, max(1, LOGITS // self._skeleton.vocabulary)):
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                logits = self._skeleton.head(rows[None], output_type)[0]
            labels = self._draw([(slice(0, len(rows)), 0, logits.detach())], rows, first_token + part.start)
            pull = torch.zeros_like(logits).scatter_add_(-1, labels, self._shares.to(logits).expand(labels.shape))
            (gradient[part],) = torch.autograd.grad(logits, rows, pull)
        return gradient

    def _draw(
        self, tiles: Iterable[tuple[slice, int, torch.Tensor]], hidden: torch.Tensor, first_token: int
    ) -> torch.Tensor:
        """Labels [tokens, LABELS] from tiles of logits."""
        drawn = Drawn.of(len(hidden), hidden.device)
        for tokens, first, logits in tiles:
            numbers = uniforms(self._seed, first_token + tokens.start, len(logits), first)
            drawn.see(logits, first, numbers, tokens)
        if not math.isfinite(drawn.loss):
            # The gradient would not tell: it looks at the logits of the labels alone.
            raise CalibrationError(
                "The model's predictions for some token of the calibration text are NaN or infinite.",
                "calibrate without them: --importance none",
            )
        self.loss += drawn.loss
        return drawn.labels


def _parts(rows: torch.Tensor, count: int) -> Iterator[slice]:
    """Up to so many rows at a time."""
    for start in range(0, len(rows), count):
        yield slice(start, min(start + count, len(rows)))
