"""Reading checkpoints: every tensor as the safetensors library reads it, from one file or several."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.checkpoints.reader import TensorReader, open_checkpoint
from fewbits.errors import CheckpointError
from handmade import CONFIG, make_checkpoint, make_folder, tiny_tensors


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def test_every_tensor_is_read_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    expected = load_file(tmp_path / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    with TensorReader(checkpoint) as reader:
        for name, tensor in expected.items():
            assert same_bytes(reader.read(name), tensor), name


def test_rows_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    name = "model.layers.0.mlp.up_proj.weight"
    whole = tiny_tensors()[name]
    with TensorReader(checkpoint) as reader:
        for start in range(17):
            for stop in range(start, 17):
                assert same_bytes(reader.read_rows(name, start, stop), whole[start:stop])


def test_rows_are_read_into_the_callers_memory_and_nowhere_past_them(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    name = "model.layers.0.mlp.up_proj.weight"
    buffer = torch.full((400,), 0xAA, dtype=torch.uint8)
    with TensorReader(checkpoint) as reader:
        rows = reader.read_rows(name, 3, 7, out=buffer)
    assert rows.data_ptr() == buffer.data_ptr()
    assert same_bytes(rows, tiny_tensors()[name][3:7])
    assert (buffer[4 * 8 * 2 :] == 0xAA).all()


def test_bytes_are_the_bytes_of_the_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    name = "model.embed_tokens.weight"
    expected = tiny_tensors()[name].view(torch.uint8).view(-1)
    out = torch.empty(100, dtype=torch.uint8)
    with TensorReader(checkpoint) as reader:
        reader.read_bytes(name, 33, out)
    assert torch.equal(out, expected[33:133])


def test_rows_outside_of_the_tensor_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    with TensorReader(checkpoint) as reader:
        with pytest.raises(ValueError, match="has 32 rows; rows 30 to 33"):
            reader.read_rows("model.embed_tokens.weight", 30, 33)
        with pytest.raises(CheckpointError, match="has no tensor nonsense"):
            reader.read("nonsense")


def make_sharded(path: Path) -> dict[str, torch.Tensor]:
    tensors = tiny_tensors()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    weight_map = {name: file for file, part in parts.items() for name in part}
    make_folder(path, {"model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}})
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file)
    return tensors


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    tensors = make_sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name[:11] for file in checkpoint.files] == ["model-00001", "model-00002"]
    with TensorReader(checkpoint) as reader:
        assert all(same_bytes(reader.read(name), tensor) for name, tensor in tensors.items())


def test_a_single_file_of_any_name_will_do(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert len(open_checkpoint(tmp_path).tensors) == len(tiny_tensors())


def test_links_are_followed_as_in_a_hub_cache(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "blobs", tiny_tensors())
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/config.json")
    checkpoint = open_checkpoint(snapshot)
    with TensorReader(checkpoint) as reader:
        assert reader.read("steps").item() == 7
    assert [path.name for path in checkpoint.companions] == ["tokenizer.json"]


def test_small_files_come_along_and_weights_of_any_kind_do_not(tmp_path: Path) -> None:
    come = ["LICENSE", "README.md", "additional_chat_templates/tool.jinja", "chat_template.jinja", "merges.txt"]
    come += ["generation_config.json", "modeling_own.py", "tokenizer.json", "tokenizer.model"]
    stay = ["pytorch_model.bin", "pytorch_model.bin.index.json", "rest.gguf", "training_args.bin", ".gitattributes"]
    stay += ["other/notes.txt", "consolidated.safetensors", "tf_model.h5"]
    make_folder(tmp_path, dict.fromkeys(come + stay, "x"))
    make_checkpoint(tmp_path, tiny_tensors())
    companions = open_checkpoint(tmp_path).companions
    assert sorted(str(path.relative_to(tmp_path)) for path in companions) == sorted(come)


def test_a_large_file_beside_the_weights_is_left_with_a_note(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_tensors())
    with (tmp_path / "corpus.txt").open("wb") as file:
        file.truncate(65 * 2**20)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.companions == ()
    assert [note.layer for note in checkpoint.notes] == ["corpus.txt"]


def test_the_fingerprint_changes_with_config_header_and_time(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_checkpoint(tmp_path).fingerprint()

    make_checkpoint(tmp_path, tiny_tensors())
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(0, 0))
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    make_folder(tmp_path, {}, CONFIG | {"rope_theta": 1})
    seen.append(fingerprint())
    os.utime(file, ns=(0, 1))
    seen.append(fingerprint())
    save_file({f"a.{name}": tensor for name, tensor in tiny_tensors().items()}, file)
    os.utime(file, ns=(0, 1))
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_a_file_that_changes_after_it_was_opened_is_not_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with TensorReader(checkpoint) as reader, pytest.raises(CheckpointError, match="changed after its header was read"):
        reader.read("steps")


def test_a_file_cut_short_while_it_is_read_is_named_with_the_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    with TensorReader(checkpoint) as reader:
        reader.read("steps")
        os.truncate(tmp_path / "model.safetensors", checkpoint.tensors["model.embed_tokens.weight"].offset + 100)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: tensor model\.embed_tokens\.weight ends after 100"
        ):
            reader.read("model.embed_tokens.weight")


def test_reading_works_where_preadv_and_fadvise_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "posix_fadvise")
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    with TensorReader(checkpoint) as reader:
        assert all(same_bytes(reader.read(name), tensor) for name, tensor in tiny_tensors().items())
        reader.forget("steps")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tiny_tensors()))
    with TensorReader(checkpoint) as reader:
        assert all(same_bytes(reader.read(name), tensor) for name, tensor in tiny_tensors().items())
