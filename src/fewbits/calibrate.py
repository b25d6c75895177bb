"""Calibrate: run the model's own forward once; each linear's weight and statistic go to whoever chooses its codes.

`run_blocks` yields after every block, so that the caller can finish its file, save the hidden states and report. Inside
a block every micro-batch is suspended at each distinct linear input (`suspended.py`) until all have arrived there; H is
complete then, `solve` is called with all consumers of that input, and the forward goes on with the weights it returned:

    for done in run_blocks(skeleton, ids, layers, solve):
        write_shard(done.block)
        done.save_states(folder / "states.safetensors")      # resume with load_states(…), start_block=done.block + 1

Which linears share an input is found by one micro-batch's dry run. Where the states of all micro-batches would not fit
into the memory limit, micro-batches run one after the other instead, each up to the next input and, once the codes
there are chosen, from the block's beginning again; what lies between two blocks waits in a file. Results are the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fewbits.block_folds import Folding
from fewbits.block_inputs import BlockInputs
from fewbits.block_run import BlockRun, Solve, Timings, TokenWeights, Watcher
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.layers import LinearLayer
from fewbits.notes import Note
from fewbits.originals import Follows, Originals, stride_of
from fewbits.paging import Pager
from fewbits.skeleton import Skeleton
from fewbits.states import States, write_states
from fewbits.suspended import SuspendedForward, hidden_of, structure_of

# Tokens of a micro-batch, at least and at most; between these its widest activations are no more numbers than that.
LEAST_TOKENS, MOST_TOKENS, MOST_NUMBERS = 2048, 4096, 1 << 23
# Hidden states that take more than this lie in mapped files between blocks.
PAGED_BYTES = 1 << 26


@dataclass(frozen=True)
class BlockDone:
    """A block whose linears are all solved. timings: of the pass so far. notes: of this block."""

    block: int
    name: str
    notes: tuple[Note, ...]
    timings: Timings
    _forward: SuspendedForward = field(repr=False)
    _originals: Originals | None = field(repr=False)

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

    def save_original_states(self, path: Path) -> None:
        """Write those of the original model, where it is followed.

        Raises:
            OutputError: the disk is full or fails.
        """
        if self._originals is not None:
            self._originals.save_states(path)


def micro_batch_size(length: int, layers: Sequence[LinearLayer]) -> int:
    """Samples in one micro-batch: enough tokens for matrix products at full speed, few enough to stay in the cache.

    Matrix units are so fast that what goes on around products weighs more: narrow layers have more tokens there.
    """
    tokens = LEAST_TOKENS
    if HAS_MATRIX_UNITS:
        widest = max((max(layer.in_features, layer.out_features) for layer in layers), default=MOST_NUMBERS)
        tokens = min(max(tokens, MOST_NUMBERS // widest), MOST_TOKENS)
    return max(1, tokens // length)


def bytes_in_flight(skeleton: Skeleton, tokens: int, layers: Sequence[LinearLayer]) -> int:
    """What suspended forwards hold at most: for every token the residual, its norm, and the widest linear's input."""
    widest = max((layer.in_features for layer in layers), default=0)
    return tokens * (2 * skeleton.hidden_bytes + widest * skeleton.element_size)


def _pager(skeleton: Skeleton, tokens: int, folder: Path | None) -> Pager | None:
    """Where hidden states of all tokens are worth a file."""
    if folder is None or tokens * skeleton.hidden_bytes < PAGED_BYTES or not Pager.is_possible(str(skeleton.device)):
        return None
    return Pager(folder)


@torch.no_grad()
def run_blocks(
    skeleton: Skeleton,
    ids: torch.Tensor,
    layers: Sequence[LinearLayer],
    solve: Solve,
    *,
    token_weights: TokenWeights | None = None,
    folding: Folding | None = None,
    follows: Follows | None = None,
    states: States | None = None,
    original_states: Mapping[int, torch.Tensor] | None = None,
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
        follows: whether consumers of an input are solved by how far it has drifted from the original model's.
        states: where to go on from; blocks up to `states.block` are not run again.
        original_states: those of the original model there, where it is followed.
        memory_limit: bytes that states in flight may take; past them blocks run some three times.
        folder: where the file goes that states then wait in.
        watcher: told of every group of layers that is solved.
    """
    start_block = 0 if states is None else states.block + 1
    wanted: dict[int, dict[str, LinearLayer]] = {}
    for layer in layers:
        if layer.block is not None:
            wanted.setdefault(layer.block, {})[layer.tensor] = layer
    size = micro_batch or micro_batch_size(ids.shape[1], layers)
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
        pager=_pager(skeleton, ids.numel(), folder) if stash is None else None,
    )
    originals = None
    if follows is not None:
        together = max(sum(layer.in_features for layer in block.values()) for block in wanted.values())
        stride = stride_of(ids.numel(), max(layer.in_features for block in wanted.values() for layer in block.values()))
        originals = Originals(follows, original_states, stride, together * ids.numel() * skeleton.element_size, folder)
    with forward, stash or nullcontext(), originals or nullcontext():
        forward.start()
        forward.outputs = ()
        skeleton.release_embeddings()
        for index in range(start_block, len(skeleton.blocks)):
            forward.waiting_at(index)
            run = BlockRun(
                skeleton, forward, index, wanted.get(index, {}), solve, token_weights, folding, originals,
                timings, watcher,
            )  # fmt: skip
            notes = run.run()
            timings.total_s = time.perf_counter() - began
            timings.forward_s = (
                timings.total_s - timings.files_s - timings.statistics_s - timings.solve_s - timings.folds_s
            )
            yield BlockDone(index, skeleton.block_names[index], tuple(notes), timings, forward, originals)
