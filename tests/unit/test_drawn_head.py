"""The gradient in front of a head, by drawn labels, against autograd over all logits and the Fisher information."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from fewbits import drawn_head
from fewbits.drawn import LABELS, uniforms
from fewbits.drawn_head import DrawnHead
from fewbits.errors import CalibrationError
from fewbits.skeleton import Skeleton
from test_calibrated_pass import skeleton_of
from tiny_transformers import save_tiny


@pytest.fixture(params=["llama", "gemma2"])  # gemma2 bends its logits by a soft cap
def skeleton(request: Any, tmp_path: Path) -> Any:
    with skeleton_of(save_tiny(tmp_path, request.param, torch.float32), torch.float32) as (skeleton, _):
        skeleton.materialize_rest(head=True)
        yield skeleton


def hidden_of(skeleton: Skeleton, tokens: int) -> torch.Tensor:
    width = skeleton.head_linear.in_features if skeleton.head_linear else 0
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))


def jacobian(skeleton: Skeleton, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [vocabulary] of one token, and their derivatives by its hidden state."""

    def logits(row: torch.Tensor) -> torch.Tensor:
        return skeleton.head(row[None, None], BaseModelOutputWithPast)[0, 0]

    return logits(hidden).detach(), torch.autograd.functional.jacobian(logits, hidden)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("tile", [7, 4096])
def test_tiles_give_the_gradient_of_the_drawn_labels_logits(
    skeleton: Skeleton, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_head, "TILE", tile)
    hidden = hidden_of(skeleton, 5)
    labels: list[torch.Tensor] = []
    of = drawn_head.Drawn.of

    def remembered(*args: Any) -> Any:
        state = of(*args)
        labels.append(state)  # type: ignore[arg-type]
        return state

    monkeypatch.setattr(drawn_head.Drawn, "of", remembered)
    head = DrawnHead(skeleton, 3)
    found = head.gradient(hidden, 0, BaseModelOutputWithPast)
    assert head._in_tiles
    (state,) = labels
    for token in range(5):
        _, slopes = jacobian(skeleton, hidden[token])
        drawn = slopes[state.labels[token]]  # type: ignore[attr-defined]
        expected = (drawn[1:].mean(0) - drawn[0]) * (1 - 1 / LABELS) ** 0.5
        assert torch.allclose(found[token], expected, rtol=5e-3, atol=1e-3 * float(slopes.norm()))


def test_a_head_that_looks_at_all_logits_is_differentiated_whole(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = skeleton.head

    def centred(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = plain(*args, **kwargs)
        return logits - logits.mean(-1, keepdim=True) * 2

    monkeypatch.setattr(drawn_head, "TILE", 7)
    hidden = hidden_of(skeleton, 5)
    cut = DrawnHead(skeleton, 3)
    cut.gradient(hidden, 0, BaseModelOutputWithPast)
    monkeypatch.setattr(skeleton, "head", centred)
    head = DrawnHead(skeleton, 3)
    found = head.gradient(hidden, 0, BaseModelOutputWithPast)
    assert cut._in_tiles and not head._in_tiles
    drawn = uniforms(3, 0, 5, 0)
    for token in range(5):
        logits, slopes = jacobian(skeleton, hidden[token])
        labels = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), drawn[token])
        expected = (slopes[labels[1:]].mean(0) - slopes[labels[0]]) * (1 - 1 / LABELS) ** 0.5
        assert torch.allclose(found[token], expected, rtol=5e-3, atol=1e-3 * float(slopes.norm()))


def test_gradients_have_the_fisher_information_of_the_predictions(skeleton: Skeleton) -> None:
    hidden = 3 * hidden_of(skeleton, 1)
    logits, slopes = jacobian(skeleton, hidden[0])
    shares = logits.double().softmax(-1)
    exact = slopes.double().T @ (shares.diag() - shares[:, None] * shares) @ slopes.double()
    repeated = 20_000
    found = DrawnHead(skeleton, 0).gradient(hidden.expand(repeated, -1), 0, BaseModelOutputWithPast).double()
    assert float((found.T @ found / repeated - exact).norm() / exact.norm()) < 0.05
    assert float(found.mean(0).norm()) < 5 * float((exact.trace() / repeated).sqrt())


@pytest.mark.parametrize("cut", [True, False])
def test_predictions_that_are_no_numbers_are_an_error(
    skeleton: Skeleton, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = skeleton.head

    def overflowing(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        logits = plain(hidden, *args).clone()
        # Of the second token; the first is the one that the head is tried on.
        logits[:, 1:2, 3] = float("inf")
        return logits if cut else logits - logits.mean(-1, keepdim=True) * 2

    monkeypatch.setattr(drawn_head, "TILE", 7)
    monkeypatch.setattr(skeleton, "head", overflowing)
    head = DrawnHead(skeleton, 3)
    with pytest.raises(CalibrationError, match="predictions for some token"):
        head.gradient(hidden_of(skeleton, 5), 0, BaseModelOutputWithPast)
    assert head._in_tiles == cut


def test_gradients_do_not_depend_on_how_tokens_are_grouped(skeleton: Skeleton) -> None:
    hidden = hidden_of(skeleton, 6)
    whole = DrawnHead(skeleton, 1).gradient(hidden, 0, BaseModelOutputWithPast)
    head = DrawnHead(skeleton, 1)
    parts = [head.gradient(hidden[start : start + 2], start, BaseModelOutputWithPast) for start in (0, 2, 4)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5 * float(whole.norm()))
