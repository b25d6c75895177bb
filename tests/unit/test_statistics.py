"""The accumulated statistic against NumPy in fp64, whatever the runs in which rows come."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.statistics import StatisticsAccumulator


def rows_of(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, width)
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 33, 128, 129, 300, 1030])
def test_all_parts_are_those_of_fp64(width: int, dtype: torch.dtype) -> None:
    rows = rows_of(700, width, dtype)
    accumulator = StatisticsAccumulator(width)
    for part in torch.split(rows, [1, 300, 0, 399]):
        accumulator.add(part)
    found = accumulator.finish()
    exact = rows.double().numpy()
    # Sums of 700 products in fp32; rounding the rows to bf16 once would miss by a thousand times as much.
    bound = 5e-6 * np.abs(exact).T @ np.abs(exact)
    assert bool((np.abs(found.gram.double().numpy() - exact.T @ exact) <= bound).all())
    assert torch.equal(found.gram, found.gram.T)
    assert np.array_equal(found.absmax.double().numpy(), np.abs(exact).max(0))
    assert found.absmean.numpy() == pytest.approx(np.abs(exact).mean(0), rel=1e-5)
    assert found.tokens == 700 and found.effective_tokens == 700


def test_wide_sums_of_many_rows_are_those_of_fp64() -> None:
    """More than are packed at a time where sums are wide."""
    rows, accumulator = rows_of(2100, 2080, torch.bfloat16), StatisticsAccumulator(2080)
    accumulator.add(rows)
    exact = rows.double()
    bound = 5e-6 * exact.abs().T @ exact.abs()
    assert bool(((accumulator.finish().gram.double() - exact.T @ exact).abs() <= bound).all())


def test_sums_that_take_turns_do_not_meet() -> None:
    """They pack their rows into the same memory."""
    widths = 33, 300, 300, 96
    taking_turns = [StatisticsAccumulator(width) for width in widths]
    rows = [rows_of(700, width, torch.bfloat16, seed) for seed, width in enumerate(widths)]
    for part in (slice(0, 600), slice(600, 700)):
        for accumulator, some in zip(taking_turns, rows, strict=True):
            accumulator.add(some[part])
    for accumulator, some in zip(taking_turns, rows, strict=True):
        alone = StatisticsAccumulator(some.shape[1])
        alone.add(some[:600])
        alone.add(some[600:])
        assert torch.equal(accumulator.finish().gram, alone.finish().gram)


@pytest.mark.parametrize("width", [33, 300])
def test_weights_count_in_the_gram_and_nowhere_else(width: int) -> None:
    rows, weights = rows_of(640, width), torch.rand(640, generator=torch.Generator().manual_seed(3)) ** 4
    weights[::7] = 0
    accumulator = StatisticsAccumulator(width)
    for part, part_weights in zip(torch.split(rows, 200), torch.split(weights, 200), strict=True):
        accumulator.add(part.view(-1, 5, width), part_weights)
    found = accumulator.finish()
    exact, w = rows.double().numpy(), weights.double().numpy()
    bound = 5e-6 * np.abs(exact).T @ (np.abs(exact) * w[:, None])
    assert bool((np.abs(found.gram.double().numpy() - exact.T @ (exact * w[:, None])) <= bound).all())
    assert found.effective_tokens == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert np.array_equal(found.absmax.double().numpy(), np.abs(exact).max(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_only_magnitudes_count_are_in_those_and_not_in_the_gram(dtype: torch.dtype) -> None:
    rows = rows_of(300, 40, dtype)
    accumulator = StatisticsAccumulator(40)
    accumulator.add(rows[:100])
    accumulator.add_magnitudes(rows[100:].view(2, 100, 40))
    found, alone = accumulator.finish(), StatisticsAccumulator(40)
    alone.add(rows[:100])
    assert torch.equal(found.gram, alone.finish().gram)
    assert found.tokens == found.effective_tokens == 100
    assert torch.equal(found.absmax, rows.float().abs().amax(0))
    assert found.absmean.numpy() == pytest.approx(rows.double().abs().mean(0).numpy(), rel=1e-5)
    accumulator = StatisticsAccumulator(40)
    rows[7, 3] = torch.nan
    accumulator.add_magnitudes(rows)
    assert bool(accumulator.finish().absmax[3].isnan())


def weighted_gram(rows: torch.Tensor, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What is found, made whole, and what fp64 finds."""
    accumulator = StatisticsAccumulator(rows.shape[1])
    for part, part_weights in zip(torch.split(rows, 601), torch.split(weights, 601), strict=True):
        accumulator.add(part, part_weights)
    exact = rows.double().numpy()
    return accumulator.finish().gram.double().numpy(), exact.T @ (exact * weights.double().numpy()[:, None])


@pytest.mark.parametrize("width", [1, 47, 49, 300])
def test_weighted_bf16_rows_are_off_by_no_more_than_their_rounding(width: int) -> None:
    rows, weights = rows_of(1201, width, torch.bfloat16), torch.rand(1201, generator=torch.Generator().manual_seed(3))
    found, exact = weighted_gram(rows, weights)
    sizes = rows.double().abs().numpy()
    bound = (2 * 2.0**-9 + 1e-5) * (sizes.T @ (sizes * weights.double().numpy()[:, None]))
    assert bool((np.abs(found - exact) <= bound).all())


def test_rounding_weighted_bf16_rows_adds_some_millionths_of_the_diagonal_and_takes_nothing_away() -> None:
    """Seen where nothing hides it: in directions that no row goes into."""
    generator = torch.Generator().manual_seed(5)
    seen = torch.randint(-7, 8, (6000, 8), generator=generator).float()
    mixed = seen @ torch.randint(-3, 4, (8, 96), generator=generator).float()
    rows, weights = mixed.bfloat16(), torch.rand(6000, generator=generator)
    assert torch.equal(rows.float(), mixed)
    found, exact = weighted_gram(rows, weights)
    unseen = np.linalg.eigh(exact)[1][:, :88]
    added = np.linalg.eigvalsh(unseen.T @ found @ unseen) / np.diag(exact).mean()
    assert added.min() > -1e-6 and added.max() < 5e-6


def test_weights_of_one_change_nothing_and_their_number_must_fit() -> None:
    rows = rows_of(50, 16)
    plain, weighted = StatisticsAccumulator(16), StatisticsAccumulator(16)
    plain.add(rows)
    weighted.add(rows, torch.ones(50))
    assert torch.equal(plain.finish().gram, weighted.finish().gram)
    with pytest.raises(ValueError, match="50 rows of input, but 49 weights"):
        plain.add(rows, torch.ones(49))


def test_nothing_seen_is_all_zeros_and_nan_stays_visible() -> None:
    nothing = StatisticsAccumulator(8).finish()
    assert nothing.tokens == 0 and nothing.effective_tokens == 0 and bool((nothing.gram == 0).all())
    for dtype in (torch.float32, torch.bfloat16):
        poisoned = StatisticsAccumulator(8)
        poisoned.add(torch.tensor([[torch.nan] + [1.0] * 7], dtype=dtype))
        assert poisoned.finish().absmax.isnan().tolist() == [True] + [False] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 1100])
def test_one_thread_and_two_give_the_same_bits(width: int, dtype: torch.dtype) -> None:
    before, grams = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            accumulator = StatisticsAccumulator(width)
            accumulator.add(rows_of(900, width, dtype))
            grams.append(accumulator.finish().gram)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grams)
