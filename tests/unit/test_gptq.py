"""GPTQ against a naive loop that inverts H again for every column, and against what algebra says of it."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from fewbits.numerics import MINMAX, best_grid
from fewbits.schemes import Scheme
from fewbits.solvers.gptq import solve
from fewbits.solvers.gptq_options import DEFAULTS, GptqOptions
from fewbits.solvers.solution import Solution

N, K, GROUP = 24, 64, 16
SCHEMES = [
    Scheme("int", bits, symmetric, group)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group in (GROUP, 0)
]
BF16 = torch.bfloat16


def plainest(**options: object) -> GptqOptions:
    """The sweep and nothing beside it: no scales tried by sweeping, no steps after it."""
    known = {field.name for field in fields(GptqOptions)}
    plain = {name: value for name, value in {"swept": None, "passes": 0}.items() if name in known}
    return GptqOptions(**(plain | options))  # type: ignore[arg-type]


def weight(seed: int = 0, rows: int = N) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def gram(seed: int = 1, tokens: int = 256) -> torch.Tensor:
    """Of correlated channels that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, K, generator=generator) @ torch.randn(K, K, generator=generator)
    inputs = mixed * torch.rand(K, generator=generator).add_(0.1)
    return inputs.T @ inputs


def naive(
    W: np.ndarray, H: np.ndarray, order: list[int], scales: np.ndarray, zeros: np.ndarray, top: int, damping: float
):  # type: ignore[no-untyped-def]
    """Optimal brain quantization in a fixed order: after each column, the best update of all that are left."""
    W = W.copy()
    H = H + np.eye(len(H)) * damping * np.diag(H).mean()
    codes = np.zeros(W.shape)
    group = W.shape[1] // scales.shape[1]
    for place, column in enumerate(order):
        left = order[place:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        scale, zero = scales[:, column // group], zeros[:, column // group]
        codes[:, column] = np.clip(np.rint(W[:, column] / scale) + zero, 0, top)
        error = (W[:, column] - (codes[:, column] - zero) * scale) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0][None, :]
    return codes


def grid_of(solution: Solution, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    scales = solution.scales.double().numpy()
    zeros = np.full_like(scales, scheme.midpoint) if solution.zeros is None else solution.zeros.double().numpy()
    return scales, zeros


def group_order(H: torch.Tensor, group: int) -> list[int]:
    """Groups by their largest diagonal, channels by theirs within one, largest first."""
    diagonal = H.diagonal().tolist()
    groups = [sorted(range(start, start + group), key=lambda i: -diagonal[i]) for start in range(0, K, group)]
    return [channel for members in sorted(groups, key=lambda members: -diagonal[members[0]]) for channel in members]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_a_loop_that_inverts_again_for_every_column(scheme: Scheme, ordered: bool) -> None:
    W, H = weight(), gram()
    # Plain rounding takes over where it is better, which the loop knows nothing of: 2 bits are compared by error.
    solution = solve(W, scheme, torch.float32, H, plainest(ordered=ordered))
    order = group_order(H, scheme.group_size or K) if ordered else list(range(K))
    scales, zeros = grid_of(solution, scheme)
    expected = naive(W.double().numpy(), H.double().numpy(), order, scales, zeros, scheme.largest_code, 0.01)
    same = expected == solution.codes.numpy()
    rows = same.all(1)
    # A weight within fp32's error of a half may fall on the other side, after which its row goes its own way.
    assert rows.mean() > (0.6 if scheme.bits == 2 else 0.85), rows.mean()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_multiple_of_the_identity_makes_it_plain_rounding(scheme: Scheme) -> None:
    W = weight()
    options = plainest(search=MINMAX)
    found = solve(W, scheme, BF16, 7.0 * torch.eye(K), options)
    scales, zeros = best_grid(W, scheme, BF16, MINMAX)
    grouped = W.view(N, scales.shape[1], -1)
    codes = (grouped * (1 / scales.float())[..., None]).round() + zeros.float()[..., None]
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes, codes.clamp(0, scheme.largest_code).to(torch.uint8).view(N, K))
    assert found.output_error is not None
    assert torch.allclose(found.output_error, 7.0 * found.squared_error, rtol=1e-3)


@pytest.mark.parametrize("options", [DEFAULTS, plainest()], ids=["defaults", "plainest"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_errors_told_are_those_of_what_is_decoded(scheme: Scheme, options: GptqOptions) -> None:
    W, H = weight(), gram()
    found = solve(W, scheme, BF16, H, options)
    scales, zeros = grid_of(found, scheme)
    grouped = found.codes.numpy().reshape(N, scales.shape[1], -1) - zeros[..., None]
    decoded = (grouped * scales[..., None]).reshape(N, K)
    assert np.allclose(found.decoded.numpy(), decoded, rtol=1e-6, atol=0)
    missed = W.double().numpy() - decoded
    assert found.squared_error.numpy() == pytest.approx((missed**2).sum(1), rel=1e-4)
    assert found.squared_norm.numpy() == pytest.approx((W.double().numpy() ** 2).sum(1), rel=1e-5)
    exact = H.double().numpy()
    norm = np.einsum("ni,ij,nj->n", W.double().numpy(), exact, W.double().numpy())
    error = np.einsum("ni,ij,nj->n", missed, exact, missed)
    assert found.output_norm is not None and found.output_error is not None
    assert found.output_norm.numpy() == pytest.approx(norm, rel=1e-4)
    assert found.output_error.numpy() == pytest.approx(error, rel=2e-2, abs=1e-6 * float(norm.mean()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_ends_worse_than_plain_rounding(scheme: Scheme) -> None:
    W, H = weight(), gram()
    found = solve(W, scheme, BF16, H)
    scales, zeros = best_grid(W, scheme, BF16, DEFAULTS.search, H.diagonal())
    grouped = W.view(N, scales.shape[1], -1)
    codes = (grouped / scales.float()[..., None]).round() + zeros.float()[..., None]
    offset = codes.clamp(0, scheme.largest_code) - zeros.float()[..., None]
    missed = (W - (offset * scales.float()[..., None]).view(N, K)).double()
    plain = ((missed @ H.double()) * missed).sum(1)
    assert found.output_error is not None
    assert bool((found.output_error <= plain * (1 + 1e-3)).all())
    assert found.output_error.sum() < 0.9 * plain.sum()


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all rows but a few are equal: products of other sizes sum in another order, and a weight within fp32's
    error of a half may fall on either side."""
    return bool((one == other).all(1).float().mean() > 0.95)


@pytest.mark.parametrize("options", [DEFAULTS, plainest()], ids=["defaults", "plainest"])
def test_consumers_of_one_input_may_be_stacked_and_rows_come_in_any_order(options: GptqOptions) -> None:
    H, scheme = gram(), Scheme("int", 4, False, GROUP)
    parts = [weight(1, 7), weight(2, 130), weight(3, 64)]
    stacked = solve(torch.cat(parts), scheme, BF16, H, options)
    separate = [solve(part, scheme, BF16, H, options) for part in parts]
    assert alike(stacked.codes, torch.cat([part.codes for part in separate]))
    assert alike(stacked.scales, torch.cat([part.scales for part in separate]))
    permutation = torch.randperm(201, generator=torch.Generator().manual_seed(4))
    turned = solve(torch.cat(parts)[permutation], scheme, BF16, H, options)
    assert alike(turned.codes, stacked.codes[permutation])


@pytest.mark.parametrize("scheme", [Scheme("int", 4, True, GROUP), Scheme("int", 4, False, GROUP)], ids=str)
def test_rows_may_be_solved_in_parts(monkeypatch: pytest.MonkeyPatch, scheme: Scheme) -> None:
    W, H = weight(rows=300), gram()
    whole = solve(W, scheme, BF16, H)
    monkeypatch.setattr("fewbits.solvers.gptq.ROW_NUMBERS", 1)
    parts = solve(W.bfloat16().float(), scheme, BF16, H)
    again = solve(W.bfloat16(), scheme, BF16, H)
    assert alike(solve(W, scheme, BF16, H).codes, whole.codes) and alike(parts.codes, again.codes)
    assert whole.output_error is not None and parts.output_norm is not None
    assert parts.output_norm.shape == whole.output_error.shape == (300,)


@pytest.mark.parametrize("tokens", [4, 256])
def test_a_gram_that_may_be_written_over_gives_the_same_solution(tokens: int) -> None:
    W, H, scheme = weight(), gram(tokens=tokens), Scheme("int", 4, False, GROUP)
    given = H.clone()
    kept = solve(W, scheme, BF16, H)
    assert torch.equal(H, given)
    spent = solve(W, scheme, BF16, H, keep_gram=False)
    assert torch.equal(spent.codes, kept.codes) and torch.equal(spent.scales, kept.scales)
    assert kept.output_error is not None and spent.output_error is not None
    assert torch.equal(spent.output_error, kept.output_error)


def test_blocks_of_columns_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H, scheme = weight(), gram(), Scheme("int", 4, True, 0)
    whole = solve(W, scheme, torch.float32, H, plainest())
    monkeypatch.setattr("fewbits.kernels.feedback.BLOCK", 32)
    blocked = solve(W, scheme, torch.float32, H, plainest())
    assert (whole.codes == blocked.codes).float().mean() > 0.99


def test_channels_that_were_never_active_are_rounded_plainly() -> None:
    H, scheme = gram(), Scheme("int", 4, True, GROUP)
    dead = [3, 17, 40]
    H[dead] = 0
    H[:, dead] = 0
    W = weight()
    found = solve(W, scheme, torch.float32, H)
    assert found.notes == ()
    step = found.scales.abs()[:, [column // GROUP for column in dead]]
    assert bool(((found.decoded - W)[:, dead].abs() <= 0.5 * step * (1 + 1e-5) + 0.21 * 8 * step).all())
    silent = solve(W, scheme, torch.float32, torch.zeros(K, K))
    assert bool(torch.isfinite(silent.decoded).all())


@pytest.mark.parametrize("tokens", [1, 4, K - 1])
def test_fewer_tokens_than_channels_still_give_finite_weights(tokens: int) -> None:
    found = solve(weight(), Scheme("int", 4, False, GROUP), BF16, gram(tokens=tokens))
    assert bool(torch.isfinite(found.decoded).all())
    assert found.output_error is not None and bool((found.output_error >= 0).all())


def test_a_statistic_that_cannot_be_factored_is_noted() -> None:
    H = gram()
    indefinite = H - 2 * H.diagonal().mean() * torch.eye(K)
    indefinite.diagonal().abs_()
    found = solve(weight(), Scheme("int", 4, True, GROUP), BF16, indefinite)
    assert len(found.notes) == 1
    assert found.notes[0][0] in ("solved with a doctored statistic", "rounded plainly")
    assert bool(torch.isfinite(found.decoded).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_make_no_difference(threads: int) -> None:
    W, H, scheme = weight(rows=300), gram(), Scheme("int", 3, False, GROUP)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(W, scheme, BF16, H)
        torch.set_num_threads(threads)
        several = solve(W, scheme, BF16, H)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.codes, several.codes) and torch.equal(one.scales, several.scales)
