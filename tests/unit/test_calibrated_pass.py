"""The streamed, suspended pass against the whole model as transformers runs it, for many architectures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fewbits import calibrate
from fewbits.calibrate import BlockDone, micro_batch_size, run_blocks
from fewbits.checkpoints.reader import TensorReader, open_checkpoint
from fewbits.coupled_runs import coupled_runs
from fewbits.drawn import LABELS, uniforms
from fewbits.importance import measure_importance
from fewbits.layers import LinearLayer, find_layers
from fewbits.output_grams import split
from fewbits.skeleton import Skeleton, build_model
from fewbits.states import load_states
from fewbits.statistics import Statistics
from tiny_transformers import ARCHITECTURES, save_tiny, tiny_model, token_ids, whole_model

SAMPLES, LENGTH, MICRO_BATCH = 5, 12, 2
IDS = token_ids(SAMPLES, LENGTH)
EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")


@dataclass
class Pass:
    """What one streamed pass did: calls of `solve` in order, notes, and what the last block returned."""

    calls: list[tuple[tuple[LinearLayer, ...], Statistics | None]] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)
    outputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)


def coarse(weight: torch.Tensor) -> torch.Tensor:
    """A rounding that changes every result, and is simple enough to be repeated on the whole model."""
    return ((weight.float() * 8).round() / 8).to(weight.dtype)


@contextmanager
def skeleton_of(path: Path, dtype: torch.dtype) -> Iterator[tuple[Skeleton, list[LinearLayer]]]:
    checkpoint = open_checkpoint(path)
    layers, _ = find_layers(checkpoint.headers, checkpoint.config)
    with TensorReader(checkpoint) as reader:
        chosen = [layer for layer in layers if layer.block is not None and layer.default_skip is None]
        yield Skeleton(build_model(path, dtype), checkpoint, reader), chosen


def run_pass(path: Path, *, rounding: bool, ids: torch.Tensor = IDS, **options: Any) -> Pass:
    seen = Pass()

    def solve(
        layers: Sequence[LinearLayer], weights: Sequence[torch.Tensor], statistics: Statistics | None
    ) -> list[torch.Tensor | None]:
        seen.calls.append((tuple(layers), statistics))
        return [coarse(weight) if rounding else None for weight in weights]

    with skeleton_of(path, torch.bfloat16) as (skeleton, layers):
        for done in run_blocks(skeleton, ids, layers, solve, micro_batch=MICRO_BATCH, **options):
            seen.outputs[done.block] = outputs_of(done)
            seen.notes += done.notes
    return seen


def outputs_of(done: BlockDone) -> list[torch.Tensor]:
    forward = done._forward
    return [forward.hidden_behind(done.block, micro_batch).clone() for micro_batch in forward.micro_batches]


def matrix(whole: PreTrainedModel, layer: LinearLayer) -> torch.Tensor:
    """The rows of the whole model's parameter that a layer of the files became."""
    found = EXPERT.fullmatch(layer.name)
    if found is None:
        return whole.get_parameter(layer.tensor)
    stack = whole.get_parameter(
        f"{found[1]}.mlp.experts.{'down' if found[3] in ('w2', 'down_proj') else 'gate_up'}_proj"
    )
    rows = stack[int(found[2])]
    half = len(rows) // 2
    return {"w1": rows[:half], "gate_proj": rows[:half], "w3": rows[half:], "up_proj": rows[half:]}.get(found[3], rows)


def stacked(whole: PreTrainedModel, layers: Sequence[LinearLayer]) -> torch.Tensor:
    """The weights of layers one below the other, [rows, in]."""
    return torch.cat(
        [matrix(whole, layer).T if layer.transposed else matrix(whole, layer) for layer in layers]
    ).double()


class InputsOf(TorchFunctionMode):
    """Gathers the inputs that are multiplied by one matrix of a plain model, wherever that happens."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._place, self._width = weight.data_ptr(), weight.numel()
        self.rows: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        position = {torch.nn.functional.linear: 0, torch.addmm: 1}.get(func)
        if position is not None:
            inputs, weight = args[position : position + 2]
            begin = weight.data_ptr()
            if begin <= self._place < begin + weight.numel() * weight.element_size():
                self.rows.append(inputs.detach().reshape(-1, inputs.shape[-1]).double())
        return func(*args, **kwargs)


@torch.no_grad()
def run_whole(whole: PreTrainedModel, ids: torch.Tensor = IDS) -> None:
    for part in torch.split(ids, MICRO_BATCH):
        whole(input_ids=part, use_cache=False)


@torch.no_grad()
def block_outputs(whole: PreTrainedModel, blocks: str) -> list[list[torch.Tensor]]:
    outputs: list[list[torch.Tensor]] = []
    for block in whole.get_submodule(blocks).children():
        outputs.append([])
        block.register_forward_hook(
            lambda module, args, output, kept=outputs[-1]: kept.append(
                (output if isinstance(output, torch.Tensor) else output[0]).clone()
            )
        )
    run_whole(whole)
    return outputs


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small take longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param) / "model", request.param)


def blocks_of(path: Path) -> str:
    with skeleton_of(path, torch.bfloat16) as (skeleton, _):
        return skeleton.block_names[0].rpartition(".")[0]


def test_streamed_blocks_return_what_those_of_the_whole_model_do_bit_for_bit(checkpoint: Path) -> None:
    seen = run_pass(checkpoint, rounding=False)
    expected = block_outputs(whole_model(checkpoint), blocks_of(checkpoint))
    assert len(expected) == len(seen.outputs) == 2
    for block, outputs in seen.outputs.items():
        assert all(map(torch.equal, outputs, expected[block]))


def test_states_in_mapped_files_make_no_difference(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_pass(checkpoint, rounding=True)
    monkeypatch.setattr("fewbits.calibrate.PAGED_BYTES", 0)
    paged = run_pass(checkpoint, rounding=True, folder=tmp_path)
    for (layers, expected), (again, found) in zip(plain.calls, paged.calls, strict=True):
        assert layers == again and expected is not None and found is not None
        assert torch.equal(expected.gram, found.gram)
    assert all(map(torch.equal, plain.outputs[1], paged.outputs[1]))
    assert not list(tmp_path.iterdir())


def test_statistics_are_those_of_a_whole_model_whose_earlier_linears_are_quantized(checkpoint: Path) -> None:
    seen = run_pass(checkpoint, rounding=True)
    whole = whole_model(checkpoint)
    assert not seen.notes
    for layers, statistics in seen.calls:
        assert statistics is not None
        with InputsOf(matrix(whole, layers[0])) as inputs:
            run_whole(whole)
        rows = torch.cat(inputs.rows)
        assert statistics.tokens == len(rows)
        assert torch.equal(statistics.absmax.double(), rows.abs().amax(0))
        assert torch.allclose(statistics.absmean.double(), rows.abs().mean(0), rtol=1e-5)
        exact = rows.T @ rows
        bound = 1e-6 * rows.abs().T @ rows.abs()  # what fp32 sums of these products may be off by
        assert bool(((statistics.gram.double() - exact).abs() <= bound).all())
        with torch.no_grad():
            for layer in layers:
                matrix(whole, layer).copy_(coarse(matrix(whole, layer)))
    final = block_outputs(whole, blocks_of(checkpoint))[-1]
    assert all(map(torch.equal, seen.outputs[1], final))


def test_every_linear_is_solved_once_and_with_all_that_share_its_input(checkpoint: Path) -> None:
    seen = run_pass(checkpoint, rounding=False)
    with skeleton_of(checkpoint, torch.bfloat16) as (_, layers):
        names = [layer.name for layer in layers]
    solved = [layer.name for group, _ in seen.calls for layer in group]
    assert sorted(solved) == sorted(names)
    groups = [{layer.kind for layer in group} for group, _ in seen.calls]
    for together in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"}):
        assert all(group == together for group in groups if group & together)


def test_linears_that_tokens_are_weighed_for_have_statistics_of_their_own(checkpoint: Path) -> None:
    drawn: dict[str, torch.Tensor] = {}

    def powers_of_four(seed: int) -> torch.Tensor:
        return 4.0 ** torch.randint(0, 4, [IDS.numel()], generator=torch.Generator().manual_seed(seed))

    def weights_of(group: Sequence[LinearLayer]) -> torch.Tensor | None:
        if any(EXPERT.fullmatch(layer.name) for layer in group):
            return None
        own = [
            drawn.setdefault(layer.name, powers_of_four(index)) for index, layer in enumerate(group, start=len(drawn))
        ]
        return torch.stack(own).mean(0)

    seen = run_pass(checkpoint, rounding=False, token_weights=weights_of)
    whole = whole_model(checkpoint)
    weighed = [(layers[0], statistics) for layers, statistics in seen.calls if layers[0].name in drawn]
    assert {layer.name for layer, _ in weighed} == {layer.name for layers, _ in seen.calls for layer in layers} & set(
        drawn
    )
    for layer, statistics in weighed:
        with InputsOf(matrix(whole, layer)) as inputs:
            run_whole(whole)
        rows = torch.cat(inputs.rows)
        weights = drawn[layer.name].double()[:, None]
        if len(rows) != len(weights):
            continue
        assert statistics is not None
        bound = 1e-6 * (rows.abs() * weights).T @ rows.abs()
        assert bool(((statistics.gram.double() - (rows * weights).T @ rows).abs() <= bound).all())


def test_drift_is_measured_from_the_inputs_of_the_unquantized_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.originals.SHORTEST_STRIDE", 1)
    plain = run_pass(checkpoint, rounding=False, folder=tmp_path, follows=lambda layers: True)
    whole, quantized = whole_model(checkpoint), whole_model(checkpoint)
    for layers, statistics in plain.calls:
        assert statistics is not None
        if statistics.drift is not None:
            sums = stacked(whole, layers) @ statistics.gram.double()
            # Outputs are bf16 numbers.
            bound = 2**-8 * float(sums.norm()) if statistics.drift.of_outputs else 0.0
            assert float(statistics.drift.matrix.norm()) <= bound
    seen = run_pass(checkpoint, rounding=True, folder=tmp_path, follows=lambda layers: True)
    followed, by_outputs = 0, 0
    for layers, statistics in seen.calls:
        rows = []
        for model in (whole, quantized):
            with InputsOf(matrix(model, layers[0])) as inputs:
                run_whole(model)
            rows.append(torch.cat(inputs.rows))
        assert statistics is not None
        if statistics.drift is None:
            assert any(EXPERT.fullmatch(layer.name) for layer in layers) or len(rows[1]) != IDS.numel()
        else:
            moved, x = rows[0] - rows[1], rows[1]
            found, expected = statistics.drift.matrix.double(), moved.T @ x
            if statistics.drift.of_outputs:
                W = stacked(whole, layers)
                assert len(W) < W.shape[1]
                # Outputs are bf16 numbers.
                assert float((found - W @ expected).norm()) <= 2**-8 * float((W @ statistics.gram.double()).norm())
                by_outputs += 1
            else:
                assert bool(((found - expected).abs() <= 1e-2 * moved.abs().T @ x.abs() + 1e-6).all())
            followed += bool(statistics.drift.matrix.any())
        with torch.no_grad():
            for layer in layers:
                matrix(quantized, layer).copy_(coarse(matrix(quantized, layer)))
    assert followed
    assert by_outputs or not any(layer.kind in ("down_proj", "fc2") for layers, _ in seen.calls for layer in layers)


def gradients_of(whole: PreTrainedModel, layers: Sequence[LinearLayer], seed: int) -> dict[str, torch.Tensor]:
    """At each linear's outputs [tokens, out], by one backward of the whole model, labels drawn by the same numbers."""
    draws = uniforms(seed, 0, IDS.numel(), 0)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    for layer in layers:
        whole.get_submodule(layer.name).register_forward_hook(keep(layer.name))
    whole.get_input_embeddings().weight.requires_grad_()
    logits = whole(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    cumulated = logits.detach().double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(cumulated, draws)
    drawn = logits.gather(-1, labels)
    ((drawn[:, 1:].mean(-1) - drawn[:, 0]).sum() * (1 - 1 / LABELS) ** 0.5).backward()
    found = {}
    for name, output in outputs.items():
        assert output.grad is not None
        found[name] = output.grad.reshape(IDS.numel(), -1).double()
    return found


@pytest.mark.parametrize(("memory_limit", "every"), [(1 << 30, 1), (0, 2)], ids=["memory", "file"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_importance_and_output_grams_are_those_of_the_whole_models_gradients(
    architecture: str, memory_limit: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importance is every token's; output Grams are of each micro-batch, or of each second one where that is enough."""
    monkeypatch.setattr("fewbits.coupled_runs.COUPLED", 24)
    monkeypatch.setattr("fewbits.output_grams.ENOUGH", IDS.numel() // every)
    path = save_tiny(tmp_path / "model", architecture, torch.float32)
    grams: dict[str, torch.Tensor] = {}
    blocks: list[int] = []

    def keep(block: int, found: dict[str, torch.Tensor]) -> None:
        blocks.append(block)
        grams.update(found)

    with skeleton_of(path, torch.float32) as (skeleton, layers):
        plain = [layer for layer in layers if EXPERT.fullmatch(layer.name) is None]
        found = measure_importance(
            skeleton, IDS, layers, micro_batch=MICRO_BATCH, seed=7, memory_limit=memory_limit, folder=tmp_path,
            coupled=[layer.name for layer in plain[1:]], keep_grams=keep,
        )  # fmt: skip
    gradients = gradients_of(whole_model(path, torch.float32), plain, 7)
    assert set(found.weights) == set(gradients)
    for name, weights in found.weights.items():
        expected = gradients[name].square().mean(-1)
        assert torch.allclose(weights.double(), expected, rtol=2e-3, atol=1e-3 * float(expected.mean()))
    assert not [file for file in tmp_path.iterdir() if file.is_file()]
    assert blocks == sorted(blocks, reverse=True)
    assert set(grams) == {layer.name for layer in plain[1:]}
    for layer in plain[1:]:
        rows = torch.cat(gradients[layer.name].split(MICRO_BATCH * IDS.shape[1])[::every])
        norm = rows.norm(dim=1, keepdim=True)
        G = (rows / norm.clamp_min(1e-300)).T @ rows
        runs = coupled_runs(layer.out_features)
        for run, block in zip(runs, split(grams[layer.name], layer.out_features), strict=True):
            exact = G[run, run]
            assert torch.allclose(block.double(), exact, rtol=0, atol=2e-3 * float(exact.diagonal().max()))


def test_experts_that_no_token_reaches_are_solved_without_a_statistic_and_noted(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        # A router of zeros ties all experts, and the first two are taken.
        model.model.layers[1].mlp.gate.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    seen = run_pass(tmp_path / "model", rounding=True)
    unseen = {layer.name for layers, statistics in seen.calls if statistics is None for layer in layers}
    assert len(unseen) == 6 and all(name.startswith("model.layers.1.") for name in unseen)
    assert {note.layer for note in seen.notes} == unseen
    assert {note.what for note in seen.notes} == {"solved without a statistic"}


def test_experts_that_few_tokens_reach_are_solved_on_those(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", "mixtral")
    ids = IDS[:1, :3]
    seen = run_pass(path, rounding=True, ids=ids)
    of_experts = [(layers, found) for layers, found in seen.calls if "experts" in layers[0].name and found is not None]
    assert of_experts and all(1 <= found.tokens <= 3 for _, found in of_experts if found is not None)
    reached = {"w1": 0, "w2": 0}
    for layers, found in of_experts:
        assert found is not None
        reached[layers[0].kind] += found.tokens
    assert reached == {"w1": 2 * 3 * 2, "w2": 2 * 3 * 2}  # two experts for each of three tokens in two blocks


def test_a_pass_goes_on_from_saved_states_as_if_never_interrupted(checkpoint: Path, tmp_path: Path) -> None:
    seen = run_pass(checkpoint, rounding=True)
    solve = lambda layers, weights, statistics: [coarse(weight) for weight in weights]  # noqa: E731
    with skeleton_of(checkpoint, torch.bfloat16) as (skeleton, layers):
        blocks = run_blocks(skeleton, IDS, layers, solve, micro_batch=MICRO_BATCH)
        first = next(blocks)
        assert first.save_states(tmp_path / "states")
    rest = run_pass(checkpoint, rounding=True, states=load_states(tmp_path / "states"))
    assert list(rest.outputs) == [1]
    assert all(map(torch.equal, rest.outputs[1], seen.outputs[1]))


def test_blocks_that_run_in_rounds_for_want_of_memory_see_what_suspended_ones_see(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Statistics are those of a block whose earlier linears are quantized; but for experts', bit for bit."""
    roomy = run_pass(checkpoint, rounding=True)
    seen = run_pass(checkpoint, rounding=True, memory_limit=0, folder=tmp_path)

    def by_layer(calls: list[tuple[tuple[LinearLayer, ...], Statistics | None]]) -> dict[str, Statistics | None]:
        return {layer.name: statistics for layers, statistics in calls for layer in layers}

    found, expected = by_layer(seen.calls), by_layer(roomy.calls)
    assert found.keys() == expected.keys()
    for name, statistics in expected.items():
        other = found[name]
        assert (statistics is None) == (other is None), name
        if statistics is not None and other is not None:
            assert statistics.tokens == other.tokens and torch.equal(statistics.absmax, other.absmax), name
            if EXPERT.fullmatch(name) is None:
                assert torch.equal(statistics.gram, other.gram), name
            # Micro-batches come to experts in another order, in which sums are rounded.
            sizes = statistics.gram.diagonal().sqrt()
            assert bool(((statistics.gram - other.gram).abs() <= 1e-5 * sizes * sizes[:, None]).all()), name
    for block, outputs in roomy.outputs.items():
        assert all(map(torch.equal, seen.outputs[block], outputs))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("matrix_units", "width", "length", "samples"),
    [
        (False, 1536, 512, 4), (False, 1536, 3000, 1),
        (True, 1536, 512, 8), (True, 2816, 512, 5), (True, 14336, 512, 4), (True, 1536, 5000, 1),
    ],
)  # fmt: skip
def test_micro_batches_hold_more_of_narrow_layers_where_products_are_fast(
    matrix_units: bool, width: int, length: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "HAS_MATRIX_UNITS", matrix_units)
    layers = [LinearLayer("a", "a.weight", 64, width, "BF16"), LinearLayer("b", "b.weight", width, 64, "BF16")]
    assert micro_batch_size(length, layers) == samples
