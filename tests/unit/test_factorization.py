"""The factor of H⁻¹ against NumPy in fp64, and the ladder for what will not factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.fp32_products import _onednn_is_exact, fast_fp32
from fewbits.solvers import factorization
from fewbits.solvers.factorization import factor_of, inverse_factor


def gram(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


@pytest.mark.parametrize("width", [1, 2, 31, 256, 257, 700])
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse(width: int) -> None:
    H = gram(width, 3 * width + 1)
    factor, inverse = factor_of(H), inverse_factor(H)
    assert factor is not None and factor.trouble is None and inverse is not None
    assert factor.damping == pytest.approx(0.01 * H.diagonal().mean().item())
    damped = H.double().numpy() + factor.damping * np.eye(width)
    U, L = inverse.double().numpy(), factor.L.double().numpy()
    assert np.array_equal(U, np.triu(U)) and np.array_equal(L, np.tril(L))
    assert np.abs(U.T @ U @ damped - np.eye(width)).max() < 1e-3
    assert np.abs(L @ L.T - damped[::-1, ::-1]).max() < 1e-5 * np.abs(damped).max()


@pytest.mark.parametrize("steps", [factorization.DAMPING_STEPS, 0])
def test_channels_are_factored_in_the_order_and_with_the_diagonal_that_are_given(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without steps of damping only the rungs in fp64 are left.
    monkeypatch.setattr(factorization, "DAMPING_STEPS", steps)
    H = gram(70, 300)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    diagonal = H.diagonal()[order] + torch.linspace(0, 50, 70)
    before = H.clone()
    factor = factor_of(H, order=order, diagonal=diagonal)
    assert factor is not None and torch.equal(H, before)
    assert factor.damping == pytest.approx(0.01 * diagonal.mean().item())
    wanted = H.double().numpy()[np.ix_(order.numpy(), order.numpy())]
    np.fill_diagonal(wanted, diagonal.double().numpy() + factor.damping)
    L = factor.L.double().numpy()
    assert np.array_equal(L, np.tril(L))
    assert np.abs(L @ L.T - wanted[::-1, ::-1]).max() < 1e-5 * np.abs(wanted).max()
    U, M = inverse_factor(H, order=order), factor_of(H, order=order)
    assert U is not None and M is not None
    plain = wanted.copy()
    np.fill_diagonal(plain, H.diagonal()[order].double().numpy() + M.damping)
    assert np.abs(U.double().numpy().T @ U.double().numpy() @ plain - np.eye(70)).max() < 1e-3


def test_a_singular_statistic_takes_the_usual_damping() -> None:
    factor = factor_of(gram(64, 3))
    assert factor is not None and factor.trouble is None


def test_each_failure_damps_ten_times_more() -> None:
    H = gram(32, 100)
    # An eigenvalue of minus a twentieth of the mean diagonal: 1 % is too little for it, 10 % enough.
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()
    indefinite = (vectors * values) @ vectors.T
    factor = factor_of((indefinite + indefinite.T) / 2)
    assert factor is not None and factor.trouble == "damping 0.1 of the mean diagonal"


def test_the_last_rung_floors_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorization, "DAMPING_STEPS", 1)
    values, vectors = torch.linalg.eigh(gram(32, 100))
    values[:4] = -3 * values.mean()
    H = (vectors * values) @ vectors.T
    H = (H + H.T) / 2
    assert H.diagonal().mean() > 0
    factor, inverse = factor_of(H), inverse_factor(H)
    assert factor is not None and factor.trouble == "eigenvalues floored"
    assert bool(torch.isfinite(factor.L).all()) and inverse is not None and bool(torch.isfinite(inverse).all())
    M = factor.L.double().flip(0, 1)
    torch.testing.assert_close(inverse.double() @ M, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-3)


def test_nothing_but_zeros_has_no_factor() -> None:
    assert factor_of(torch.zeros(8, 8)) is None and inverse_factor(torch.zeros(8, 8)) is None
    assert inverse_factor(torch.full((8, 8), torch.nan)) is None


def test_products_at_full_speed_keep_the_accuracy_of_fp32_and_the_setting_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand((2, 300, 300), generator=generator)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with fast_fp32():
        product = left @ right
    assert settings.fp32_precision == before
    exact = left.double() @ right.double()
    assert float(((product - exact) / exact).abs().max()) < 2e-6


def test_where_bits_would_be_lost_products_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    _onednn_is_exact.cache_clear()
    monkeypatch.setattr("fewbits.fp32_products._close", lambda product, exact: False)
    try:
        settings = torch.backends.mkldnn.matmul
        before = settings.fp32_precision
        with fast_fp32():
            assert settings.fp32_precision == before
    finally:
        _onednn_is_exact.cache_clear()


@pytest.mark.parametrize("width", [100, 576, 700])
def test_the_factor_is_the_same_whatever_the_number_of_threads(width: int) -> None:
    inputs = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0))
    H = inputs.T @ inputs
    before, factors = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        factor = inverse_factor(H)
        assert factor is not None
        factors.append(factor)
    torch.set_num_threads(before)
    assert torch.equal(factors[0], factors[1]) and torch.equal(factors[0], factors[2])
    identity = (
        factors[0].double().T @ factors[0].double() @ (H.double() + 0.01 * H.diagonal().mean() * torch.eye(width))
    )
    assert torch.allclose(identity, torch.eye(width, dtype=torch.float64), atol=1e-3)
