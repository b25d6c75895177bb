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
from fewbits.matrix_products import linear
from fewbits.pass_memory import LOGITS
from fewbits.rounded_head import TRIED, fits, is_close, rounded_product
from fewbits.skeleton import Skeleton

# Logits of a token in a tile. With the tokens of a micro-batch they fill 16 MB, for which products are the fastest;
# as a power of two, rows of logits would fall on the same lines of a cache.
TILE = 4032
# Tokens whose labels' rows of the head are gathered at a time.
GATHERED = 256
# (hidden states, rows of the head, their bias) → logits
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class DrawnHead:
    """The head of a model, with labels drawn for every token by a seed: not by how tokens are grouped."""

    def __init__(self, skeleton: Skeleton, seed: int) -> None:
        self._skeleton, self._seed = skeleton, seed
        self._in_tiles: bool | None = None
        self._product: Product = linear
        self.loss = 0.0
        self._shares = torch.full((LABELS,), 1.0 / (LABELS - 1))
        self._shares[0] = -1.0

    def gradient(self, hidden: torch.Tensor, first_token: int, output_type: type) -> torch.Tensor:
        """The gradient by last hidden states [tokens, width], those from `first_token` on; `loss` grows by theirs."""
        if self._in_tiles is None:
            self._in_tiles = self._can_be_cut(hidden[:1], output_type)
            if self._in_tiles and self._bears_rounding(hidden, output_type):
                self._product = rounded_product
        gradient = torch.empty_like(hidden)
        step = max(1, LOGITS // (TILE if self._in_tiles else self._skeleton.vocabulary))
        one = self._of_tiles if self._in_tiles else self._of_all
        for start in range(0, len(hidden), step):
            gradient[start : start + step] = one(hidden[start : start + step], first_token + start, output_type)
        return gradient.mul_(math.sqrt(1 - 1 / LABELS))

    def _can_be_cut(self, hidden: torch.Tensor, output_type: type) -> bool:
        """Whether each logit depends on its own row of the head alone, and rows can be taken as one likes."""
        if self._skeleton.head_linear is None:
            return False
        whole = self._skeleton.head(hidden[None], output_type)[0]
        columns = torch.linspace(0, whole.shape[-1] - 1, LABELS).long()[None].to(hidden.device)
        try:
            cut = torch.cat([tile for _, tile in self._tiles(hidden, output_type)], -1)
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
        exact, rounded = (
            torch.cat([tile for _, tile in self._tiles(some, output_type, product)], -1)
            for product in (linear, rounded_product)
        )
        return is_close(exact, rounded)

    def _tiles(
        self, hidden: torch.Tensor, output_type: type, product: Product = linear
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits [tokens, up to TILE] with the column that they begin at."""
        head = self._skeleton.head_linear
        assert head is not None
        weight, bias = head.weight, head.bias
        for first in range(0, len(weight), TILE):

            def part(x: torch.Tensor, rows: slice = slice(first, first + TILE)) -> torch.Tensor:
                return product(x, weight[rows], None if bias is None else bias[rows])

            yield first, self._skeleton.head(hidden[None], output_type, part)[0]

    def _logits_of(self, hidden: torch.Tensor, labels: torch.Tensor, output_type: type) -> torch.Tensor:
        """Logits of labels [tokens, LABELS]."""
        head = self._skeleton.head_linear
        assert head is not None
        weight, bias = head.weight[labels].float(), 0 if head.bias is None else head.bias[labels].float()

        def product(x: torch.Tensor) -> torch.Tensor:
            return ((weight @ x[0].float()[..., None])[..., 0] + bias).to(x.dtype)[None]

        return self._skeleton.head(hidden[None], output_type, product)[0]

    def _of_tiles(self, hidden: torch.Tensor, first_token: int, output_type: type) -> torch.Tensor:
        labels = self._draw(self._tiles(hidden, output_type, self._product), hidden, first_token)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), GATHERED):
            rows = hidden[start : start + GATHERED].detach().requires_grad_()
            with torch.enable_grad():
                logits = self._logits_of(rows, labels[start : start + GATHERED], output_type)
            pull = self._shares.to(logits).expand_as(logits)
            (gradient[start : start + GATHERED],) = torch.autograd.grad(logits, rows, pull)
        return gradient

    def _of_all(self, hidden: torch.Tensor, first_token: int, output_type: type) -> torch.Tensor:
        with torch.enable_grad():
            rows = hidden.detach().requires_grad_()
            logits = self._skeleton.head(rows[None], output_type)[0]
        labels = self._draw([(0, logits.detach())], hidden, first_token)
        pull = torch.zeros_like(logits).scatter_add_(-1, labels, self._shares.to(logits).expand(labels.shape))
        return torch.autograd.grad(logits, rows, pull)[0]

    def _draw(self, tiles: Iterable[tuple[int, torch.Tensor]], hidden: torch.Tensor, first_token: int) -> torch.Tensor:
        """Labels [tokens, LABELS] from tiles of logits."""
        drawn = Drawn.of(len(hidden), hidden.device)
        for first, logits in tiles:
            drawn.see(logits, first, uniforms(self._seed, first_token, len(hidden), first))
        if not math.isfinite(drawn.loss):
            # The gradient would not tell: it looks at the logits of the labels alone.
            raise CalibrationError(
                "The model's predictions for some token of the calibration text are NaN or infinite.",
                "calibrate without them: --importance none",
            )
        self.loss += drawn.loss
        return drawn.labels
