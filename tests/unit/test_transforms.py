"""The searches of AWQ and SmoothQuant against naive sums over tokens."""

from __future__ import annotations

import pytest
import torch

from fewbits.methods import AWQ, QuantMethod, SmoothQuant
from fewbits.search import MINMAX, Search
from fewbits.solvers.rtn import quantize_rows
from fewbits.statistics import StatisticsAccumulator
from fewbits.tensors import decode
from fewbits.transforms import TRANSFORMS
from fewbits.transforms.problem import Rounding, ScaleProblem
from fewbits.transforms.ties import Ties

ROWS, WIDTH, TOKENS = 48, 64, 512


def rounding(method: QuantMethod, search: Search) -> Rounding:
    def rounded(rows: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        shares = None if search.steps == 1 else importance
        return decode(quantize_rows(rows, method, search=search, scale_dtype=torch.float32, importance=shares).weight)

    return rounded


def tokens(seed: int = 0) -> torch.Tensor:
    """Inputs of which a few channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(TOKENS, WIDTH, generator=generator)
    X[:, 3] *= 30
    X[:, 17] *= 12
    return X


def weights(seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def problem(
    method: QuantMethod, X: torch.Tensor | None = None, W: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> ScaleProblem:
    X = tokens() if X is None else X
    gathered = StatisticsAccumulator(WIDTH)
    gathered.add(X)
    return ScaleProblem(
        weights() if W is None else W, gathered.finish(), Ties(torch.arange(WIDTH) if rows is None else rows), X,
        method, rounding(method, MINMAX), rounding(method, Search(11, 0.8)),
    )  # fmt: skip


def loss(of: ScaleProblem, s: torch.Tensor, X: torch.Tensor) -> float:
    """Squared error of the output, token by token."""
    decoded = of.final(of.W * s, of.statistics.gram.diagonal() / s.square())
    return float((X.double() @ (of.W - decoded / s).double().T).square().sum())


def w8a8_loss(of: ScaleProblem, s: torch.Tensor, X: torch.Tensor) -> float:
    decoded = of.final(of.W * s, of.statistics.gram.diagonal())
    scaled = (X / s).double()
    step = scaled.abs().amax(1, keepdim=True) / 127
    return float(((scaled / step).round() * step @ decoded.double().T - X.double() @ of.W.double().T).square().sum())


@pytest.mark.parametrize("method", [AWQ(32), SmoothQuant(), SmoothQuant("auto"), SmoothQuant(0), SmoothQuant(1)])
def test_scales_are_positive_and_finite(method: QuantMethod) -> None:
    s = TRANSFORMS[str(method.transform)](problem(method))
    assert s.shape == (WIDTH,)
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all())


def test_awq_gives_large_channels_more_and_loses_less() -> None:
    of = problem(AWQ(32))
    s = TRANSFORMS["awq"](of)
    assert float(s[3]) > float(s.median())
    assert loss(of, s, tokens()) < 0.8 * loss(of, torch.ones(WIDTH), tokens())


def test_awq_leaves_weights_alone_where_that_is_best() -> None:
    # All weights lie on the grid of their groups already.
    W = torch.randint(0, 16, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0)).float() - 8
    W[:, ::32], W[:, 1::32] = -8, 7
    assert bool((TRANSFORMS["awq"](problem(AWQ(32), W=W)) == 1).all())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_is_its_formula_up_to_one_factor(alpha: float) -> None:
    of = problem(SmoothQuant(alpha))
    s = TRANSFORMS["smoothquant"](of)
    expected = tokens().abs().amax(0) ** alpha / weights().abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(s / s[0], expected / expected[0], rtol=1e-5, atol=0)


def test_auto_is_no_worse_than_every_fixed_alpha() -> None:
    of = problem(SmoothQuant("auto"))
    found = w8a8_loss(of, TRANSFORMS["smoothquant"](of), tokens())
    fixed = [w8a8_loss(of, TRANSFORMS["smoothquant"](problem(SmoothQuant(step / 10))), tokens()) for step in range(11)]
    # What it compares takes rounding for noise, which it is not quite.
    assert found <= 1.03 * min(fixed)
    assert found < 0.5 * w8a8_loss(of, torch.ones(WIDTH), tokens())


@pytest.mark.parametrize("method", [AWQ(32), SmoothQuant(), SmoothQuant("auto")])
def test_channels_never_active_without_weights_or_without_a_producer_are_not_scaled(method: QuantMethod) -> None:
    X, W, rows = tokens(), weights(), torch.arange(WIDTH)
    X[:, 5], W[:, 9], rows[11] = 0, 0, -1
    s = TRANSFORMS[str(method.transform)](problem(method, X, W, rows))
    assert s[[5, 9, 11]].tolist() == [1.0, 1.0, 1.0]
    assert bool(torch.isfinite(s).all())


@pytest.mark.parametrize("method", [AWQ(32), SmoothQuant(), SmoothQuant("auto")])
def test_tied_channels_share_a_scale(method: QuantMethod) -> None:
    rows = torch.arange(WIDTH) % 16
    X = tokens()
    X[:, 5] = 0  # its partners are active
    s = TRANSFORMS[str(method.transform)](problem(method, X, rows=rows))
    assert torch.equal(s.view(4, 16), s[:16].expand(4, 16))
    assert len(s.unique()) > 1


@pytest.mark.parametrize("method", [AWQ(32), SmoothQuant("auto")])
@pytest.mark.parametrize("silent", ["inputs", "weights"])
def test_inputs_or_weights_that_are_all_zero_are_not_scaled(method: QuantMethod, silent: str) -> None:
    X = torch.zeros(TOKENS, WIDTH) if silent == "inputs" else tokens()
    W = torch.zeros(ROWS, WIDTH) if silent == "weights" else weights()
    assert bool((TRANSFORMS[str(method.transform)](problem(method, X, W)) == 1).all())
