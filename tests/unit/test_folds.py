"""Folds: found on every architecture, refused where something else hangs on the producer, and changing no logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from fewbits.absorbing import FileEdits, FoldPlace, absorb
from fewbits.calibrate import run_blocks
from fewbits.checkpoints.reader import TensorReader, open_checkpoint
from fewbits.folds import Fold, Refused, find_folds
from fewbits.layers import LinearLayer, find_layers
from fewbits.probing import ProbedBlock
from fewbits.skeleton import Skeleton, build_model
from fewbits.statistics import Statistics
from fewbits.watching import Slot
from tiny_transformers import ARCHITECTURES, BLOCKS, GATED, save_tiny, token_ids, whole_model

WIDTH = 16
# Inputs of one dense block that a fold serves: q/k/v, o, gate/up (or up) and down; four where none is refused.
FOLDS_BY_ARCHITECTURE = {
    "llama": 4, "qwen2": 4, "qwen3": 4, "mistral": 4, "gemma2": 4, "gemma3": 4, "phi3": 4, "glm4": 4,
    "opt": 4,  # relu lets positive scales through
    "gpt2": 3, "gpt_neox": 3,  # gelu does not
    "olmo2": 2,  # no norm before its linears
    "mixtral": 2 + 4, "qwen3_moe": 2 + 4,  # the norm before experts feeds the router as well
}  # fmt: skip


class Smoothing:
    """Scales every input that a fold serves at random, and keeps what the files would hold; rounds nothing.

    enough: tokens that a Gram is to have.
    """

    def __init__(self, read: Callable[[str], torch.Tensor], enough: int | None = None) -> None:
        self.enough = enough
        self.statistics: list[Statistics] = []
        self.edits = FileEdits(read, {}, {})
        self.folds: list[FoldPlace] = []
        self.generator = torch.Generator().manual_seed(0)

    def wants(self, layers: Sequence[LinearLayer]) -> bool:
        return True

    def tokens_for_gram(self, layers: Sequence[LinearLayer]) -> int | None:
        return self.enough

    def solve(
        self,
        layers: Sequence[LinearLayer],
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        place: FoldPlace,
        sample: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        self.statistics.append(statistics)
        by_row = torch.exp(torch.randn(4096, generator=self.generator))
        s = absorb(place, torch.where(place.fold.rows >= 0, by_row[place.fold.rows], 1.0), self.edits).inputs
        assert float((s / s[0] - 1).abs().max()) > 0.1
        for layer in layers:
            stored = self.edits.stored(layer.tensor)
            self.edits.tensors[layer.tensor] = stored * (s[:, None] if layer.transposed else s)
        self.folds.append(place)
        return [None] * len(layers)


def smoothed(path: Path, memory_limit: int | None = None, **options: Any) -> Smoothing:
    checkpoint = open_checkpoint(path)
    found, _ = find_layers(checkpoint.headers, checkpoint.config)
    layers = [layer for layer in found if layer.default_skip is None and layer.block is not None]
    with TensorReader(checkpoint) as reader:
        skeleton = Skeleton(build_model(path, torch.float32), checkpoint, reader)
        smoothing = Smoothing(reader.read, options.pop("enough", None))
        for _ in run_blocks(
            skeleton, token_ids(4, 56), layers, lambda layers, weights, statistics: [None] * len(layers),
            folding=smoothing, memory_limit=memory_limit, folder=path, **options,
        ):  # fmt: skip
            pass
        tensors = {name: smoothing.edits.stored(name) for name in checkpoint.tensors}
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return smoothing


@pytest.mark.parametrize("architecture", FOLDS_BY_ARCHITECTURE)
def test_smoothing_alone_changes_no_logits(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "glm4", ("Glm4Config", GATED | {"head_dim": 8}))
    path = save_tiny(tmp_path, architecture, torch.float32)
    ids = token_ids(2, 24, seed=1)
    with torch.no_grad():
        before = whole_model(path, torch.float32)(ids).logits
        smoothing = smoothed(path)
        after = whole_model(path, torch.float32)(ids).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    first_block = [place for place in smoothing.folds if ".0." in place.parts[0].tensor.partition("expert")[0]]
    assert len(first_block) == FOLDS_BY_ARCHITECTURE[architecture]


def test_smoothing_changes_no_logits_where_states_wait_in_a_file(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "llama", torch.float32)
    ids = token_ids(2, 24, seed=1)
    with torch.no_grad():
        before = whole_model(path, torch.float32)(ids).logits
        assert len(smoothed(path, memory_limit=0).folds) == 4 * BLOCKS
        after = whole_model(path, torch.float32)(ids).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4


def test_a_gram_that_only_ranks_has_a_part_of_the_tokens_and_the_maxima_have_all(tmp_path: Path) -> None:
    whole = smoothed(save_tiny(tmp_path / "whole", "llama", torch.float32), micro_batch=1).statistics[0]
    part = smoothed(save_tiny(tmp_path / "part", "llama", torch.float32), micro_batch=1, enough=57).statistics[0]
    assert (whole.tokens, part.tokens) == (4 * 56, 2 * 56)
    assert torch.equal(whole.absmax, part.absmax) and torch.allclose(whole.absmean, part.absmean)
    assert float((2 * part.gram - whole.gram).norm() / whole.gram.norm()) < 0.5


class Norm(nn.Module):
    def __init__(self, weight: torch.Tensor, offset: float = 0.0, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = x / x.square().mean(-1, keepdim=True).sqrt() * (self.weight + self.offset)
        return normal if self.bias is None else normal + self.bias


class Block(nn.Module):
    """A norm, two linears and whatever lies between and beside them."""

    def __init__(
        self, norm: Norm, between: Callable[[torch.Tensor], Any], beside: Callable[[torch.Tensor], Any]
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.between, self.beside = norm, between, beside
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = self.norm(x)
        return x + self.down(self.between(self.up(normal))) + self.beside(normal)


def nothing(x: torch.Tensor) -> float:
    return 0.0


def found_in_input() -> torch.Tensor:
    return torch.randn(2, 80, WIDTH, generator=torch.Generator().manual_seed(1))


def found_in(block: nn.Module, groups: Sequence[tuple[Slot, ...]] = ()) -> tuple[list[Fold], list[Refused]]:
    x = found_in_input()
    with (
        torch.no_grad(),
        ProbedBlock(block, lambda arguments: block(*arguments[0], **arguments[1]), ((x,), {})) as probed,
    ):
        return find_folds(probed, groups or [(Slot("up.weight"),), (Slot("down.weight"),)])


def test_a_norm_and_a_linear_take_scales_up() -> None:
    folds, refused = found_in(Block(Norm(torch.rand(WIDTH) + 0.5), torch.relu, nothing))
    assert [(fold.producer.parameter, fold.norm_offset, fold.bias) for fold in folds] == [
        ("norm.weight", 0.0, None),
        ("up.weight", None, "up.bias"),
    ]
    assert refused == []


def test_an_activation_that_scales_do_not_pass_leaves_no_fold() -> None:
    folds, refused = found_in(Block(Norm(torch.ones(WIDTH)), silu, nothing))
    assert [fold.producer.parameter for fold in folds] == ["norm.weight"]
    assert [(refusal.consumers, refusal.why) for refusal in refused] == [
        ((Slot("down.weight"),), "nothing before it can take its scales up")
    ]


@pytest.mark.parametrize("beside", [lambda normal: normal, lambda normal: 0.01 * normal.softmax(-1)])
def test_a_norm_whose_output_goes_elsewhere_as_well_is_refused(beside: Callable[[torch.Tensor], torch.Tensor]) -> None:
    folds, refused = found_in(Block(Norm(torch.ones(WIDTH)), torch.relu, beside))
    assert [fold.producer.parameter for fold in folds] == ["up.weight"]
    assert [refusal.why for refusal in refused] == [
        "scaling norm.weight changes the block's output: something else uses it as well"
    ]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_kind_of_a_norm_shows_even_where_its_weights_are_plain(offset: float) -> None:
    folds, _ = found_in(Block(Norm(torch.full((WIDTH,), 1 - offset), offset), torch.relu, nothing))
    assert folds[0].norm_offset == offset


def test_a_norm_of_neither_kind_is_refused() -> None:
    folds, _ = found_in(Block(Norm(torch.full((WIDTH,), 0.3), 0.5), torch.relu, nothing))
    assert [fold.producer.parameter for fold in folds] == ["up.weight"]


def test_a_row_whose_sum_nearly_cancels_is_followed_all_the_same() -> None:
    """All tokens look at the first one, where this row's sum is a thousandth of its terms: fp32 leaves it 4 digits."""
    norm = Norm(torch.ones(WIDTH))
    block = Block(norm, lambda up: up[:, :1].expand_as(up), nothing)
    with torch.no_grad():
        first = norm(found_in_input()[:1, :1])[0, 0]
        row = block.up.weight[3]
        row -= (1 - 1e-4) * (row @ first) / (first @ first) * first
        block.up.bias[3] = 0.0
    folds, refused = found_in(block)
    assert refused == []
    assert folds[1].rows.tolist() == list(range(2 * WIDTH))


def test_channels_that_are_always_zero_are_left_out() -> None:
    weight = torch.ones(WIDTH)
    weight[[2, 7]] = 0
    block = Block(Norm(weight), torch.relu, nothing)
    with torch.no_grad():
        block.up.weight[5], block.up.bias[5] = 0, -1.0
    folds, _ = found_in(block)
    assert (folds[0].rows < 0).nonzero().flatten().tolist() == [2, 7]
    assert int(folds[1].rows[5]) == -1
    assert folds[1].rows[[0, 1, 31]].tolist() == [0, 1, 31]


def test_an_input_that_is_always_zero_is_refused_as_such() -> None:
    _, refused = found_in(Block(Norm(torch.zeros(WIDTH)), torch.relu, nothing), [(Slot("up.weight"),)])
    assert [refusal.why for refusal in refused] == ["its input is zero at every token"]


def test_a_block_where_nothing_can_be_folded_says_so_for_each_input() -> None:
    folds, refused = found_in(Block(Norm(torch.ones(WIDTH)), silu, lambda normal: normal))
    assert folds == []
    assert len(refused) == 2


def test_what_the_probe_does_not_reach_is_refused() -> None:
    _, refused = found_in(
        Block(Norm(torch.ones(WIDTH)), torch.relu, nothing), [(Slot("up.weight"),), (Slot("expert.weight"),)]
    )
    assert refused == [Refused((Slot("expert.weight"),), "no token of the probe reached it")]


def test_the_block_is_as_it_was_after_the_probe() -> None:
    block = Block(Norm(torch.rand(WIDTH)), torch.relu, nothing).to(torch.bfloat16)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in block.named_parameters()}
    found_in(block)
    for name, parameter in block.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
