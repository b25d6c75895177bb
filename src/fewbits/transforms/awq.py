"""AWQ: scale up the input channels that matter, so that rounding errs less where activations are large.

Source: Lin et al. 2023, arXiv 2306.00978.
W [N, K] fp32, all consumers of one input · H [K, K] = Σ wₜ xₜ xₜᵀ · x mean |X| by channel · s [K] scales
Candidates: s = x^a ("mean"), s = x^a / w^(1−a) ("duo", w the mean of |W| relative to its group's largest), and
s = h^a ("rms", h the root of diag(H)), each over a grid of a. All are ranked by diag(H) on some rows with a quick
rounding; the best few and s = 1 are compared by (W − Ŵ) H (W − Ŵ)ᵀ with the rounding that will be used.
Differs from the paper: no forward pass, and nothing is compared but the error of the output.
Needs: Gram, means. Cost: O(candidates · rows · K) + O(N · K²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.transforms.problem import Rounding, ScaleProblem

# Beyond this ratio to the middle one, scales cost more precision elsewhere than they give.
LARGEST_RATIO = 2.0**7


@dataclass(frozen=True)
class AwqSearch:
    """What may be varied; docs/methods/awq.md has each choice measured.

    steps: values of a. ranked_rows: rows that candidates are ranked on. confirmed: how many are compared with H.
    """

    forms: tuple[str, ...] = ("mean", "duo", "rms")
    steps: int = 20
    ranked_rows: int = 256
    confirmed: int = 4


DEFAULTS = AwqSearch()


def find_scales(problem: ScaleProblem, search: AwqSearch = DEFAULTS) -> torch.Tensor:
    """The scales of least output error, fp32 [K]; all 1 if nothing is better."""
    candidates = _candidates(problem, search)
    H = problem.statistics.gram
    diagonal = H.diagonal()
    rows = problem.some_rows(search.ranked_rows)
    losses = [_missed(rows, s, diagonal, problem.quick).square().sum(0).dot(diagonal).item() for s in candidates]
    order = sorted(range(len(candidates)), key=losses.__getitem__)
    best = [torch.ones_like(diagonal), *(candidates[index] for index in order[: search.confirmed])]
    confirmed = [_output_error(_missed(problem.W, s, diagonal, problem.final), H) for s in best]
    return best[confirmed.index(min(confirmed))]


def _missed(W: torch.Tensor, s: torch.Tensor, diagonal: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """W − Ŵ, where Ŵ is scaled, rounded and scaled back."""
    return W - rounding(W * s, diagonal / s.square()) / s


def _output_error(missed: torch.Tensor, H: torch.Tensor) -> float:
    with fast_fp32():
        return float(((missed @ H) * missed).sum(dtype=torch.float64))


def _candidates(problem: ScaleProblem, search: AwqSearch) -> list[torch.Tensor]:
    W, ties, statistics = problem.W, problem.ties, problem.statistics
    N, K = W.shape
    grouped = W.abs().view(N, problem.method.scheme.groups(K), -1)
    relative = grouped / grouped.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    w = _usable(ties.mean(relative.view(N, K).mean(0)))
    x = _usable(ties.mean(statistics.absmean))
    h = _usable(ties.mean(statistics.gram.diagonal()).sqrt())
    found = []
    for step in range(1, search.steps + 1):
        a = step / search.steps
        by_form = {"mean": x**a, "duo": x**a / w ** (1 - a), "rms": h**a, "duo rms": h**a / w ** (1 - a)}
        found += [problem.centred(by_form[form], LARGEST_RATIO) for form in search.forms]
    return found


def _usable(values: torch.Tensor) -> torch.Tensor:
    """Zeros become the middle of the others; their scales are 1 in the end."""
    positive = values > 0
    if not bool(positive.any()):
        return torch.ones_like(values)
    return torch.where(positive, values, values[positive].log().mean().exp())
