"""Rows solved each on its own, all by one H: swept, descended, held against plain rounding, and what each lost."""

from __future__ import annotations

import torch

from fewbits.kernels.curvature import Curvature
from fewbits.kernels.feedback import Feedback, norms
from fewbits.kernels.quadratic import quadratic, squares
from fewbits.kernels.rounding import search_grid
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.search import Search
from fewbits.solvers.compensated import compensated
from fewbits.solvers.gptq_options import GptqOptions
from fewbits.solvers.solution import Grid, Solution

# Rows compared with plain rounding are one of so many, and no fewer than so many; only if one came out worse, all are.
SAMPLED, FEWEST_SAMPLED = 64, 16


class RowSolver:
    """Solves rows of weights, each on its own, all by one H."""

    def __init__(
        self,
        H: torch.Tensor,
        feedback: Feedback | None,
        curvature: Curvature | None,
        damping: float,
        trouble: str | None,
        order: torch.Tensor,
        seen: torch.Tensor,
        living: torch.Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        options: GptqOptions,
    ) -> None:
        """Take what one H says.

        Args:
            H: by which losses are told where there is no curvature. feedback: of its factor, if any.
            curvature: of the H that was factored, unless that was doctored.
            damping, trouble: what it took to factor H (`Factor`).
            seen: H's diagonal. living: that which was factored.
        """
        self._order, self._living = order, living
        self._scheme, self._scale_dtype, self._options = scheme, scale_dtype, options
        self._feedback, self._curvature = feedback, curvature
        self._H = H if curvature is None else None
        # What losses are told by has on its diagonal beyond H.
        self._added = torch.zeros_like(seen) if curvature is None else living - seen + damping
        self._notes: tuple[tuple[str, str], ...] = ()
        if feedback is None:
            self._notes = (("rounded plainly", "its statistic cannot be factored"),)
        elif trouble is not None:
            self._notes = (("solved with a doctored statistic", trouble),)

    def solution(self, W: torch.Tensor, target: torch.Tensor | None = None) -> Solution:
        """The solution of rows fp32 [n, K] that comes close to `target` (W if None), with what it lost of W."""
        if self._feedback is None:
            return self.judged(W, self._rounded(W))
        aim = W if target is None else target
        solved, loss, missed = self._compensated(aim, self._feedback)
        if self._restore_worse_rows(aim, solved) or target is not None:
            return self.judged(W, solved)
        return self.judged(W, solved, missed, None if self._curvature is None else loss)

    def choose_few(self, W: torch.Tensor) -> tuple[Grid, torch.Tensor]:
        """Codes of a few rows, and what they miss of W, fp32 [n, K].

        So few that looking at some of them costs; from 4 bits on none came out worse than rounded.
        """
        assert self._feedback is not None
        solved, _, missed = self._compensated(W, self._feedback)
        restored = self._scheme.bits < 4 and self._restore_worse_rows(W, solved)
        return solved, W - decode_codes(*solved, self._scheme) if restored else missed

    def judged(
        self, W: torch.Tensor, solved: Grid, missed: torch.Tensor | None = None, damped_loss: torch.Tensor | None = None
    ) -> Solution:
        """The solution with what it lost.

        Args:
            missed: W − Ŵ, if it is known. damped_loss: of each row by the damped H, fp64 [n], if it is known.
        """
        missed = W - decode_codes(*solved, self._scheme) if missed is None else missed
        squared_error, added_error = squares(missed, self._added)
        squared_norm, added_norm = squares(W, self._added)
        damped_loss = self._damped_losses(missed) if damped_loss is None else damped_loss
        return Solution(
            self._scheme, *solved,
            squared_error=squared_error,
            squared_norm=squared_norm,
            output_error=(damped_loss - added_error).clamp_min(0),
            output_norm=(self._damped_losses(W) - added_norm).clamp_min(0),
            notes=self._notes,
        )  # fmt: skip

    def _compensated(self, W: torch.Tensor, feedback: Feedback) -> tuple[Grid, torch.Tensor, torch.Tensor]:
        """Codes, each row's loss by the H that was factored, and W − Ŵ."""
        return compensated(
            W, feedback, self._curvature, self._order, self._living, self._scheme, self._scale_dtype, self._options
        )  # fmt: skip

    def _damped_losses(self, rows: torch.Tensor) -> torch.Tensor:
        """The diagonal of rows · H · rowsᵀ by H as it was factored, or as it is if that was doctored, fp64 [n]."""
        if self._H is not None:
            return quadratic(rows, torch.arange(len(self._H)), self._H)
        assert self._feedback is not None
        return norms(rows, self._order, self._feedback)

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        """The diagonal of rows · H · rowsᵀ, fp64 [n]."""
        return (self._damped_losses(rows) - squares(rows, self._added)[1]).clamp_min(0)

    def _rounded(self, W: torch.Tensor) -> Grid:
        return _rounded(W, self._scheme, self._scale_dtype, self._options.search, self._living)

    def _restore_worse_rows(self, W: torch.Tensor, solved: Grid) -> bool:
        """Round plainly, in place, the rows that came out worse than that by H: at 2 bits some do. Says whether any."""
        rows = torch.arange(0, len(W), max(1, min(SAMPLED, len(W) // FEWEST_SAMPLED)))
        while True:
            codes, scales, zeros = (None if part is None else part[rows] for part in solved)
            assert codes is not None and scales is not None
            rounded = self._rounded(W[rows])
            both = [W[rows] - decode_codes(*grid, self._scheme) for grid in ((codes, scales, zeros), rounded)]
            error, of_rounded = torch.split(self._losses(torch.cat(both)), len(rows))
            worse = error > of_rounded
            if not bool(worse.any()):
                return False
            if len(rows) == len(W):
                break
            rows = torch.arange(len(W))
        for part, plain in zip(solved, rounded, strict=True):
            if part is not None and plain is not None:
                part[worse] = plain[worse]
        return True


def _rounded(
    W: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: Search, importance: torch.Tensor
) -> Grid:
    scales, zeros = search_grid(W, scheme, scale_dtype, search, importance)
    grouped = W.view(W.shape[0], scales.shape[1], -1)
    offset = zeros.float()[:, :, None]
    codes = ((grouped * (1 / scales.float())[:, :, None]).round_() + offset).clamp_(0, scheme.largest_code)
    return codes.to(torch.uint8).view(W.shape), scales, None if scheme.symmetric else zeros
