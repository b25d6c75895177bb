"""Calibrate: run the model's own forward once; each linear's weight and statistic go to whoever chooses its codes.

`run_blocks` yields after every block, so that the caller can finish its file, save the hidden states and report. Inside
a block every micro-batch is suspended at each distinct linear input (`suspended.py`) until all have arrived there; H is
complete then, `solve` is called with all consumers of that input, and the forward goes on with the weights it returned:

    for done in run_blocks(skeleton, ids, layers, solve):
        write_shard(done.block)
        done.save_states(folder / "states.safetensors")      # resume with load_states(…), start_block=done.block + 1

Which linears share an input is found by one micro-batch's dry run. Where the states of all micro-batches would not fit
into the memory limit, each block runs twice instead, one micro-batch after the other: once to gather all of its
statistics, once with its new weights; what lies between two blocks waits in a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fewbits.absorbing import FoldPlace
from fewbits.block_inputs import BlockInputs
from fewbits.errors import CalibrationError
from fewbits.folds import Fold, Refused, find_folds
from fewbits.layers import LinearLayer
from fewbits.notes import Note
from fewbits.probing import ProbedBlock
from fewbits.skeleton import Part, Skeleton
from fewbits.states import States, write_states
from fewbits.statistics import Statistics, StatisticsAccumulator
from fewbits.suspended import MicroBatch, SuspendedForward, hidden_of, structure_of
from fewbits.token_sample import TokenSample
from fewbits.watching import Slot, watch

# Called with the consumers of one input, their weights [out, in] as stored, and what was seen of the input (None if
# nothing was). Returns for each the weight to go on with, or None to leave it.
Solve = Callable[[Sequence[LinearLayer], Sequence[torch.Tensor], Statistics | None], Sequence[torch.Tensor | None]]
# Called with a block's name and the consumers of one input, once they are solved.
Watcher = Callable[[str, Sequence[LinearLayer]], None]
# One number a token for the consumers of one input, or None for plain statistics.
TokenWeights = Callable[[Sequence[LinearLayer]], torch.Tensor | None]

MICRO_BATCH_TOKENS = 2048


class Folding(Protocol):
    """Solves layers whose input channels may be scaled, because a fold takes the scales up."""

    def wants(self, layers: Sequence[LinearLayer]) -> bool:
        """Whether a fold is of use to the consumers of one input."""

    def solve(
        self,
        layers: Sequence[LinearLayer],
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        place: FoldPlace,
        sample: torch.Tensor,
    ) -> Sequence[torch.Tensor | None]:
        """As `Solve`; what is returned multiplies the input as it is, unscaled. sample: some of the tokens [n, in]."""


@dataclass
class Timings:
    """Seconds by stage, summed over blocks."""

    files_s: float = 0.0
    forward_s: float = 0.0
    statistics_s: float = 0.0
    solve_s: float = 0.0
    folds_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class BlockDone:
    """A block whose linears are all solved. timings: of the pass so far. notes: of this block."""

    block: int
    name: str
    notes: tuple[Note, ...]
    timings: Timings
    _forward: SuspendedForward = field(repr=False)

    def save_states(self, path: Path) -> bool:
        """Write the hidden states behind this block, to go on from later; False if they have a form that cannot be.

        Raises:
            OutputError: the disk is full or fails.
        """
        micro_batches = self._forward.micro_batches
        structures = {structure_of(micro_batch.output) for micro_batch in micro_batches}
        if len(structures) != 1 or None in structures:
            return False
        write_states(
            path, self.block, str(structures.pop()),
            [hidden_of(micro_batch.output) for micro_batch in micro_batches],
            (self._forward.hidden_behind(self.block, micro_batch) for micro_batch in micro_batches),
        )  # fmt: skip
        return True


def micro_batch_size(length: int) -> int:
    """Samples in one micro-batch: enough tokens for matrix products at full speed, few enough to stay in the cache."""
    return max(1, MICRO_BATCH_TOKENS // length)


def bytes_in_flight(skeleton: Skeleton, tokens: int, layers: Sequence[LinearLayer]) -> int:
    """What suspended forwards hold at most: for every token the residual, its norm, and the widest linear's input."""
    widest = max((layer.in_features for layer in layers), default=0)
    return tokens * (2 * skeleton.hidden_bytes + widest * skeleton.element_size)


@torch.no_grad()
def run_blocks(
    skeleton: Skeleton,
    ids: torch.Tensor,
    layers: Sequence[LinearLayer],
    solve: Solve,
    *,
    token_weights: TokenWeights | None = None,
    folding: Folding | None = None,
    states: States | None = None,
    memory_limit: int | None = None,
    folder: Path | None = None,
    micro_batch: int | None = None,
    watcher: Watcher | None = None,
) -> Iterator[BlockDone]:
    """Run all blocks, solving the given layers on the way.

    Args:
        ids: token ids [samples, length].
        layers: the linears to solve; all others run as they are.
        token_weights: the importance of tokens to a group of linears.
        folding: solves the groups it wants in place of `solve`, where a fold is found and proven.
        states: where to go on from; blocks up to `states.block` are not run again.
        memory_limit: bytes that states in flight may take; past them every block runs twice.
        folder: where the file goes that states then wait in.
        watcher: told of every group of layers that is solved.
    """
    start_block = 0 if states is None else states.block + 1
    wanted: dict[int, dict[str, LinearLayer]] = {}
    for layer in layers:
        if layer.block is not None:
            wanted.setdefault(layer.block, {})[layer.tensor] = layer
    size = micro_batch or micro_batch_size(ids.shape[1])
    timings, began = Timings(), time.perf_counter()
    limited = memory_limit is not None and memory_limit < bytes_in_flight(skeleton, ids.numel(), layers)
    skeleton.materialize_rest()
    stash = BlockInputs(2, ids.numel() * skeleton.hidden_bytes, 0, sys.maxsize, folder) if limited else None
    forward = SuspendedForward(
        skeleton,
        ids,
        size,
        skip=start_block,
        outputs=() if states is None else states.outputs,
        structure="tensor" if states is None else states.structure,
        stash=stash,
    )
    with forward, stash or nullcontext():
        forward.start()
        forward.outputs = ()
        skeleton.release_embeddings()
        for index in range(start_block, len(skeleton.blocks)):
            forward.waiting_at(index)
            run = _BlockRun(
                skeleton, forward, index, wanted.get(index, {}), solve, token_weights, folding, timings, watcher
            )
            notes = run.run()
            timings.total_s = time.perf_counter() - began
            timings.forward_s = (
                timings.total_s - timings.files_s - timings.statistics_s - timings.solve_s - timings.folds_s
            )
            yield BlockDone(index, skeleton.block_names[index], tuple(notes), timings, forward)


@dataclass(eq=False)
class _Group:
    """Consumers of one input: the slots that multiply it, and the layers of the files that lie in them."""

    slots: list[Slot]
    order: tuple[int, int, int]
    accumulator: StatisticsAccumulator | None = None
    arrived: set[int] = field(default_factory=set)
    solved: bool = False
    late_tokens: int = 0
    place: FoldPlace | None = None
    sample: TokenSample | None = None


class _BlockRun:
    """One block: its groups in the order in which the forward meets them."""

    def __init__(
        self,
        skeleton: Skeleton,
        forward: SuspendedForward,
        index: int,
        layers: Mapping[str, LinearLayer],
        solve: Solve,
        token_weights: TokenWeights | None,
        folding: Folding | None,
        timings: Timings,
        watcher: Watcher | None,
    ) -> None:
        self._skeleton, self._forward, self._index = skeleton, forward, index
        self._layers, self._solve, self._token_weights = layers, solve, token_weights
        self._folding, self._timings = folding, timings
        self._report = watcher
        self._notes: list[Note] = []
        self._groups: dict[tuple[str, int | None], _Group] = {}
        self._units: dict[str, int] = {}
        self._members: dict[tuple[str, str], int] = {}
        self._watcher: Callable[[Slot, torch.Tensor], None] | None = None
        self._solved_layers: set[str] = set()
        self._weights: dict[str, torch.Tensor] = {}

    def run(self) -> list[Note]:
        """Run the block on all micro-batches; they wait in front of the next one afterwards."""
        before = time.perf_counter()
        with self._skeleton.materialized(self._index) as block:
            self._parts = self._find_parts()
            watch(block, self._watch)
            self._plain = {
                f"{name}.{key}" if name else key: parameter.plain
                for name, child in block.named_modules()
                for key, parameter in child._parameters.items()
                if parameter is not None and hasattr(parameter, "plain")
            }
            self._timings.files_s += time.perf_counter() - before
            if self._parts:
                self._dry_run()
                self._find_folds(block)
            if self._forward.stash is None:
                self._run_suspended()
            else:
                self._run_twice()
            self._solve_unseen()
        return self._notes

    def _run_suspended(self) -> None:
        """All micro-batches in step, each waiting wherever a linear's codes are still to be chosen."""
        self._watcher = self._arrive
        for micro_batch in self._forward.micro_batches:
            self._forward.resume(micro_batch)
        while waiting := self._waiting():
            group = min(waiting, key=lambda group: group.order)
            self._solve_group(group)
            for micro_batch in waiting[group]:
                self._forward.resume(micro_batch)
        self._watcher = None

    def _run_twice(self) -> None:
        """One micro-batch after the other, to gather all statistics; then again, with the new weights."""
        self._watcher = self._gather
        if self._parts:
            for micro_batch in self._forward.micro_batches:
                self._forward.run_alone(self._index, micro_batch)
        self._watcher = None
        reached = [group for group in dict.fromkeys(self._groups.values()) if group.accumulator is not None]
        for group in sorted(reached, key=lambda group: group.order):
            self._solve_group(group)
        for micro_batch in self._forward.micro_batches:
            output = self._forward.run_alone(self._index, micro_batch)
            self._forward.finish_block(self._index, micro_batch, output)
        for micro_batch in self._forward.micro_batches:
            self._forward.resume(micro_batch)

    def _find_parts(self) -> dict[tuple[str, int | None], list[Part]]:
        """Wanted layers by the matrix they lie in."""
        found: dict[tuple[str, int | None], list[Part]] = {}
        self._all_parts = self._skeleton.parts(self._index)
        for parameter, parts in self._all_parts.items():
            for part in parts:
                if part.tensor in self._layers:
                    found.setdefault((parameter, part.expert), []).append(part)
        return found

    def _watch(self, slot: Slot, inputs: torch.Tensor, product: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._watcher is not None and (slot.parameter, slot.expert) in self._parts:
            self._watcher(slot, inputs)
        return product()

    def _dry_run(self) -> None:
        """Find which slots share an input: the same tensor, or another view of the same memory."""
        seen: list[torch.Tensor] = []  # kept alive, so that memory is not used twice
        by_input: dict[tuple[Any, ...], _Group] = {}

        def record(slot: Slot, inputs: torch.Tensor) -> None:
            seen.append(inputs)
            key = (inputs.data_ptr(), inputs.numel(), inputs.shape[-1], inputs._version, inputs.dtype)
            if (slot.parameter, slot.expert) in self._groups:
                return
            group = by_input.setdefault(key, _Group([], self._order(slot)))
            group.slots.append(slot)
            self._groups[slot.parameter, slot.expert] = group

        self._watcher = record
        self._forward.run_alone(self._index, self._forward.micro_batches[0])

    def _find_folds(self, block: nn.Module) -> None:
        """Give the groups that want one a fold, and say which do without."""
        if self._folding is None:
            return
        before = time.perf_counter()
        groups = sorted(set(self._groups.values()), key=lambda group: group.order)
        by_slots = {tuple(group.slots): group for group in groups if self._folding.wants(self._layers_of(group))}
        if by_slots:
            first = self._forward.micro_batches[0]
            self._watcher = None
            with ProbedBlock(
                block, lambda arguments: self._forward.run_alone(self._index, replace(first, arguments=arguments)),
                first.arguments,
            ) as probed:  # fmt: skip
                folds, refused = find_folds(probed, list(by_slots))
            for fold in folds:
                group = by_slots[fold.consumers]
                group.place = self._fold_place(fold)
                group.sample = TokenSample(self._forward.ids.numel())
                if group.place is None:
                    refused.append(Refused(fold.consumers, f"{fold.producer.parameter} is no rows of one tensor"))
            self._note_refused(refused, by_slots)
        self._timings.folds_s += time.perf_counter() - before

    def _note_refused(self, refused: Sequence[Refused], by_slots: Mapping[tuple[Slot, ...], _Group]) -> None:
        """One note for all experts that go without a fold for the same reason."""
        alike: dict[tuple[str, str], list[str]] = {}
        for refusal in refused:
            layer = self._layers_of(by_slots[refusal.consumers])[0]
            alike.setdefault((layer.kind, refusal.why), []).append(layer.name)
        for (_, why), names in alike.items():
            others = f", nor are those of {len(names) - 1} alike" if len(names) > 1 else ""
            self._notes.append(Note(names[0], f"its input channels are not scaled{others}", why))

    def _fold_place(self, fold: Fold) -> FoldPlace | None:
        """Where a fold's producer lies in the files; None if it is made of their tensors in other ways than by rows."""
        producer = fold.producer
        bias = None if fold.bias is None else self._skeleton.tensor_of(self._index, fold.bias)
        if fold.norm_offset is not None:
            tensor = self._skeleton.tensor_of(self._index, producer.parameter)
            parts = [] if tensor is None else [Part(tensor, None, 0, len(fold.rows))]
        else:
            parts = [part for part in self._all_parts.get(producer.parameter, []) if part.expert == producer.expert]
        if not parts or (bias is None) != (fold.bias is None):
            return None
        return FoldPlace(fold, tuple(parts), bias)

    def _order(self, slot: Slot) -> tuple[int, int, int]:
        """Where a slot stands: as first seen, and experts of a list by their number, though only some are seen."""
        path = slot.parameter.split(".")
        numbers = [place for place, part in enumerate(path) if part.isdecimal()]
        if slot.expert is not None:
            unit, number, member = ".".join(path[:-1]), slot.expert, path[-1]
        elif numbers:
            unit, number, member = ".".join(path[: numbers[0]]), int(path[numbers[0]]), ".".join(path[numbers[0] + 1 :])
        else:
            unit, number, member = slot.parameter, 0, ""
        place = self._units.setdefault(unit, len(self._units))
        return place, number, self._members.setdefault((unit, member), len(self._members))

    def _arrive(self, slot: Slot, inputs: torch.Tensor) -> None:
        """A micro-batch has come to a linear: add its input, and wait until all have."""
        key = slot.parameter, slot.expert
        if key not in self._groups:
            self._groups[key] = _Group([slot], self._order(slot))
        group, micro_batch = self._groups[key], self._forward.running
        if group.solved:
            if micro_batch.index not in group.arrived and slot == group.slots[0]:
                group.late_tokens += inputs.numel() // inputs.shape[-1]
            return
        self._add(group, micro_batch, inputs)
        self._forward.suspend(group)

    def _gather(self, slot: Slot, inputs: torch.Tensor) -> None:
        """A micro-batch that does not wait has come to a linear: add its input, once for all consumers."""
        key = slot.parameter, slot.expert
        if key not in self._groups:
            self._groups[key] = _Group([slot], self._order(slot))
        group, micro_batch = self._groups[key], self._forward.running
        if micro_batch.index not in group.arrived:
            self._add(group, micro_batch, inputs)

    def _add(self, group: _Group, micro_batch: MicroBatch, inputs: torch.Tensor) -> None:
        group.arrived.add(micro_batch.index)
        before = time.perf_counter()
        if group.accumulator is None:
            group.accumulator = StatisticsAccumulator(inputs.shape[-1], inputs.device)
        group.accumulator.add(inputs, self._importance(group, micro_batch, inputs))
        if group.sample is not None:
            group.sample.add(inputs)
        self._timings.statistics_s += time.perf_counter() - before

    def _importance(self, group: _Group, micro_batch: MicroBatch, inputs: torch.Tensor) -> torch.Tensor | None:
        if self._token_weights is None:
            return None
        rows = inputs.numel() // inputs.shape[-1]
        # Experts see a choice of the tokens, and which is not known here.
        if rows != micro_batch.ids.numel():
            return None
        name = str(id(group))
        if name not in self._weights:
            weights = self._token_weights(self._layers_of(group))
            if weights is None:
                return None
            self._weights[name] = weights
        return self._weights[name][micro_batch.tokens].to(inputs.device)

    def _layers_of(self, group: _Group) -> list[LinearLayer]:
        return [self._layers[part.tensor] for slot in group.slots for part in self._parts[slot.parameter, slot.expert]]

    def _waiting(self) -> dict[_Group, list[MicroBatch]]:
        waiting: dict[_Group, list[MicroBatch]] = {}
        for micro_batch in self._forward.micro_batches:
            if isinstance(micro_batch.waiting, _Group):
                waiting.setdefault(micro_batch.waiting, []).append(micro_batch)
        return waiting

    def _solve_group(self, group: _Group) -> None:
        assert group.accumulator is not None
        before = time.perf_counter()
        # Codes are chosen by compiled kernels, which run on the CPU.
        statistics = group.accumulator.finish().to("cpu")
        group.accumulator = None
        self._timings.statistics_s += time.perf_counter() - before
        layers = self._layers_of(group)
        if not torch.isfinite(statistics.absmax).all():
            names = self._skeleton.block_names
            last = f"; the last good block is {names[self._index - 1]}" if self._index else ""
            raise CalibrationError(f"The input of {layers[0].name} has NaN or infinite values{last}.")
        self._solve_slots(group.slots, layers, statistics, group)
        group.solved, group.sample = True, None

    def _solve_slots(self, slots: list[Slot], layers: list[LinearLayer], statistics: Statistics, group: _Group) -> None:
        before = time.perf_counter()
        places = [(slot, part) for slot in slots for part in self._parts[slot.parameter, slot.expert]]
        weights = [self._stored(slot, part).cpu() for slot, part in places]
        if group.place is not None and group.sample is not None and self._folding is not None:
            solved = self._folding.solve(layers, weights, statistics, group.place, group.sample.rows)
        else:
            solved = self._solve(layers, weights, statistics)
        for (slot, part), weight in zip(places, solved, strict=True):
            if weight is not None:
                rows = self._rows(slot, part)
                rows.copy_(weight.T if slot.transposed else weight)
        self._timings.solve_s += time.perf_counter() - before
        self._finished(layers)

    def _finished(self, layers: Sequence[LinearLayer]) -> None:
        self._solved_layers.update(layer.tensor for layer in layers)
        if self._report is not None:
            self._report(self._skeleton.block_names[self._index], layers)

    def _rows(self, slot: Slot, part: Part) -> torch.Tensor:
        plain = self._plain[slot.parameter]
        matrix = plain if part.expert is None else plain[part.expert]
        rows: torch.Tensor = matrix[part.start : part.stop]
        return rows

    def _stored(self, slot: Slot, part: Part) -> torch.Tensor:
        """The weight [out, in] as the files have it."""
        layer, rows = self._layers[part.tensor], self._rows(slot, part)
        if layer.transposed != slot.transposed:
            raise CalibrationError(f"{layer.name} was taken for {'' if layer.transposed else 'not '}transposed.")
        weight = rows if rows.dtype == _DTYPES[layer.dtype] else self._skeleton.read(part.tensor)
        return weight.T.contiguous() if slot.transposed else weight

    def _solve_unseen(self) -> None:
        """Solve what no token reached, and what the model does not multiply by as it lies in the files."""
        for group in dict.fromkeys(self._groups.values()):
            if group.late_tokens:
                name = self._layers_of(group)[0].name
                self._notes.append(
                    Note(
                        name,
                        f"{group.late_tokens} tokens left out of its statistic",
                        "they arrived after it was solved",
                    )
                )
        for layer in [layer for layer in self._layers.values() if layer.tensor not in self._solved_layers]:
            self._notes.append(Note(layer.name, "solved without a statistic", "no calibration token reached it"))
            weight = self._skeleton.read(layer.tensor)
            before = time.perf_counter()
            self._solve([layer], [weight.T.contiguous() if layer.transposed else weight], None)
            self._timings.solve_s += time.perf_counter() - before
            self._finished([layer])


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
