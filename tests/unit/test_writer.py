"""Writing shards: the bytes the safetensors library writes, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from fewbits.checkpoints.writer import ShardWriter
from fewbits.errors import OutputError
from fewbits.layout import STORED_TYPES, OutputTensor, Shard, stored_dtype
from handmade import tiny_tensors

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
