"""OUT.partial and OUT: nothing half-written under the final name, nothing of the user's lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.checkpoints.partial import PartialFolder
from fewbits.checkpoints.reader import open_checkpoint
from fewbits.checkpoints.writer import ShardWriter
from fewbits.errors import OutputError, PlanError
from fewbits.layout import OutputTensor, Shard
from handmade import make_checkpoint, make_folder, tiny_tensors

FILE = "model.safetensors"


def fill(folder: PartialFolder, value: float = 1.0) -> None:
    """Write a whole little checkpoint."""
    tensors = {"a.weight": torch.full((4, 4), value)}
    writer = ShardWriter(folder.path, Shard(FILE, (OutputTensor("a.weight", "F32", (4, 4)),)))
    writer.write("a.weight", tensors["a.weight"])
    writer.close()
    folder.write_json("config.json", {"model_type": "llama"})


def value_in(out: Path) -> float:
    return load_file(out / FILE)["a.weight"][0, 0].item()


def test_the_result_appears_under_its_name_when_it_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with PartialFolder(out) as folder:
        fill(folder)
        (folder.scratch / "states.bin").write_bytes(b"spilled")
        assert not out.exists()
        assert folder.finish() == out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", FILE]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    open_checkpoint(out)


def test_an_interrupted_run_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PartialFolder(tmp_path / "out") as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with PartialFolder(tmp_path / "out") as folder:
        folder.write_json("tokenizer.json", {})
    assert list(tmp_path.iterdir()) == []


def test_companions_come_along_byte_for_byte(tmp_path: Path) -> None:
    files = {"tokenizer.json": b'{"a": 1}\r\n', "chat_templates/tool.jinja": b"\x00\xff", "README.md": b""}
    make_folder(tmp_path / "source", dict(files))
    source = open_checkpoint(make_checkpoint(tmp_path / "source", tiny_tensors()))
    with PartialFolder(tmp_path / "out", source) as folder:
        fill(folder)
        folder.copy_companions()
        folder.finish()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_an_output_that_exists_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    out = make_folder(tmp_path / "out", {"config.json": "mine"})
    with pytest.raises(PlanError, match="exists already") as caught:
        PartialFolder(out)
    assert "--overwrite" in str(caught.value.hint)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PlanError, match="is a file"):
        PartialFolder(tmp_path / "file", overwrite=True)
    assert (out / "config.json").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


def test_overwriting_replaces_the_old_one_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for value in (1.0, 2.0):
        with PartialFolder(out, overwrite=True) as folder:
            fill(folder, value)
            assert value == 1.0 or value_in(out) == 1.0
            folder.finish()
        assert value_in(out) == value
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    home = make_folder(tmp_path / "home", {"thesis.tex": "years"}, None)
    with pytest.raises(PlanError, match="holds no checkpoint"):
        PartialFolder(home, overwrite=True)
    assert (home / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model", "is the source itself"),
        ("link", "is the source itself"),
        ("model/../model", "is the source itself"),
        ("model/out", "lies inside the source"),
        ("link/deep/out", "lies inside the source"),
        (".", "lies inside"),
    ],
)
def test_an_output_entangled_with_the_source_is_refused(out: str, message: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_checkpoint(tmp_path / "model", tiny_tensors()))
    (tmp_path / "link").symlink_to("model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PlanError, match=message):
        PartialFolder(tmp_path / out, source, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_process_is_kept_out_and_told_by_whom(tmp_path: Path) -> None:
    attempt = "import sys; from fewbits.checkpoints.partial import PartialFolder; PartialFolder(sys.argv[1])"
    with PartialFolder(tmp_path / "out") as folder:
        fill(folder)
        command = [sys.executable, "-c", attempt, str(tmp_path / "out")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"is being written by another process (pid {os.getpid()})" in run.stderr
        folder.finish()
    assert value_in(tmp_path / "out") == 1.0


def test_only_one_of_many_at_once_gets_the_folder(tmp_path: Path) -> None:
    opened: list[PartialFolder] = []
    refused: list[PlanError] = []

    def attempt() -> None:
        try:
            opened.append(PartialFolder(tmp_path / "out"))
        except PlanError as error:
            refused.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, 7)
    opened[0].close()


def test_a_folder_of_someone_else_in_the_way_is_left_alone(tmp_path: Path) -> None:
    other = make_folder(tmp_path / "out.partial", {"notes.txt": "mine"}, None)
    with pytest.raises(PlanError, match="in the way"):
        PartialFolder(tmp_path / "out")
    assert (other / "notes.txt").read_text() == "mine"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with PartialFolder(tmp_path / "out") as folder:
        fill(folder)
        make_folder(tmp_path / "out", {"config.json": "theirs"})
        with pytest.raises(OutputError, match="appeared while"):
            folder.finish()
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    assert (tmp_path / "out.partial" / FILE).exists()


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", Path("/proc/nothing/out"), tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            PartialFolder(target)
        assert str(target)[:20] in caught.value.message
        assert caught.value.exit_status == 1


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from fewbits.checkpoints.partial import PartialFolder
folder = PartialFolder(sys.argv[1], overwrite=True)
(folder.path / "model.safetensors").write_bytes(b"new")
folder.write_json("config.json", {})
renames = 0
rename = Path.rename
def counted(self, target):
    global renames
    renames += 1
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = counted
if sys.argv[2] == "3":
    shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
folder.finish()
"""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_overwrite_killed_around_its_renames_loses_neither(at: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with PartialFolder(out) as folder:
        fill(folder)
        folder.finish()
    before = shutil.copytree(out, tmp_path / "before")
    run = subprocess.run([sys.executable, "-c", KILLED, out, str(at)], capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr
    assert out.exists() == (at != 2)
    with PartialFolder(out, overwrite=True) as folder:
        old = b"new" if at == 3 else (before / FILE).read_bytes()
        assert (out / FILE).read_bytes() == old, "the old one is back, or was never gone"
        fill(folder, 2.0)
        folder.finish()
    assert value_in(out) == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "out"]


def test_a_result_too_large_for_the_disk_is_refused_before_the_work(small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"too full: 2,000,000 bytes needed, 1,0\d\d,\d+ free"):
        PartialFolder(small_disk / "out", None, 2_000_000)
    assert list(small_disk.iterdir()) == []


def test_what_an_earlier_run_wrote_counts_as_room(small_disk: Path) -> None:
    with PartialFolder(small_disk / "out") as folder:
        (folder.path / FILE).write_bytes(bytes(700_000))
    with PartialFolder(small_disk / "out", None, 1_000_000) as folder:
        assert (folder.path / FILE).stat().st_size == 700_000
