"""The journal: a run killed at any instant leaves nothing that looks finished, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbits.checkpoints.journal import Journal
from fewbits.checkpoints.partial import PartialFolder
from fewbits.checkpoints.reader import open_checkpoint
from fewbits.checkpoints.writer import ShardWriter
from fewbits.errors import CheckpointError, PlanError
from fewbits.layout import OutputTensor, Shard

BEGUN = {"source": "abc", "config": {"method": "int8"}, "calibration": None}
SHARDS = 4


def shard(number: int) -> Shard:
    return Shard(
        f"model-{number:05}-of-{SHARDS:05}.safetensors", (OutputTensor(f"layers.{number}.weight", "F32", (8, 4)),)
    )


def convert(out: Path) -> list[str]:
    """A conversion in small: as many shards as are missing, then index and config, then the final name."""
    made = []
    with PartialFolder(out) as folder:
        journal = Journal.open(folder.path, BEGUN)
        for number in range(1, SHARDS + 1):
            planned = shard(number)
            if planned.file in journal.finished:
                continue
            tensor = torch.full((8, 4), float(number))
            writer = ShardWriter(folder.path, planned)
            writer.write(planned.tensors[0].name, tensor[:4])
            writer.write(planned.tensors[0].name, tensor[4:], 64)
            journal.append(planned.file, writer.close(), layers=[{"name": f"layers.{number}"}])
            made.append(planned.file)
        weight_map = {shard(number).tensors[0].name: shard(number).file for number in range(1, SHARDS + 1)}
        folder.write_json("model.safetensors.index.json", {"weight_map": weight_map})
        folder.write_json("config.json", {"digests": [record["tensors"] for record in journal.finished.values()]})
        folder.finish()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(out)
    return contents(out)


def in_child(work: Callable[..., object], *arguments: object) -> int:
    """Run `work` in a forked process; return its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, out: Path, torn: bool) -> None:
    """Convert, and die without warning at the `step`-th call that touches the disk (half done, if torn)."""
    steps = 0

    def counting(name: str) -> None:
        call = getattr(os, name)

        def counted(*arguments: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            if steps == step:
                if torn and name in ("write", "pwrite"):
                    view = memoryview(arguments[1])  # type: ignore[arg-type]
                    call(arguments[0], view[: len(view) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        setattr(os, name, counted)

    for name in ("open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "truncate", "unlink", "ftruncate"):
        counting(name)
    convert(out)


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_step_nothing_looks_finished_and_the_same_bytes_come_out(
    torn: bool, whole: dict[str, bytes], tmp_path: Path
) -> None:
    step, status = 0, -signal.SIGKILL
    while status != 0:
        step += 1
        out = tmp_path / f"{step}" / "out"
        status = ended(in_child(killed_at, step, out, torn))
        assert status in (0, -signal.SIGKILL)
        if out.exists():
            assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == whole
            open_checkpoint(out)
            continue
        with pytest.raises(CheckpointError):
            open_checkpoint(out)
        convert(out)
        assert contents(out) == whole, f"killed at step {step}"
        assert not out.with_name("out.partial").exists()
    assert step > 50, "every step was tried"


def test_killed_again_and_again_at_random_it_still_comes_to_the_same_bytes(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    generator, out, kills = random.Random(0), tmp_path / "out", 0
    for attempt in range(200):
        child = in_child(convert, out)
        time.sleep(generator.uniform(0, 0.0005 * attempt))
        os.kill(child, signal.SIGKILL)
        if ended(child) == 0 or out.exists():
            break
        kills += 1
    else:
        convert(out)
    assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == whole
    assert kills > 0


def stopped_after(count: int, out: Path) -> Path:
    """Leave an interrupted conversion behind that finished `count` shards."""
    with PartialFolder(out) as folder, Journal.open(folder.path, BEGUN) as journal:
        for number in range(1, count + 1):
            planned = shard(number)
            writer = ShardWriter(folder.path, planned)
            writer.write(planned.tensors[0].name, torch.full((8, 4), float(number)))
            journal.append(planned.file, writer.close(), layers=[{"name": f"layers.{number}"}])
        return folder.path


def test_finished_shards_are_not_made_again(whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped_after(2, tmp_path / "out")
    assert convert(tmp_path / "out") == [shard(3).file, shard(4).file]
    assert contents(tmp_path / "out") == whole


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    with Journal.open(folder, BEGUN) as journal:
        (folder / "a.safetensors").write_bytes(b"12345")
        journal.append(
            "a.safetensors", {"x": "ff"}, [{"name": "x", "error": float("nan")}], [{"why": "é\n"}], {"seed": 3}
        )
        journal.carry("layers.0.down_proj")
    with Journal.open(folder, BEGUN) as journal:
        record = journal.finished["a.safetensors"]
        assert record["bytes"] == 5
        assert record["tensors"] == {"x": "ff"}
        assert record["layers"][0]["error"] != record["layers"][0]["error"]
        assert record["notes"] == [{"why": "é\n"}]
        assert record["extra"] == {"seed": 3}
        assert journal.carried == ["layers.0.down_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "abd"}, r"another source \(source: \"abc\" then, \"abd\" now\)"),
        ({"config": {"method": "int4"}}, r"another config\.method \(config\.method: \"int8\" then, \"int4\" now\)"),
        ({"seed": 1}, r"another seed \(seed: null then, 1 now\)"),
        ({"source": "x", "calibration": "y"}, r"another source and calibration"),
        ({"config": "c" * 1000}, r"another config .{0,150} now\)\.\n"),
    ],
)
def test_going_on_with_something_else_is_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = stopped_after(2, tmp_path / "out")
    before = contents(folder)
    with PartialFolder(tmp_path / "out") as partial, pytest.raises(PlanError, match=message) as caught:
        Journal.open(partial.path, {**BEGUN, **change})
    assert f"delete {folder}" in str(caught.value.hint)
    assert contents(folder) == before


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    folder = stopped_after(3, tmp_path / "out")
    file = folder / ".fewbits" / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        (folder / shard(3).file).write_bytes(b"")
        with Journal.open(folder, BEGUN) as journal:
            assert list(journal.finished) == [shard(1).file, shard(2).file]
        assert file.read_bytes() == b"".join(lines[:-1])
        assert not (folder / shard(3).file).exists(), "a shard without a record is made again"


@pytest.mark.parametrize("damage", [b"\0" * 40, b"[]\n", b'{"shard": "x"}\n', b"\xff\xfe\n"])
def test_a_damaged_line_ends_the_journal_there(damage: bytes, tmp_path: Path) -> None:
    folder = stopped_after(3, tmp_path / "out")
    file = folder / ".fewbits" / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    with Journal.open(folder, BEGUN) as journal:
        assert list(journal.finished) == [shard(1).file]


@pytest.mark.parametrize("lost", ["gone", "cut"])
def test_a_shard_that_is_gone_takes_the_later_ones_along(lost: str, tmp_path: Path) -> None:
    folder = stopped_after(3, tmp_path / "out")
    if lost == "gone":
        (folder / shard(2).file).unlink()
    else:
        os.truncate(folder / shard(2).file, 10)
    with Journal.open(folder, BEGUN) as journal:
        assert list(journal.finished) == [shard(1).file]
    assert [path.name for path in folder.glob("*.safetensors")] == [shard(1).file]


def test_the_journal_is_plain_json_lines(tmp_path: Path) -> None:
    folder = stopped_after(1, tmp_path / "out")
    lines = (folder / ".fewbits" / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"fingerprint": BEGUN}
    assert json.loads(lines[1])["shard"] == shard(1).file
