"""Drift of inputs: what is measured of it, and the targets whose outputs are the original model's."""

from __future__ import annotations

import pytest
import torch

from fewbits.drift import Drift, DriftAccumulator
from fewbits.originals import stride_of
from fewbits.schemes import Scheme
from fewbits.solvers import drifted
from fewbits.solvers.drifted import drifted_targets
from fewbits.solvers.gptq import solve

TOKENS, WIDTH, ROWS = 3000, 48, 24


def drifted_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x° and x, fp32 [TOKENS, WIDTH], x° linear in x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    return x + 0.1 * x @ torch.randn(WIDTH, WIDTH, generator=generator), x


def weight() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_is_the_weighted_sum_it_says_scaled_to_all_tokens(dtype: torch.dtype) -> None:
    original, x = (part.to(dtype) for part in drifted_inputs())
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2))
    total = DriftAccumulator(WIDTH, WIDTH)
    for start in range(0, TOKENS, 1000):
        part = slice(start, start + 1000)
        total.add(original[part] - x[part], x[part], weights[part])
    found = total.finish(2 * TOKENS)
    assert found is not None
    moved = (original.double() - x.double()) * weights.double()[:, None]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert bool(
        ((found.double() - 2 * moved.T @ x.double()).abs() <= bound * 2 * moved.abs().T @ x.double().abs()).all()
    )
    assert DriftAccumulator(WIDTH, WIDTH).finish(5) is None


def test_targets_give_the_outputs_of_the_inputs_before_they_drifted(monkeypatch: pytest.MonkeyPatch) -> None:
    original, x = drifted_inputs()
    W, H, D = weight(), x.T @ x, (original - x).T @ x
    monkeypatch.setattr(drifted, "DAMPING", 1e-6)
    monkeypatch.setattr(drifted, "SHARE", 1.0)
    targets = drifted_targets(W, H, Drift(D), [slice(0, 10), slice(10, ROWS)], keep=True)
    assert torch.allclose(targets @ x.T, W @ original.T, atol=1e-3)
    monkeypatch.setattr(drifted, "SHARE", 0.5)
    halfway = drifted_targets(W, H, Drift(D), [slice(0, ROWS)], keep=False)
    assert torch.allclose(halfway, (W + targets) / 2, atol=1e-5)


@pytest.mark.parametrize("coupled", [False, True])
def test_solving_for_drifted_inputs_comes_closer_to_the_original_outputs(coupled: bool) -> None:
    original, x = drifted_inputs()
    W, H, D = weight(), x.T @ x, (original - x).T @ x
    scheme = Scheme("int", 4, False, 16)
    couplings = [torch.eye(ROWS)] if coupled else []
    plain = solve(W, scheme, torch.bfloat16, H.clone(), couplings=couplings)
    kept = solve(W, scheme, torch.bfloat16, H, couplings=couplings, drift=Drift(D))
    again = solve(W, scheme, torch.bfloat16, H.clone(), couplings=couplings, drift=Drift(D.clone()), keep_gram=False)
    assert torch.equal(kept.codes, again.codes)

    def missed(decoded: torch.Tensor) -> float:
        return float((W @ original.T - decoded @ x.T).square().sum())

    assert missed(kept.decoded) < 0.5 * missed(plain.decoded)
    error = W - kept.decoded
    assert kept.output_error is not None
    assert torch.allclose(kept.output_error, ((error @ H) * error).sum(1).double(), rtol=1e-3)


def test_a_statistic_that_cannot_be_factored_leaves_the_weights_as_the_target() -> None:
    W, nothing = weight(), torch.zeros(WIDTH, WIDTH)
    assert drifted_targets(W, nothing, Drift(nothing.clone()), [slice(0, ROWS)], keep=True) is W


@pytest.mark.parametrize(
    ("tokens", "widest", "stride"),
    [(32768, 1536, 3), (32768, 2048, 2), (32768, 8192, 2), (262144, 1536, 21), (8, 64, 2)],
)
def test_long_texts_are_followed_as_far_as_drift_needs(tokens: int, widest: int, stride: int) -> None:
    assert stride_of(tokens, widest) == stride


def test_a_doctored_statistic_may_be_written_over_too() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 64, generator=generator)
    # An eigenvalue that the usual damping does not lift above zero.
    values, vectors = torch.linalg.eigh(x.T @ x)
    values[0] = -0.05 * values.mean()
    H = (vectors * values) @ vectors.T
    H, D = (H + H.T) / 2, 0.1 * torch.randn(64, 64, generator=generator)
    W, scheme = torch.randn(40, 64, generator=generator), Scheme("int", 4, False, 16)
    kept = solve(W, scheme, torch.bfloat16, H, drift=Drift(D))
    spent = solve(W, scheme, torch.bfloat16, H.clone(), drift=Drift(D.clone()), keep_gram=False)
    assert kept.notes and kept.notes == spent.notes
    assert torch.equal(kept.codes, spent.codes)
    assert kept.output_error is not None and spent.output_error is not None
    assert torch.equal(kept.output_error, spent.output_error)
