"""One block of the calibrated pass: its linears are grouped by their input, and solved in the order they are met.

Which linears share an input is found by a dry run of one micro-batch. All micro-batches are suspended at each group's
input until its statistic is complete; or, where their states wait in a file, each runs the block up to that input,
and again up to the next, once the codes there are chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from fewbits.allocator import return_free_memory, returned_blocks
from fewbits.block_folds import Folding, find_block_folds, refusal_notes
from fewbits.errors import CalibrationError
from fewbits.following import Following
from fewbits.input_groups import InputGroup, InputGroups, is_expert
from fewbits.layers import LinearLayer
from fewbits.notes import Note
from fewbits.originals import Originals
from fewbits.probing import PROBE_TOKENS, first_tokens
from fewbits.rounds import Gathered, Rounds
from fewbits.skeleton import Part, Skeleton
from fewbits.statistics import Statistics, StatisticsAccumulator
from fewbits.suspended import MicroBatch, SuspendedForward
from fewbits.token_sample import TokenSample
from fewbits.watching import Product, Slot, watch

# Called with the consumers of one input, their weights [out, in] as stored, and what was seen of the input (None if
# nothing was). Returns for each the weight to go on with, or None to leave it.
Solve = Callable[[Sequence[LinearLayer], Sequence[torch.Tensor], Statistics | None], Sequence[torch.Tensor | None]]
# Called with a block's name and the consumers of one input, once they are solved.
Watcher = Callable[[str, Sequence[LinearLayer]], None]
# One number a token for the consumers of one input, or None for plain statistics.
TokenWeights = Callable[[Sequence[LinearLayer]], torch.Tensor | None]


@dataclass
class Timings:
    """Seconds by stage, summed over blocks."""

    files_s: float = 0.0
    forward_s: float = 0.0
    statistics_s: float = 0.0
    solve_s: float = 0.0
    folds_s: float = 0.0
    total_s: float = 0.0


class BlockRun:
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
        originals: Originals | None,
        timings: Timings,
        watcher: Watcher | None,
    ) -> None:
        self._skeleton, self._forward, self._index = skeleton, forward, index
        self._layers, self._solve, self._token_weights = layers, solve, token_weights
        self._folding, self._timings = folding, timings
        self._originals = originals
        self._report = watcher
        self._notes: list[Note] = []
        self._groups = InputGroups()
        self._watcher: Callable[[Slot, torch.Tensor], None] | None = None
        self._following: Following | None = None
        # Of the original model while it goes through the block.
        self._keep: Callable[[Slot, torch.Tensor, Product], torch.Tensor] | None = None
        taken = originals.takes if originals is not None else lambda micro_batch: True
        # Those that the original model goes through as well are the first.
        self._micro_batches = sorted(forward.micro_batches, key=lambda micro_batch: not taken(micro_batch))
        self._rounds = Rounds(self._groups)
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
                self._split_by_importance()
            self._run_original()
            if self._forward.stash is None:
                self._run_suspended()
            else:
                self._run_in_rounds()
            self._solve_unseen()
        # These refer back to this run: the block's weights would stay until the garbage collector comes by.
        self._following, self._watcher, self._plain = None, None, {}
        return self._notes

    def _run_suspended(self) -> None:
        """All micro-batches in step, each waiting wherever a linear's codes are still to be chosen."""
        self._watcher = self._arrive
        for micro_batch in self._micro_batches:
            self._forward.resume(micro_batch)
        while waiting := self._waiting():
            group = min(waiting, key=lambda group: group.order)
            self._solve_group(group)
            for micro_batch in waiting[group]:
                self._forward.resume(micro_batch)
        self._watcher = None

    def _run_in_rounds(self) -> None:
        """One micro-batch after the other up to the next input, and again with the new weights of its consumers.

        The numbers are those of suspended micro-batches, without their states. A block runs some three times so.
        """
        self._watcher = self._gather
        while self._rounds.begin():
            for micro_batch in self._micro_batches:
                self._rounds.begin_micro_batch()
                with suppress(Gathered):
                    self._forward.run_alone(self._index, micro_batch)
            for group in self._rounds.gathered():
                if group.accumulator is not None:
                    self._solve_group(group)
        self._watcher = None
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

    def _watch(self, slot: Slot, inputs: torch.Tensor, product: Product) -> torch.Tensor:
        is_wanted = (slot.parameter, slot.expert) in self._parts
        if self._keep is not None and is_wanted:
            return self._keep(slot, inputs, product)
        if self._watcher is not None and is_wanted:
            self._watcher(slot, inputs)
        return product()

    def _dry_run(self) -> None:
        """Find which slots share an input."""
        self._watcher = self._groups.recorder()
        micro_batch = self._forward.micro_batches[0]
        arguments = self._forward.arguments_of(self._index, micro_batch)
        # Of experts as many as can be are to be reached; a few tokens come by everything else.
        if not any(is_expert(Slot(*key)) for key in self._parts):
            arguments = first_tokens(arguments, PROBE_TOKENS, dtype=None)
        self._forward.call(self._index, micro_batch, arguments)

    def _find_folds(self, block: nn.Module) -> None:
        """Give the groups that want one a fold, and say which do without."""
        if self._folding is None:
            return
        before = time.perf_counter()
        groups = sorted(self._groups, key=lambda group: group.order)
        wanting = {tuple(group.slots): group for group in groups if self._folding.wants(self._layers_of(group))}
        if wanting:
            self._watcher = None
            places, refused = find_block_folds(
                self._skeleton, self._forward, self._index, block, self._all_parts, list(wanting)
            )
            for slots, place in places.items():
                wanting[slots].place, wanting[slots].sample = place, TokenSample(self._forward.ids.numel())
                wanting[slots].stride = self._gram_stride(wanting[slots])
            self._notes += refusal_notes((self._layers_of(wanting[r.consumers])[0], r.why) for r in refused)
        self._timings.folds_s += time.perf_counter() - before

    def _split_by_importance(self) -> None:
        """Give every linear that tokens are weighed for a statistic of its own, unless its group shares a fold."""
        if self._token_weights is None:
            return
        for group in self._groups:
            shared = group.place is not None or group.has_experts or len(group.slots) == 1
            if not shared and self._token_weights(self._layers_of(group)) is not None:
                self._groups.split(group)

    def _run_original(self) -> None:
        """Have the original model go on by this block, and keep what drift is measured from."""
        if self._originals is None:
            return
        originals = self._originals
        # What is folded multiplies other inputs than the original model's.
        following = Following(
            originals,
            [
                group
                for group in self._groups
                if not group.has_experts and group.place is None and originals.follows(self._layers_of(group))
            ],
            self._rows_of,
        )
        self._keep = lambda slot, inputs, product: following.keep(slot, self._forward.running, inputs, product)
        originals.run_block(self._forward, self._index)
        self._keep, self._following = None, following

    def _rows_of(self, group: InputGroup) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights of a group's layers, one below the other as stored, and which outputs of its first slot they make."""
        slot = group.slots[0]
        parts = self._parts[slot.parameter, slot.expert]
        W = torch.cat([self._stored(slot, part) for part in parts])
        if slot.transposed or len(W) == len(self._plain[slot.parameter]):
            return W, None
        return W, torch.cat([torch.arange(part.start, part.stop) for part in parts])

    def _gram_stride(self, group: InputGroup) -> int:
        """Of how many micro-batches one makes a Gram that is good enough."""
        enough = None if self._folding is None else self._folding.tokens_for_gram(self._layers_of(group))
        # Experts see a choice of the tokens: all of it counts.
        if enough is None or group.has_experts:
            return 1
        micro_batches = self._forward.micro_batches
        return max(1, len(micro_batches) // math.ceil(enough / micro_batches[0].ids.numel()))

    def _arrive(self, slot: Slot, inputs: torch.Tensor) -> None:
        """A micro-batch has come to a linear: add its input, and wait until all have."""
        group, micro_batch = self._groups.of(slot), self._forward.running
        if group.solved:
            if micro_batch.index not in group.arrived and slot == group.slots[0]:
                group.late_tokens += inputs.numel() // inputs.shape[-1]
            return
        self._add(group, micro_batch, inputs)
        self._forward.suspend(group)

    def _gather(self, slot: Slot, inputs: torch.Tensor) -> None:
        """A micro-batch that does not wait has come to a linear: add its input if it is this round's, for all of them.

        Raises:
            Gathered: nothing of what follows is.
        """
        group, micro_batch = self._groups.of(slot), self._forward.running
        for counted in self._rounds.met(group):
            if micro_batch.index not in counted.arrived:
                self._add(counted, micro_batch, inputs)
        if self._rounds.is_enough(group):
            raise Gathered

    def _add(self, group: InputGroup, micro_batch: MicroBatch, inputs: torch.Tensor) -> None:
        group.arrived.add(micro_batch.index)
        before = time.perf_counter()
        if group.accumulator is None:
            group.accumulator = StatisticsAccumulator(inputs.shape[-1], inputs.device)
        if micro_batch.index % group.stride == 0:
            weights = self._importance(group, micro_batch, inputs)
            if self._following is not None and not self._following.takes(micro_batch):
                self._following.settle(group, group.accumulator)
            group.accumulator.add(inputs, weights)
            if self._following is not None:
                self._following.add(group, micro_batch, inputs, weights)
        else:
            group.accumulator.add_magnitudes(inputs)
        if group.sample is not None:
            group.sample.add(inputs)
        self._timings.statistics_s += time.perf_counter() - before

    def _importance(self, group: InputGroup, micro_batch: MicroBatch, inputs: torch.Tensor) -> torch.Tensor | None:
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

    def _layers_of(self, group: InputGroup) -> list[LinearLayer]:
        return [self._layers[part.tensor] for slot in group.slots for part in self._parts[slot.parameter, slot.expert]]

    def _waiting(self) -> dict[InputGroup, list[MicroBatch]]:
        waiting: dict[InputGroup, list[MicroBatch]] = {}
        for micro_batch in self._micro_batches:
            if isinstance(micro_batch.waiting, InputGroup):
                waiting.setdefault(micro_batch.waiting, []).append(micro_batch)
        return waiting

    def _solve_group(self, group: InputGroup) -> None:
        assert group.accumulator is not None
        before = time.perf_counter()
        if self._forward.pager is not None:
            self._forward.pager.let_go()
            return_free_memory()
        # Codes are chosen by compiled kernels, which run on the CPU.
        drift = None if self._following is None else self._following.drift(group, group.accumulator)
        statistics = replace(group.accumulator.finish(), drift=drift).to("cpu")
        group.accumulator = None
        self._timings.statistics_s += time.perf_counter() - before
        layers = self._layers_of(group)
        if not torch.isfinite(statistics.absmax).all():
            raise self._not_finite(layers[0], statistics)
        self._solve_slots(group, layers, statistics)
        group.solved, group.sample = True, None

    def _not_finite(self, layer: LinearLayer, statistics: Statistics) -> CalibrationError:
        """What to say of an input that no statistic can be taken of, and where it may come from."""
        names, wrong = self._skeleton.block_names, ~torch.isfinite(statistics.absmax)
        found = f"{int(wrong.sum())} of its {len(wrong)} channels, the first is {int(wrong.nonzero()[0])}"
        last = f"; the last good block is {names[self._index - 1]}" if self._index else ""
        parameters = self._skeleton.blocks[self._index].named_parameters()
        faulty = [name for name, parameter in parameters if not bool(torch.isfinite(parameter).all())]
        hint = "the block's weights are finite, so its numbers overflow: int8, int4 and fp8 run no forward"
        if faulty:
            hint = f"{names[self._index]}.{faulty[0]} holds NaN or infinite values: fetch the checkpoint again"
        return CalibrationError(f"The input of {layer.name} has NaN or infinite values in {found}{last}.", hint)

    def _solve_slots(self, group: InputGroup, layers: list[LinearLayer], statistics: Statistics) -> None:
        before = time.perf_counter()
        places = [(slot, part) for slot in group.slots for part in self._parts[slot.parameter, slot.expert]]
        weights = [self._stored(slot, part).cpu() for slot, part in places]
        with returned_blocks():
            if self._forward.pager is not None:
                # Again: what finished the statistics is free by now, and solving needs the most.
                return_free_memory()
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
        for group in self._groups:
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
