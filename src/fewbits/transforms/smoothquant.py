"""SmoothQuant: move the difficulty of rounding activations into the weights, where it hurts less.

Source: Xiao et al. 2022, arXiv 2211.10438.
W [N, K] fp32, all consumers of one input · X the tokens · s_j = max|X_j|^α / max|W_j|^(1−α), so that X/s and W·s are
multiplied in their place.
"auto" compares values of α by the error of the output that rounding to 8 bits makes: of the weights by H, and of the
activations by each token's largest channel, seen on a sample of tokens. Rounding with step r/127 errs by its square /
12 on each channel, independent of the others, and a row of Ŵ adds that up.
Needs: maxima; for "auto" a Gram of some tokens, and a sample. Cost: O(candidates · (rows + tokens) · K) + O(rows · K²).
"""

from __future__ import annotations

import torch

from fewbits.arrays import smooth_quant_scales
from fewbits.fp32_products import fast_fp32
from fewbits.methods import SmoothQuant
from fewbits.transforms.balancing import STEPS, balance_both
from fewbits.transforms.problem import ScaleProblem

ALPHAS = 20
# Rows of the weight that candidates are ranked by with diag(H), and the best of them confirmed by with H.
RANKED_ROWS, CONFIRMED_ROWS = 256, 512
CONFIRMED = 3
BALANCED = True
BALANCED_TOKENS = 512
LEVELS = 127
LARGEST_RATIO = 2.0**10


def find_scales(problem: ScaleProblem) -> torch.Tensor:
    """The scales for the method's α, or for the best of 21 and of no scaling at all; fp32 [K], positive."""
    assert isinstance(problem.method, SmoothQuant)
    alpha = problem.method.alpha
    if not isinstance(alpha, str):
        return _scales(problem, alpha)
    candidates = [torch.ones(problem.W.shape[1]), *(_scales(problem, step / ALPHAS) for step in range(ALPHAS + 1))]
    rows = problem.some_rows(RANKED_ROWS)
    diagonal = problem.statistics.gram.diagonal()
    losses = [_loss(problem, rows, s, diagonal) for s in candidates]
    order = sorted(range(len(candidates)), key=losses.__getitem__)[:CONFIRMED]
    best = [candidates[index] for index in order]
    if BALANCED:
        best.append(_balanced(problem, rows, best[0]))
    rows = problem.some_rows(CONFIRMED_ROWS)
    confirmed = [_loss(problem, rows, s, problem.statistics.gram) for s in best]
    return best[confirmed.index(min(confirmed))]


def _balanced(problem: ScaleProblem, rows: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Scales at which no channel wants to go either way."""
    importance = problem.statistics.gram.diagonal() / problem.statistics.tokens
    sample, norms = problem.sample[:: max(1, len(problem.sample) // BALANCED_TOKENS)], rows.square().sum(0)
    for _ in range(STEPS):
        move = problem.ties.mean(balance_both(rows, sample, importance, norms, s))
        s = problem.centred(s * move.exp(), LARGEST_RATIO)
    return s


def _scales(problem: ScaleProblem, alpha: float) -> torch.Tensor:
    input_max = problem.ties.largest(problem.statistics.absmax)
    return problem.centred(smooth_quant_scales(problem.largest_weights, input_max, alpha), LARGEST_RATIO)


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
