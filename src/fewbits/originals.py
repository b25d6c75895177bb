"""Originals: what the unquantized model passes from block to block, for some of the text, and its inputs in one block.

Beside the forward whose linears are being quantized, some of its micro-batches go through each block as it is in the
files, one after the other, before any of its codes are chosen. From their inputs the drift is measured (`drift.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fewbits.block_inputs import BlockInputs
from fewbits.layers import LinearLayer
from fewbits.states import write_tensors
from fewbits.suspended import MicroBatch, SuspendedForward, hidden_of, with_first_tensor

# Whether the consumers of one input are solved by how far it has drifted from the original model's.
Follows = Callable[[Sequence[LinearLayer]], bool]
# At most one in so many micro-batches goes through the original model, and no more tokens than this many times the
# widest linear's inputs: what more would add to the estimate of drift is not worth their time.
SHORTEST_STRIDE = 2
TOKENS_PER_CHANNEL = 8
# Bytes of one block's inputs that are held in memory; past them they wait in a file.
MEMORY_LIMIT = 1 << 28


class Originals:
    """States and inputs of the original model, by micro-batch.

    Args:
        follows: which linears are solved by their drift.
        states: those behind the last block that is not run, by the micro-batch's number; None to start with the first.
        stride: of so many micro-batches one goes through the original model. nbytes: of the inputs of a block's
            linears, all micro-batches together.
        folder: where inputs wait.
    """

    def __init__(
        self,
        follows: Follows,
        states: Mapping[int, torch.Tensor] | None,
        stride: int,
        nbytes: int,
        folder: Path | None,
    ) -> None:
        self.follows = follows
        self._states, self._stride = dict(states or {}), stride
        self._inputs = BlockInputs(1, nbytes // stride, MEMORY_LIMIT, nbytes, folder)
        self._kept: set[tuple[int, int]] = set()

    def __enter__(self) -> Originals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inputs.__exit__(kind, error, trace)

    def takes(self, micro_batch: MicroBatch) -> bool:
        """Whether the original model goes through a micro-batch."""
        return micro_batch.index % self._stride == 0

    def run_block(self, forward: SuspendedForward, index: int) -> None:
        """Run a block, as it still is, on what the original model passes on; inputs of the block before are dropped."""
        for place, number in sorted(self._kept):
            self._inputs.drop(place, number)
        self._kept.clear()
        for micro_batch in filter(self.takes, forward.micro_batches):
            arguments = forward.arguments_of(index, micro_batch)
            if micro_batch.index in self._states:
                arguments = with_first_tensor(*arguments, self._states[micro_batch.index].to(forward.skeleton.device))
            output = forward.call(index, micro_batch, arguments)
            states = hidden_of(output).detach().cpu()
            self._states[micro_batch.index] = states if forward.pager is None else forward.pager.paged(states)

    def keep(self, place: int, micro_batch: MicroBatch, inputs: torch.Tensor) -> None:
        """Keep what linears at some place of the block at hand multiply or give; only the first of a micro-batch."""
        if (place, micro_batch.index) not in self._kept:
            self._kept.add((place, micro_batch.index))
            self._inputs.keep(place, micro_batch.index, inputs)

    def inputs(self, place: int, micro_batch: MicroBatch) -> torch.Tensor | None:
        """What was kept; None if nothing was."""
        kept = (place, micro_batch.index) in self._kept
        return self._inputs.look(place, micro_batch.index) if kept else None

    def save_states(self, path: Path) -> None:
        """Write what the block just run passes on, to go on from later.

        Raises:
            OutputError: the disk is full or fails.
        """
        write_tensors(path, {str(index): states for index, states in sorted(self._states.items())})


def stride_of(tokens: int, widest: int) -> int:
    """Of how many micro-batches one goes through the original model, where `widest` is a linear's most inputs."""
    return max(SHORTEST_STRIDE, round(tokens / (TOKENS_PER_CHANNEL * widest)))


def load_original_states(path: Path) -> dict[int, torch.Tensor]:
    """What `Originals.save_states` wrote."""
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(str(path))
    return {int(name): states for name, states in found.items()}
