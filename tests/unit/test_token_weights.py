"""Token weights keep enough tokens in play, and order."""

import torch

from fewbits.token_weights import capped, effective_tokens, shared_weights


def heavy_tailed(count: int = 4096) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).mul(3).exp()


def test_equal_weights_count_every_token() -> None:
    assert effective_tokens(torch.full((100,), 0.3)) == torch.tensor(100.0)


def test_capping_leaves_the_wanted_number_of_effective_tokens() -> None:
    weights = heavy_tailed()
    assert effective_tokens(weights) < 100
    assert abs(effective_tokens(capped(weights, 1000.0)) - 1000.0) < 1.0


def test_capping_keeps_the_order_and_has_mean_one() -> None:
    weights = heavy_tailed()
    tamed = capped(weights, 500.0)
    order = weights.argsort()
    assert bool((tamed[order].diff() >= 0).all())
    assert abs(tamed.mean().item() - 1) < 1e-5


def test_weights_that_are_even_enough_are_only_scaled() -> None:
    weights = torch.linspace(1, 2, 1000)
    assert torch.allclose(capped(weights, 500.0), weights / weights.mean())


def test_consumers_count_alike_whatever_their_scale() -> None:
    one, other = heavy_tailed(), torch.linspace(1, 2, 4096)
    found = shared_weights([one, other * 1e6], 64)
    expected = capped((one / one.mean() + other / other.mean()) / 2, 128.0)
    assert found is not None and torch.allclose(found, expected)


def test_too_few_tokens_or_no_importance_mean_plain_statistics() -> None:
    assert shared_weights([heavy_tailed()], 2048) is None
    assert shared_weights([torch.zeros(4096)], 64) is None
