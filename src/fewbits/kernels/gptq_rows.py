"""Compiled GPTQ of rows of weights: swept, then descended, 32 rows side by side and as many as the caches bear.

Rows are independent: the result does not depend on how they are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewbits.kernels.compiling import ROUNDING, Array, entry, inner
from fewbits.kernels.curvature import Curvature
from fewbits.kernels.far_products import KEPT
from fewbits.kernels.feedback import LAID, PANEL, Feedback, lay_columns, over_runs
from fewbits.kernels.gptq_descent import descend_panel
from fewbits.kernels.gptq_sweep import sweep_panel
from fewbits.kernels.lane_products import COLUMN_BYTES, ROWS
from fewbits.kernels.lanes import LANES
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.turned import turn_rows
from fewbits.schemes import Scheme
from fewbits.search import SweptSearch

STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class ChosenRows:
    """Codes uint8 [N, K]; scales fp32 and zero points uint8 [N, G]; losses fp64 [N]; W − Ŵ fp32 [N, K]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    losses: torch.Tensor
    missed: torch.Tensor


@inner
def _lay_grids(scales: Any, zeros: Any, order: Any, group: Any, grids: Any) -> None:
    """Grids of up to ROWS rows side by side, [groups, 2, ROWS], groups as `order` has them; 1 and 0 beyond them."""
    for number in range(len(grids)):
        own = order[number * group] // np.uint64(group)
        grids[number, 0], grids[number, 1] = np.float32(1.0), np.float32(0.0)
        for lane in range(len(scales)):
            grids[number, 0, lane] = scales[lane, own]
            grids[number, 1, lane] = np.float32(zeros[lane, own])


@inner
def _write_grids(grids: Any, order: Any, group: Any, scales: Any, zeros: Any) -> None:
    for number in range(len(grids)):
        own = order[number * group] // np.uint64(group)
        for lane in range(len(scales)):
            scales[lane, own] = grids[number, 0, lane]
            zeros[lane, own] = np.uint8(np.int32(grids[number, 1, lane]))


@inner
def _write_rows(chosen: Any, misses: Any, order: Any, codes: Any, missed: Any) -> None:
    """Columns [K, ROWS] back to rows, their channels where they were."""
    laid = np.empty((ROWS, LAID), np.float32)
    for start in range(0, len(order), LAID):
        count = min(LAID, len(order) - start)
        whole = count // LANES * LANES
        turn_rows(
            misses[start:].ctypes.data, np.int64(COLUMN_BYTES), laid.ctypes.data, np.int64(laid.strides[0]), whole,
            np.int64(ROWS),
        )  # fmt: skip
        for k in range(whole, count):
            copy_numbers(laid[:, k], misses[start + k])
        for lane in range(len(codes)):
            own_codes, own_missed = codes[lane], missed[lane]
            for k in range(count):
                channel = order[start + k]
                own_codes[channel] = chosen[start + k, lane]
                own_missed[channel] = laid[lane, k]


@entry
def _choose(
    W: Any, order: Any, feedback: Any, curvature: Any, group: Any, step: Any, candidates: Any, top_code: Any,
    passes: Any, scales: Any, zeros: Any, codes: Any, losses: Any, missed: Any, begin_run: Any, end_run: Any,
) -> None:  # fmt: skip
    """Choose for runs of ROWS rows, those numbered begin_run to end_run."""
    rows, width = W.shape
    most = min(max(1, PANEL // (ROWS * width)), end_run - begin_run)
    panels, chosen = np.empty((most, width, ROWS), np.float32), np.empty((most, width, ROWS), np.uint8)
    grids = np.empty((most, width // group, 2, ROWS), np.float32)
    errors = np.zeros((most, feedback[0].shape[1], ROWS), KEPT)
    for panel in range(begin_run, end_run, most):
        runs = min(most, end_run - panel)
        for run in range(runs):
            own = slice((panel + run) * ROWS, (panel + run + 1) * ROWS)
            lay_columns(W[own], order, panels[run])
            _lay_grids(scales[own], zeros[own], order, group, grids[run])
        lost = np.zeros((runs, ROWS), np.float64)
        sweep_panel(
            feedback, group, step, candidates, top_code, panels[:runs], grids, chosen, errors, lost
        )  # fmt: skip
        if passes > 0:
            descend_panel(
                curvature, feedback[0], feedback[1].shape[1], group, passes, top_code, panels[:runs], grids, chosen,
                errors, lost,
            )  # fmt: skip
        for run in range(runs):
            own = slice((panel + run) * ROWS, min((panel + run + 1) * ROWS, rows))
            copy_numbers(losses[own], lost[run])
            _write_grids(grids[run], order, group, scales[own], zeros[own])
            _write_rows(chosen[run], panels[run], order, codes[own], missed[own])


def choose_rows(
    W: torch.Tensor,
    order: torch.Tensor,
    feedback: Feedback,
    curvature: Curvature | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    candidates: SweptSearch | None,
    passes: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> ChosenRows:
    """Choose the codes of rows, and for each group of each row the grid among the candidates; then re-round each code.

    Args:
        W: fp32 [N, K]. order: int64 [K], channels as they are swept; those of a group come together.
        feedback: of H, its channels in `order`, for the scheme's groups. curvature: of H, for descent; None for none.
        candidates: grids that are tried; None takes `scales` and `zeros` as they come.
        passes: of descent. scales, zeros: fp32 and uint8 [N, G], written where there are candidates.

    Returns:
        With each row's loss by H: of the sweep, the sum of its squared errors (w − ŵ) / U_jj, less what descent gained.
    """
    codes, missed = torch.empty(W.shape, dtype=torch.uint8), torch.empty(W.shape)
    losses = torch.empty(len(W), dtype=torch.float64)
    factors, nearby = ([], []) if candidates is None else (candidates.factors(), candidates.nearby())
    top_code = np.float32(scheme.largest_code)
    given = (
        W.contiguous().numpy(), order.numpy().view(np.uint64), (feedback.far, feedback.inverse), _arrays(curvature),
        scheme.group_size or W.shape[1], scheme.group_size or feedback.block,
        (_fp32(factors), _fp32(nearby), (scheme.symmetric, top_code, *ROUNDING[STORED[scale_dtype]])),
        top_code, 0 if curvature is None else passes, scales.numpy(), zeros.numpy(),
        codes.numpy(), losses.numpy(), missed.numpy(),
    )  # fmt: skip
    over_runs(len(W), W.shape[1], lambda begin, end: _choose(*given, begin, end))
    return ChosenRows(codes, scales, zeros, losses, missed)


def _fp32(numbers: Sequence[float]) -> Array:
    return np.array(numbers, np.float32)


def _arrays(curvature: Curvature | None) -> tuple[Array, Array]:
    if curvature is None:
        return np.empty((0, 0), KEPT), np.empty((0, 0, 0), np.float32)
    return curvature.far, curvature.own
