"""Rows in turn, against a loop that inverts G again for every row, and by the loss that it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.solvers import coupled
from fewbits.solvers.coupled import Grid, solve_in_turn
from fewbits.solvers.gptq import solve

K = 32
SCHEME = Scheme("int", 4, False, 16)
STEP, ZERO = 0.25, 8


def spread(seed: int, size: int, samples: int) -> torch.Tensor:
    """The Gram of correlated channels that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, size, generator=generator) @ torch.randn(size, size, generator=generator)
    mixed *= torch.rand(size, generator=generator).add_(0.1)
    return mixed.T @ mixed


def weight(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def rounded(W: torch.Tensor) -> Grid:
    """To the nearest multiple of a fixed step."""
    codes = (W / STEP).round().add(ZERO).clamp(0, 15).to(torch.uint8)
    groups = (len(W), K // SCHEME.group_size)
    return codes, torch.full(groups, STEP), torch.full(groups, ZERO, dtype=torch.uint8)


def naive(W: np.ndarray, G: np.ndarray, rows: int) -> np.ndarray:
    """Round rows of the largest G first, `rows` at a time; the others miss by −G_rr⁻¹ G_rb E_b."""
    W = W.copy()
    damped = G + np.eye(len(G)) * coupled.DAMPING * np.diag(G).mean()
    order = np.argsort(-np.diag(G), kind="stable")
    decoded = np.zeros_like(W)
    for start in range(0, len(order), rows):
        now, later = order[start : start + rows], order[start + rows :]
        decoded[now] = (np.clip(np.rint(W[now] / STEP) + ZERO, 0, 15) - ZERO) * STEP
        if len(later):
            best = -np.linalg.inv(damped[np.ix_(later, later)]) @ damped[np.ix_(later, now)] @ (W[now] - decoded[now])
            W[later] -= best
    return decoded


def rounded_and_missed(rows: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    grid = rounded(rows)
    return grid, rows - decode_codes(*grid, SCHEME)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_it_is_the_loop_that_inverts_again_for_every_step(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(coupled, "ROWS", rows)
    W, couplings = weight(36), [spread(1, 24, 96), spread(2, 12, 96)]
    found = decode_codes(*solve_in_turn(W, couplings, coupled.DAMPING, rounded_and_missed), SCHEME)
    pairs = zip(W.split([24, 12]), couplings, strict=True)
    parts = [naive(part.double().numpy(), G.double().numpy(), rows) for part, G in pairs]
    expected = torch.from_numpy(np.concatenate(parts)).float()
    assert (found == expected).float().mean() > 0.99
    if rows < 24:
        assert not torch.equal(found, decode_codes(*rounded(W), SCHEME))


def loss(W: torch.Tensor, decoded: torch.Tensor, G: torch.Tensor, H: torch.Tensor) -> float:
    E = (W - decoded).double()
    return float((G.double() @ E @ H.double() * E).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coupled_rows_lose_less_than_rows_on_their_own(bits: int, symmetric: bool) -> None:
    W, G, H, scheme = weight(256), spread(3, 256, 2048), spread(4, K, 512), Scheme("int", bits, symmetric, 16)
    alone = solve(W, scheme, torch.bfloat16, H)
    together = solve(W, scheme, torch.bfloat16, H, couplings=[G])
    assert loss(W, together.decoded, G, H) < 0.8 * loss(W, alone.decoded, G, H)


def test_the_errors_told_are_those_of_the_weight_that_was_given() -> None:
    W, G, H = weight(200), spread(3, 200, 1024), spread(4, K, 512)
    found = solve(W, SCHEME, torch.bfloat16, H, couplings=[G])
    E = (W - found.decoded).double()
    assert found.output_error is not None and found.output_norm is not None
    assert torch.allclose(found.squared_error, E.square().sum(1))
    assert torch.allclose(found.output_error, ((E @ H.double()) * E).sum(1), rtol=1e-4)
    assert torch.allclose(found.output_norm, ((W.double() @ H.double()) * W).sum(1), rtol=1e-4)


@pytest.mark.parametrize("G", [torch.eye(130), torch.zeros(130, 130)], ids=["identity", "no gradient"])
def test_outputs_that_are_not_coupled_are_solved_as_they_were(G: torch.Tensor) -> None:
    W, H = weight(130), spread(4, K, 512)
    found, alone = solve(W, SCHEME, torch.bfloat16, H, couplings=[G]), solve(W, SCHEME, torch.bfloat16, H)
    # Rows are taken in other parts, whose products sum in another order.
    assert (found.codes == alone.codes).all(1).float().mean() > 0.95


def test_outputs_without_any_gradient_do_not_spoil_the_others() -> None:
    W, G, H = weight(130), spread(3, 130, 512), spread(4, K, 512)
    G[[0, 64, 129]] = 0
    G[:, [0, 64, 129]] = 0
    found = solve(W, SCHEME, torch.bfloat16, H, couplings=[G])
    assert bool(torch.isfinite(found.decoded).all())
    assert loss(W, found.decoded, G, H) < loss(W, solve(W, SCHEME, torch.bfloat16, H).decoded, G, H)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_make_no_difference(threads: int) -> None:
    W, G, H = weight(300), spread(3, 300, 1024), spread(4, K, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(W, SCHEME, torch.bfloat16, H, couplings=[G])
        torch.set_num_threads(threads)
        several = solve(W, SCHEME, torch.bfloat16, H, couplings=[G])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.codes, several.codes) and torch.equal(one.scales, several.scales)
