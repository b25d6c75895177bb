"""Token weights keep enough tokens in play, and order."""

import torch

from fewbits.token_weights import shared_weights


def heavy_tailed(count: int = 4096) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).mul(3).exp()


def effective_tokens(weights: torch.Tensor) -> float:
    return float(weights.double().sum() ** 2 / weights.double().square().sum())


def test_weights_keep_the_order_of_importance_and_have_mean_one() -> None:
    importance = heavy_tailed()
    weights = shared_weights([importance])
    assert weights is not None
    assert bool((weights[importance.argsort()].diff() >= 0).all())
    assert abs(weights.mean().item() - 1) < 1e-5


def test_a_token_of_four_times_the_importance_counts_twice() -> None:
    weights = shared_weights([torch.tensor([1.0, 4.0, 0.0, 16.0])])
    assert weights is not None
    assert torch.allclose(weights / weights[0], torch.tensor([1.0, 2.0, 0.0, 4.0]))


def test_no_handful_of_tokens_makes_up_the_gram() -> None:
    importance = heavy_tailed()
    weights = shared_weights([importance])
    assert weights is not None
    assert effective_tokens(importance) < 100 < 4 * effective_tokens(importance) < effective_tokens(weights)


def test_consumers_count_alike_whatever_their_scale() -> None:
    one, other = heavy_tailed(), torch.linspace(1, 2, 4096)
    found, same = shared_weights([one, other * 1e6]), shared_weights([one * 1e-3, other])
    assert found is not None and same is not None
    assert torch.allclose(found, same)


def test_no_importance_means_plain_statistics() -> None:
    assert shared_weights([torch.zeros(4096)]) is None
    alone, beside = shared_weights([heavy_tailed()]), shared_weights([heavy_tailed(), torch.zeros(4096)])
    assert alone is not None and beside is not None
    assert torch.equal(alone, beside)
