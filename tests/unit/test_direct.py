"""Writes past the page cache leave the bytes that plain writes leave, wherever they begin and end."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fewbits.checkpoints.direct import BLOCK, PIECE_BYTES, DirectFile

SIZE = 3 * PIECE_BYTES + 777


@contextmanager
def opened(path: Path) -> Iterator[DirectFile]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, SIZE)
    file = DirectFile(path, descriptor)
    try:
        yield file
    finally:
        file.close()
        os.fsync(descriptor)
        os.close(descriptor)


def write_in_pieces(path: Path, cuts: list[int]) -> None:
    content = random.Random(0).randbytes(SIZE)
    edges = [0, *sorted(cuts), SIZE]
    spans = list(itertools.pairwise(edges))
    random.Random(1).shuffle(spans)
    with opened(path) as file:
        for start, stop in spans:
            file.write_at(memoryview(content)[start:stop], start)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "cuts",
    [[], [BLOCK], [8], [BLOCK - 1, BLOCK + 1], [8, PIECE_BYTES + 8, 2 * PIECE_BYTES + 9], [5000, 5001, 8191, 8192]],
    ids=str,
)
def test_pieces_in_any_order_make_the_file(cuts: list[int], tmp_path: Path) -> None:
    write_in_pieces(tmp_path / "file", cuts)


def test_a_file_system_that_opens_no_such_files_is_written_the_usual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct files")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    write_in_pieces(tmp_path / "file", [8, 70000])


def test_a_file_system_that_refuses_such_writes_is_written_the_usual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, direct = os.pwrite, set()
    real_open = os.open

    def noting(path: Any, flags: int, *rest: Any) -> int:
        descriptor = real_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refusing(descriptor: int, content: Any, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "blocks are larger here")
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "open", noting)
    monkeypatch.setattr(os, "pwrite", refusing)
    write_in_pieces(tmp_path / "file", [8, 70000])


def test_a_full_disk_is_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with opened(tmp_path / "file") as file:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space left"):
            file.write_at(memoryview(bytes(3 * BLOCK)), 0)
