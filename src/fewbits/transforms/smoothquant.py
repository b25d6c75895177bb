"""SmoothQuant: move the difficulty of rounding activations into the weights, where it hurts less.

Source: Xiao et al. 2022, arXiv 2211.10438.
W [N, K] fp32, all consumers of one input · X the tokens · s_j = max|X_j|^α / max|W_j|^(1−α), so that X/s and W·s are
multiplied in their place.
"auto" compares values of α by the error of the output that rounding to 8 bits makes: of the weights by H, and of the
activations by each token's largest channel, seen on a sample of tokens. Rounding with step r/127 errs by its square /
12 on each channel, independent of the others, and a row of Ŵ adds that up.
Needs: maxima; for "auto" Gram and sample. Cost: O(candidates · (rows + tokens) · K) + O(N · K²).
"""

from __future__ import annotations

import torch

from fewbits.arrays import smooth_quant_scales
from fewbits.fp32_products import fast_fp32
from fewbits.methods import SmoothQuant
from fewbits.transforms.problem import ScaleProblem

STEPS = 20
RANKED_ROWS = 256
CONFIRMED = 3
LEVELS = 127
LARGEST_RATIO = 2.0**10


def find_scales(problem: ScaleProblem) -> torch.Tensor:
    """The scales for the method's α, or for the best of 21 and of no scaling at all; fp32 [K], positive."""
    assert isinstance(problem.method, SmoothQuant)
    alpha = problem.method.alpha
    if not isinstance(alpha, str):
        return _scales(problem, alpha)
    candidates = [torch.ones(problem.W.shape[1]), *(_scales(problem, step / STEPS) for step in range(STEPS + 1))]
    rows = problem.some_rows(RANKED_ROWS)
    diagonal = problem.statistics.gram.diagonal()
    losses = [_loss(problem, rows, s, diagonal) for s in candidates]
    order = sorted(range(len(candidates)), key=losses.__getitem__)[:CONFIRMED]
    confirmed = [_loss(problem, problem.W, candidates[index], problem.statistics.gram) for index in order]
    return candidates[order[confirmed.index(min(confirmed))]]


def _scales(problem: ScaleProblem, alpha: float) -> torch.Tensor:
    weight_max = problem.ties.largest(problem.W.abs().amax(0))
    input_max = problem.ties.largest(problem.statistics.absmax)
    return problem.centred(smooth_quant_scales(weight_max, input_max, alpha), LARGEST_RATIO)


def _loss(problem: ScaleProblem, rows: torch.Tensor, s: torch.Tensor, H: torch.Tensor) -> float:
    """Squared error of the output of some rows, mean over tokens. H: the Gram or its diagonal."""
    decoded = problem.quick(rows * s, H if H.dim() == 1 else H.diagonal())
    missed = rows - decoded / s
    with fast_fp32():
        by_column = missed * H if H.dim() == 1 else missed @ H
    weights = float((by_column * missed).sum(dtype=torch.float64)) / problem.statistics.tokens
    step = (problem.sample / s).abs().amax(1) / LEVELS
    activations = float(step.square().mean() / 12) * float(decoded.square().sum(dtype=torch.float64))
    return weights + activations
