"""Hidden states in mapped files: the same numbers, with their pages given back and read again."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from fewbits.errors import OutputError
from fewbits.paging import Pager

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are let go on Linux only")


def resident_file_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssFile")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_stay_when_their_pages_are_let_go(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(3, 700, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    pager = Pager(tmp_path)
    paged = pager.paged(states.transpose(0, 1))
    assert not list(tmp_path.iterdir())
    pager.let_go()
    assert torch.equal(paged, states.transpose(0, 1))
    paged[5] += 1
    pager.let_go()
    assert torch.equal(paged[5], states[:, 5] + 1) and torch.equal(paged[6:], states[:, 6:].transpose(0, 1))


def test_pages_that_are_let_go_take_no_memory(tmp_path: Path) -> None:
    pager = Pager(tmp_path)
    kept = [pager.paged(torch.ones(8 << 20)) for _ in range(4)]
    assert all(float(states.sum()) == 8 << 20 for states in kept)
    before = resident_file_bytes()
    pager.let_go()
    assert before - resident_file_bytes() > 100 << 20
    del kept
    gc.collect()
    pager.let_go()
    assert not pager._tensors


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"):
        Pager(tmp_path / "missing").paged(torch.zeros(3))
