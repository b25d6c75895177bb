"""Hidden states in memory and in a file: what was put in comes out, places are reused, a full disk is told of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.block_inputs import BlockInputs
from fewbits.errors import OutputError

MICRO_BATCHES = [4, 4, 4, 1]  # the last is smaller
BLOCKS = 9
NBYTES = sum(MICRO_BATCHES) * 8 * 2


def state(block: int, micro_batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * block + micro_batch)
    return torch.randn(MICRO_BATCHES[micro_batch], 8, generator=generator).bfloat16()


def everything(block: int) -> list[tuple[int, int]]:
    return [(block, micro_batch) for micro_batch in range(len(MICRO_BATCHES))]


@pytest.mark.parametrize("memory_limit", [1 << 20, 0], ids=["memory", "file"])
def test_all_blocks_come_back_where_there_is_room(memory_limit: int, tmp_path: Path) -> None:
    with BlockInputs(BLOCKS, NBYTES, memory_limit, 1 << 20, tmp_path) as inputs:
        assert inputs.stride == 1 and inputs.in_file == (memory_limit == 0)
        for block in range(BLOCKS):
            for place in everything(block):
                inputs.keep(*place, state(*place))
        for block in reversed(range(BLOCKS)):
            for place in everything(block):
                assert torch.equal(inputs.look(*place), state(*place))
                assert torch.equal(inputs.take(*place), state(*place))
            assert not inputs.has(block)


def test_places_of_smaller_states_are_not_given_to_larger_ones(tmp_path: Path) -> None:
    """On the way back, blocks between two kept ones take the places of those already done."""
    with BlockInputs(BLOCKS, NBYTES, 0, NBYTES * 5, tmp_path) as inputs:
        assert inputs.stride == 3
        kept = [block for block in range(BLOCKS) if inputs.wants(block)]
        for block in kept:
            for place in everything(block):
                inputs.keep(*place, state(*place))
        for block in reversed(range(BLOCKS)):
            start = max(known for known in range(block + 1) if inputs.has(known))
            for again in range(start + 1, block + 1):
                for place in everything(again):
                    inputs.keep(*place, state(*place))
            for known in range(BLOCKS):
                for place in everything(known) if inputs.has(known) else []:
                    assert torch.equal(inputs.look(*place), state(*place)), place
            for place in everything(block):
                assert torch.equal(inputs.take(*place), state(*place))


def test_a_full_disk_is_told_of_and_leaves_nothing(small_disk: Path) -> None:
    with BlockInputs(2, 1 << 22, 0, 1 << 23, small_disk) as inputs:
        with pytest.raises(OutputError, match=r"cannot be written to .*disk") as raised:
            for micro_batch in range(4):
                inputs.keep(0, micro_batch, torch.zeros(1 << 19, dtype=torch.bfloat16))
        assert raised.value.hint is not None and "free some space" in raised.value.hint
    assert list(small_disk.iterdir()) == []
