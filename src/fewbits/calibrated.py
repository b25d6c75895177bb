"""Conversion with calibration data: one forward of the model, each block written as soon as it is solved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fewbits.allocator import keep_blocks, return_free_memory
from fewbits.attention import use_own_attention
from fewbits.block_run import Timings
from fewbits.calibrate import BlockDone, bytes_in_flight, run_blocks
from fewbits.calibration import Calibration
from fewbits.checkpoints.journal import Journal
from fewbits.checkpoints.partial import PartialFolder
from fewbits.checkpoints.reader import TensorReader
from fewbits.checkpoints.writer import ShardWriter
from fewbits.convert import NonFiniteWeights, ShardWork
from fewbits.errors import PlanError
from fewbits.folded_layers import LayerSolver
from fewbits.formats import FORMATS
from fewbits.gelu import use_own_gelu
from fewbits.kept_importance import KeptImportance
from fewbits.kernels.rows import holds_nonfinite
from fewbits.layers import LinearLayer
from fewbits.norms import use_own_norms
from fewbits.notes import Note
from fewbits.originals import load_original_states
from fewbits.plan import Plan
from fewbits.progress import Progress
from fewbits.skeleton import Skeleton, build_model
from fewbits.states import States, load_states

STATES_FILE = "states-{block}.safetensors"
ORIGINAL_STATES_FILE = "original-states-{block}.safetensors"
# A block's backward takes as long as so many of its forwards: it is one more of those, and two more products for each.
BACKWARD_STEPS = 3


def step_text(block: str, layers: Sequence[LinearLayer]) -> str:
    """ "model.layers.3: q_proj, k_proj, v_proj": a block and the linears in it that were solved together."""
    return f"{block}: {', '.join(layer.name.removeprefix(f'{block}.').rpartition('.')[2] for layer in layers)}"


@dataclass
class CalibratedConversion:
    """Solves and writes the shards of decoder blocks, in order, from the first that the journal does not hold."""

    plan: Plan
    folder: PartialFolder
    journal: Journal
    calibration: Calibration
    progress: Progress
    importance: bool = True
    seed: int = 0
    strict: bool = False
    memory_limit: int | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    timings: Timings = field(default_factory=Timings)
    importance_s: float = 0.0
    _solver: LayerSolver = field(init=False)

    def run(self, shards: Sequence[ShardWork], blocks: dict[int, ShardWork]) -> None:
        """Write the shards of `blocks`.

        Args:
            shards: those still missing. blocks: every block's shard by the block's number.

        Raises:
            CalibrationError: NaN appeared on the way, or transformers cannot run the model.
        """
        missing = {work.number for work in shards}
        todo = sorted(block for block, work in blocks.items() if work.number in missing)
        if not todo:
            return
        keep_blocks()
        self._planned = {layer.name: layer for layer in self.plan.quantized}
        methods = {layer.name: layer.method for layer in self.plan.quantized}
        self._coupled = frozenset(name for name, method in methods.items() if method and method.solver_name == "gptq")
        self._is_following = self.importance and bool(self._coupled)
        states, original_states = self._states(todo[0])
        first = 0 if states is None else states.block + 1
        with TensorReader(self.plan.source) as reader:
            model = build_model(self.plan.source.path, getattr(torch, self.dtype))
            use_own_attention(model)
            use_own_norms(model)
            use_own_gelu(model)
            skeleton = Skeleton(model, self.plan.source, reader, self.device)
            layers = [layer.layer for layer in self.plan.quantized if layer.layer.block is not None]
            kept = self._measured(skeleton, layers) if self.importance else None
            self._solver = LayerSolver(
                self._planned, skeleton.read, self._check_finite, None if kept is None else kept.output_grams
            )
            self._note_two_forwards(skeleton, layers, first)
            remaining = sum(layer.block is not None and layer.block >= first for layer in layers)
            self.progress.begin("calibrating", remaining, "linears")
            for done in run_blocks(
                skeleton, self.calibration.ids, layers, self._solver.solve_plainly,
                token_weights=None if kept is None else kept.token_weights(),
                folding=self._solver if self._solver.is_folding else None,
                follows=self._follows if self._is_following else None, states=states,
                original_states=original_states,
                memory_limit=self.memory_limit, folder=self.folder.scratch,
                watcher=lambda block, group: self.progress.advance(len(group), step_text(block, group)),
            ):  # fmt: skip
                if done.block in blocks:
                    self._finish(done, blocks[done.block], reader, write=blocks[done.block].number in missing)
                self.timings = done.timings
                # The heap has holes where something of this block outlives its neighbours; they would add up.
                return_free_memory()
            self.progress.end()
            for block in range(len(skeleton.blocks)):
                self._forget_states(block)

    def _note_two_forwards(self, skeleton: Skeleton, layers: Sequence[LinearLayer], first: int) -> None:
        """Say so where states in flight do not fit; only once, however often the run is interrupted."""
        needed = bytes_in_flight(skeleton, self.calibration.tokens, layers)
        if self.memory_limit is None or needed <= self.memory_limit or first > 0:
            return
        why = f"states in flight would take {needed:,} bytes, and {self.memory_limit:,} are allowed"
        self._solver.note(Note("calibration", "blocks run some three times, their states wait in a file", why))

    def _measured(self, skeleton: Skeleton, layers: Sequence[LinearLayer]) -> KeptImportance:
        """What the importance pass found, now or before an interruption."""
        kept = KeptImportance(self.folder.scratch, self._coupled)
        if not kept.is_measured:
            self.progress.begin("importance", (1 + BACKWARD_STEPS) * len(skeleton.blocks), "steps")
            before = time.perf_counter()
            kept.measure(
                skeleton, self.calibration.ids, layers, self.seed, self.memory_limit,
                lambda stage, done, total: self.progress.advance(
                    BACKWARD_STEPS if stage == "backward" else 1, f"{stage}: block {done} of {total}"
                ),
            )  # fmt: skip
            self.progress.end()
            self.importance_s = time.perf_counter() - before
        return kept

    def _states(self, first: int) -> tuple[States | None, Mapping[int, torch.Tensor] | None]:
        """States behind the last finished block, and the original model's there if it is followed.

        Without them the pass starts over, to the same bytes.
        """
        path, originals = self._states_paths(first - 1)
        if first == 0 or not path.exists() or (self._is_following and not originals.exists()):
            return None, None
        return load_states(path), load_original_states(originals) if self._is_following else None

    def _states_paths(self, block: int) -> tuple[Path, Path]:
        scratch = self.folder.scratch
        return scratch / STATES_FILE.format(block=block), scratch / ORIGINAL_STATES_FILE.format(block=block)

    def _forget_states(self, block: int) -> None:
        for path in self._states_paths(block):
            path.unlink(missing_ok=True)

    def _follows(self, layers: Sequence[LinearLayer]) -> bool:
        """Whether layers are solved by how far their input has drifted: by GPTQ, with importance."""
        return all(layer.name in self._coupled for layer in layers)

    def _check_finite(self, layer: LinearLayer, weight: torch.Tensor) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteWeights(self.plan.source.tensors[layer.tensor], layer.name)

    def _finish(self, done: BlockDone, work: ShardWork, reader: TensorReader, *, write: bool) -> None:
        """Write one block's shard and states, then the journal's line."""
        solved = self._solver.finish()
        notes = [*solved.notes, *done.notes]
        if not write:
            return
        if self.strict and notes:
            raise PlanError(f"strict: {notes[0]}", "resolve it in the config, or run without --strict")
        edits = solved.edits
        shard = self.plan.shards[work.number]
        writer = ShardWriter(self.folder.path, shard)
        try:
            for entry, layer in work.sources:
                if layer is None:
                    content = torch.empty(entry.nbytes, dtype=torch.uint8)
                    if entry.name in edits.tensors:
                        content = edits.tensors[entry.name].contiguous().view(-1).view(torch.uint8)
                    else:
                        reader.read_bytes(entry.name, 0, content)
                    if holds_nonfinite(content.numpy(), entry.dtype):
                        raise NonFiniteWeights(entry, None)
                    writer.write(entry.name, content)
                    continue
                weight = edits.quantized[layer.layer.tensor]
                encoded = FORMATS[self.plan.format].encode(layer.name, weight, layer.shape)
                for name, tensor in encoded.items():
                    writer.write(name, tensor)
            digests = writer.close()
        finally:
            writer.abort()
        path, originals = self._states_paths(done.block)
        if done.save_states(path):
            done.save_original_states(originals)
        records = [asdict(solved.records[layer.name]) for _, layer in work.sources if layer is not None]
        for note in notes:
            self.progress.note(note)
        self.journal.append(
            shard.file,
            digests,
            records,
            [asdict(note) for note in notes],
            {"folds": [fold.to_dict() for fold in solved.folds]},
        )
        self._forget_states(done.block - 1)
