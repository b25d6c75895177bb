"""Writing shards and finishing folders: the bytes the safetensors library writes, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from handmade import make_checkpoint, make_folder, tiny_tensors
from safetensors.torch import load_file, save

from fewbits.checkpoints.partial import PartialFolder
from fewbits.checkpoints.reader import open_checkpoint
from fewbits.checkpoints.writer import ShardWriter
from fewbits.errors import OutputError, PlanError
from fewbits.layout import STORED_TYPES, OutputTensor, Shard, stored_dtype

FILE = "model.safetensors"


def shard_of(tensors: dict[str, torch.Tensor]) -> Shard:
    return Shard(FILE, tuple(OutputTensor(n, stored_dtype(t.dtype), tuple(t.shape)) for n, t in tensors.items()))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def one_of_each_dtype() -> dict[str, torch.Tensor]:
    names = [stored.torch_name for stored in STORED_TYPES.values() if stored.torch_name]
    numbers = torch.arange(48, dtype=torch.uint8)
    tensors = {
        f"t{7 * place % 23}": numbers.clone().view(getattr(torch, name))
        for place, name in enumerate(names)
        if name != "bool"
    }
    return tensors | {"flags": torch.tensor([True, False, True])}


@pytest.mark.parametrize("tensors", [tiny_tensors(), one_of_each_dtype(), {'é\x01"\\': torch.ones(1)}])
def test_files_are_byte_for_byte_those_of_the_safetensors_library(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shard = shard_of(tensors)
    writer = ShardWriter(tmp_path, shard)
    for name in sorted(tensors, reverse=True):
        writer.write(name, tensors[name])
    digests = writer.close()
    written = (tmp_path / FILE).read_bytes()
    assert written == save(tensors, {"format": "pt"})
    assert len(written) == shard.nbytes
    assert digests == {n: hashlib.sha256(bytes(raw(t).tolist())).hexdigest() for n, t in tensors.items()}


def test_every_pair_of_dtypes_is_ordered_as_the_safetensors_library_orders_it() -> None:
    tensors = one_of_each_dtype()
    for one, other in itertools.permutations(tensors.values(), 2):
        pair = {"b": one, "a": other}
        header = shard_of(pair).header()
        assert save(pair, {"format": "pt"}).startswith(header)


def test_every_tensor_is_aligned_to_its_dtype() -> None:
    shard = shard_of(one_of_each_dtype())
    for tensor in shard.tensors:
        assert shard.offsets[tensor.name] % (STORED_TYPES[tensor.dtype].bits // 8) == 0


def test_the_order_of_the_plan_does_not_change_the_file() -> None:
    tensors = list(shard_of(tiny_tensors()).tensors)
    headers = {Shard(FILE, tuple(random.Random(seed).sample(tensors, len(tensors)))).header() for seed in range(9)}
    assert len(headers) == 1


def test_a_tensor_planned_twice_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="tensor a is planned more than once"):
        Shard(FILE, (OutputTensor("a", "F32", (1,)), OutputTensor("a", "F32", (2,))))


def test_tensors_may_be_written_run_by_run_and_in_turns(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(40, 7), "b": torch.randn(9, 5).bfloat16(), "c": torch.arange(100)}
    writer = ShardWriter(tmp_path, shard_of(tensors))
    generator, done = random.Random(0), dict.fromkeys(tensors, 0)
    while any(done[name] < raw(tensor).numel() for name, tensor in tensors.items()):
        name = generator.choice(sorted(tensors))
        run = raw(tensors[name])[done[name] : done[name] + generator.randint(1, 40)]
        writer.write(name, run, done[name])
        done[name] += run.numel()
    digests = writer.close()
    assert (tmp_path / FILE).read_bytes() == save(tensors, {"format": "pt"})
    assert digests["b"] == hashlib.sha256(bytes(raw(tensors["b"]).tolist())).hexdigest()


def test_tensors_that_are_not_contiguous_are_written_by_their_rows(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 4).T}
    writer = ShardWriter(tmp_path, shard_of(tensors))
    writer.write("a", tensors["a"])
    writer.close()
    assert torch.equal(load_file(tmp_path / FILE)["a"], tensors["a"])


def test_no_byte_can_be_left_out_written_twice_or_put_elsewhere(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_of({"a": torch.zeros(4), "b": torch.zeros(0)}))
    with pytest.raises(ValueError, match="no tensor c"):
        writer.write("c", torch.zeros(1))
    with pytest.raises(ValueError, match="byte 0 of 16 is next, got byte 4"):
        writer.write("a", torch.zeros(1), 4)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="byte 8 of 16 is next, got byte 0"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="8 bytes of 16 are left to write, got 12"):
        writer.write("a", torch.zeros(3), 8)
    with pytest.raises(ValueError, match="a has 8 of 16 bytes"):
        writer.close()
    assert not (tmp_path / FILE).exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_until_it_is_closed_a_shard_does_not_have_its_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_of({"a": torch.zeros(4)}))
    writer.write("a", torch.zeros(4))
    assert not list(tmp_path.glob("*.safetensors"))
    writer.close()
    writer.abort()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: whole(fd, view[:5], offset))
    writer = ShardWriter(tmp_path, shard_of({"a": torch.arange(9)}))
    writer.write("a", torch.arange(9))
    writer.close()
    assert torch.equal(load_file(tmp_path / FILE)["a"], torch.arange(9))


# --- a disk that is full -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where the system lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_found_before_the_first_tensor(small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"disk is full: 2,000,\d+ bytes needed, 1,048,576 free") as caught:
        ShardWriter(small_disk, Shard(FILE, (OutputTensor("a", "U8", (2_000_000,)),)))
    assert "free some space" in str(caught.value.hint)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_leaves_no_shard(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    writer = ShardWriter(small_disk, Shard(FILE, (OutputTensor("a", "U8", (2_000_000,)),)))
    with pytest.raises(OutputError, match="disk is full"):
        for start in range(0, 2_000_000, 100_000):
            writer.write("a", torch.zeros(100_000, dtype=torch.uint8), start)
    writer.abort()
    assert list(small_disk.iterdir()) == []


def test_a_result_too_large_for_the_disk_is_refused_before_the_work(small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"too full: 2,000,000 bytes needed, 1,0\d\d,\d+ free"):
        PartialFolder(small_disk / "out", None, 2_000_000)
    assert list(small_disk.iterdir()) == []


def test_what_an_earlier_run_wrote_counts_as_room(small_disk: Path) -> None:
    with PartialFolder(small_disk / "out") as folder:
        (folder.path / FILE).write_bytes(bytes(700_000))
    with PartialFolder(small_disk / "out", None, 1_000_000) as folder:
        assert (folder.path / FILE).stat().st_size == 700_000


LIMITED = """
import resource, sys, torch
from pathlib import Path
from fewbits.checkpoints.writer import ShardWriter
from fewbits.layout import OutputTensor, Shard
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
ShardWriter(Path(sys.argv[1]), Shard("model.safetensors", (OutputTensor("a", "U8", (100_000,)),)))
"""


def test_a_limit_on_file_sizes_is_said_to_be_one(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=False)
    assert "OutputError" in run.stderr
    assert "larger than is allowed here: 100,104 bytes needed" in run.stderr
    assert "ulimit -f" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_set_room_aside_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    writer = ShardWriter(tmp_path, shard_of({"a": torch.arange(9)}))
    writer.write("a", torch.arange(9))
    writer.close()
    assert torch.equal(load_file(tmp_path / FILE)["a"], torch.arange(9))


# --- OUT and OUT.partial -------------------------------------------------------------------------------------------


def fill(folder: PartialFolder, value: float = 1.0) -> None:
    """Write a whole little checkpoint."""
    tensors = {"a.weight": torch.full((4, 4), value)}
    writer = ShardWriter(folder.path, shard_of(tensors))
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


# --- killed between the two renames of an overwrite ----------------------------------------------------------------

KILLED = """
import os, sys, signal
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
folder.finish()
"""


@pytest.mark.parametrize("at", [1, 2])
def test_an_overwrite_killed_between_its_renames_loses_neither(at: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with PartialFolder(out) as folder:
        fill(folder)
        folder.finish()
    run = subprocess.run([sys.executable, "-c", KILLED, out, str(at)], capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr
    assert out.exists() == (at == 1)
    with PartialFolder(out, overwrite=True) as folder:
        assert value_in(out) == 1.0, "the old one is back, or was never gone"
        fill(folder, 2.0)
        folder.finish()
    assert value_in(out) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
