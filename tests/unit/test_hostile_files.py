"""Hostile checkpoints: each lie gets one message that says where, what was found and expected, and the way out."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fewbits.checkpoints.headers import read_weight_file
from fewbits.checkpoints.reader import open_checkpoint
from fewbits.errors import CheckpointError
from handmade import CONFIG, entry, file_bytes, make_checkpoint, make_folder, tiny_tensors

A = entry("F32", [2, 2], 0, 16)
B = entry("F32", [2, 2], 16, 32)
DATA = bytes(32)


def refusal(folder: Path, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    assert caught.value.exit_status == 2
    assert caught.value.hint, "every refusal says the way out"
    return caught.value


LIES: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["has 0 bytes", "8-byte header length"]),
    "shorter than a length": (b"\x01\x02", ["has 2 bytes"]),
    "header longer than the file": (file_bytes({"a": A}, DATA, length=1000), ["truncated", "1,000 bytes"]),
    "header of terabytes": (file_bytes({"a": A}, DATA, length=2**43), ["claims 8,796,093,022,208 bytes"]),
    "a large-file pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS pointer"]),
    "no object": (file_bytes(b"[1, 2]"), ["begins with b'[1, 2]'"]),
    "no JSON": (file_bytes(b'{"a": '), ["not valid JSON"]),
    "no UTF-8": (file_bytes(b'{"\xff": 1}'), ["not valid JSON"]),
    "nested without end": (file_bytes(b'{"a":' * 100_000), ["nested too deeply"]),
    "a number without end": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), ["not valid JSON"]),
    "a tensor twice": (
        file_bytes(b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}", DATA),
        ["the key a appears twice"],
    ),
    "an entry that is none": (file_bytes({"a": 3}), ["tensor a", "found a number"]),
    "an entry without a shape": (file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), ["data_offsets, dtype"]),
    "an entry with more": (file_bytes({"a": A | {"x": 1}}, DATA[:16]), ["tensor a", "x; expected dtype"]),
    "an unknown dtype": (file_bytes({"a": entry("F12", [2], 0, 3)}, DATA[:3]), ["tensor a", "unknown dtype F12"]),
    "a negative shape": (file_bytes({"a": entry("F32", [-2, -2], 0, 16)}, DATA[:16]), ["tensor a", "[-2, -2]"]),
    "a broken shape": (file_bytes({"a": entry("F32", [2.0, 2], 0, 16)}, DATA[:16]), ["tensor a", "[2.0, 2]"]),
    "a true shape": (file_bytes({"a": entry("F32", [True, 4], 0, 16)}, DATA[:16]), ["tensor a", "[True, 4]"]),
    "an enormous shape": (file_bytes({"a": entry("F32", [2**62, 2**62], 0, 16)}, DATA[:16]), ["takes", "span 16"]),
    "a shape too large for its bytes": (file_bytes({"a": entry("F32", [3, 2], 0, 16)}, DATA[:16]), ["24", "span 16"]),
    "offsets backwards": (file_bytes({"a": entry("F32", [2, 2], 16, 0)}, DATA), ["tensor a", "[16, 0]"]),
    "negative offsets": (file_bytes({"a": entry("F32", [2, 2], -16, 0)}, DATA), ["tensor a", "[-16, 0]"]),
    "three offsets": (file_bytes({"a": A | {"data_offsets": [0, 16, 32]}}, DATA), ["[begin, end]"]),
    "overlapping tensors": (
        file_bytes({"a": A, "b": entry("F32", [2, 2], 8, 24)}, DATA[:24]),
        ["tensor b", "overlaps tensor a"],
    ),
    "the same place twice": (file_bytes({"a": A, "b": A}, DATA[:16]), ["tensor b", "overlaps tensor a"]),
    "a gap": (file_bytes({"a": A, "b": entry("F32", [1], 20, 24)}, DATA[:24]), ["tensor b", "gap after tensor a"]),
    "a gap at the start": (file_bytes({"b": B}, DATA), ["tensor b", "gap after the header"]),
    "bytes after the last tensor": (file_bytes({"a": A}, DATA), ["so 16 belong to none"]),
    "data cut short": (file_bytes({"a": A, "b": B}, DATA[:20]), ["truncated", "expected 1", "tensor b ends there"]),
    "metadata that is no text": (file_bytes({"__metadata__": {"x": 1}, "a": A}, DATA[:16]), ["__metadata__"]),
    "no tensors": (file_bytes({}), ["hold no tensors"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    content, expected = LIES[lie]
    message = str(refusal(make_folder(tmp_path, {"model.safetensors": content})))
    assert str(tmp_path) in message
    for fragment in expected:
        assert fragment in message
    assert "\n" not in message.replace("\nhint: ", "")


def test_a_truncated_file_says_what_was_expected_and_found(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 1)
    assert f"expected {whole:,} bytes" in refusal(tmp_path).message
    assert f"found {whole - 1:,}" in refusal(tmp_path).message


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    evil = {"\x1b]0;owned\x07\n" + "x" * 1000: entry("F32", [3, 2], 0, 16)}
    message = refusal(make_folder(tmp_path, {"model.safetensors": file_bytes(evil, DATA[:16])})).message
    assert message.isprintable()
    assert len(message) < 600 + len(str(tmp_path))


VALID = save(tiny_tensors(), {"format": "pt"})
HEADER_BYTES = 8 + int.from_bytes(VALID[:8], "little")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES + 20), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_what_the_reader_accepts_the_safetensors_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    if data.draw(st.booleans(), "cut"):
        del content[data.draw(st.integers(0, len(content)), "length") :]
    file = tmp_path_factory.mktemp("mutated") / "model.safetensors"
    file.write_bytes(content)
    try:
        read = read_weight_file(file)
    except CheckpointError:
        return
    expected = {
        name: (tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(bytes(content))
    }
    assert {
        entry.name: (entry.shape, bytes(content[entry.offset : entry.offset + entry.nbytes])) for entry in read.tensors
    } == expected


def make_indexed(path: Path, weight_map: object, files: dict[str, dict[str, Any]]) -> Path:
    contents: dict[str, Any] = {
        name: file_bytes(
            {tensor: entry("F32", [1], 4 * i, 4 * i + 4) for i, tensor in enumerate(part)}, bytes(4 * len(part))
        )
        for name, part in files.items()
    }
    return make_folder(path, contents | {"model.safetensors.index.json": {"weight_map": weight_map}})


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "files", "expected"),
    [
        ({"a": ONE, "b": TWO}, {ONE: ["a"]}, [TWO, "is missing", "b first"]),
        ({"a": ONE, "b": ONE}, {ONE: ["a"]}, [f"says that {ONE} holds b, which it does not"]),
        ({"a": ONE, "b": ONE}, {ONE: ["a"], TWO: ["b"]}, [f"says that {ONE} holds b, which it does not"]),
        ({"a": TWO, "b": ONE}, {ONE: ["a"], TWO: ["b"]}, [f"says that {TWO} holds a; found it in {ONE}"]),
        ({"a": ONE}, {ONE: ["a", "b"]}, ["incomplete", f"{ONE} holds b"]),
        ({"a": ONE, "b": TWO}, {ONE: ["a", "b"], TWO: ["b"]}, ["tensor b lies in two files", ONE, TWO]),
        ({"a": "../../etc/passwd"}, {}, ["'../../etc/passwd'", "in the same folder"]),
        ({"a": "/etc/passwd"}, {}, ["'/etc/passwd'"]),
        ({"a": ".."}, {}, ["'..'"]),
        ({}, {ONE: ["a"]}, ["names no tensors"]),
        ([1], {ONE: ["a"]}, ["has no weight_map"]),
        ({"a": 1}, {ONE: ["a"]}, ["has no weight_map"]),
    ],
)
def test_an_index_that_lies_is_refused(
    weight_map: object, files: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    message = refusal(make_indexed(tmp_path, weight_map, files)).message
    assert "model.safetensors" in message or "tensor b" in message
    for fragment in expected:
        assert fragment in message


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    message = refusal(make_folder(tmp_path, {"model.safetensors.index.json": "{oops"})).message
    assert "model.safetensors.index.json" in message
    assert "not valid JSON" in message


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    content = file_bytes({"a": A}, DATA[:16])
    message = refusal(make_folder(tmp_path, {ONE: content, TWO: content})).message
    assert "2 safetensors files" in message
    assert "no model.safetensors.index.json" in message


FOLDERS: dict[str, tuple[dict[str, Any], Any, str, str]] = {
    "empty": ({}, None, "is empty", "fetch the checkpoint"),
    "config only": ({}, CONFIG, "has no safetensors file", "holds the weights"),
    "GGUF": ({"model.gguf": "GGUF"}, None, "GGUF files only", "original checkpoint"),
    "no config": ({"model.safetensors": VALID}, None, "has no config.json", "fetch it again"),
    "an adapter": ({"a.safetensors": VALID, "adapter_config.json": {}}, None, "has no config.json", "merge it"),
    "config no JSON": ({"model.safetensors": VALID}, "{", "not valid JSON", "fetch it again"),
    "config no object": ({"model.safetensors": VALID}, [1], "is a list; expected a JSON object", "fetch it again"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    files, config, message, hint = FOLDERS[kind]
    error = refusal(make_folder(tmp_path, files, config))
    assert message in error.message
    assert hint in str(error.hint)


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere").message
    make_checkpoint(tmp_path, tiny_tensors())
    error = refusal(tmp_path / "model.safetensors")
    assert "is a file" in error.message
    assert error.hint == f"give {tmp_path}"


def test_a_name_of_the_hub_is_told_how_to_be_downloaded() -> None:
    assert "hf download someone/Model-1B" in str(refusal(Path("someone/Model-1B")).hint)


def test_a_config_that_names_a_key_twice_is_read_as_everyone_reads_it(tmp_path: Path) -> None:
    make_folder(tmp_path, {"model.safetensors": VALID}, '{"vocab_size": 1, "vocab_size": 32}')
    assert open_checkpoint(tmp_path).config == {"vocab_size": 32}


class Bomb:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt"])
def test_pickles_are_refused_unopened(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    folder = make_folder(tmp_path / "model", {name: pickle.dumps(Bomb(trace))})
    error = refusal(folder)
    assert "pickled weights only" in error.message
    assert name in error.message
    assert "save with safetensors" in str(error.hint)
    assert not trace.exists()


def test_a_dangling_link_says_where_it_points(tmp_path: Path) -> None:
    make_folder(tmp_path, {})
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    error = refusal(tmp_path)
    assert "cannot be read" in error.message
    assert "../blobs/gone" in str(error.hint)


def test_a_pipe_in_the_place_of_weights_is_refused_at_once(tmp_path: Path) -> None:
    make_folder(tmp_path, {})
    os.mkfifo(tmp_path / "model.safetensors")
    assert "no regular file" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("config", "files", "tensors"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {}, ["a.weight"]),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}, ["a.weight"]),
        ({"thinker_config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}}, {}, ["a.weight"]),
        ({"compression_config": {"format": "pack-quantized"}}, {}, ["a.weight"]),
        ({}, {"quantize_config.json": "{}"}, ["a.weight"]),
        ({}, {}, ["a.weight_packed"]),
        ({}, {}, ["a.qweight"]),
        ({}, {}, ["a.weight", "a.weight_scale"]),
        ({}, {}, ["a.weight", "a.weight_scale_inv"]),
    ],
)
def test_a_quantized_checkpoint_is_refused_unless_asked_for(
    config: dict[str, Any], files: dict[str, Any], tensors: list[str], tmp_path: Path
) -> None:
    make_folder(tmp_path, files)
    make_checkpoint(tmp_path, {name: torch.ones(4, 4) for name in tensors}, CONFIG | config)
    error = refusal(tmp_path)
    assert "quantized already" in error.message
    assert "original checkpoint" in str(error.hint)
    assert set(open_checkpoint(tmp_path, allow_quantized=True).tensors) == set(tensors)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
        (torch.float64, "F64"),
        (torch.complex64, "C64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_a_weight_that_is_no_16_or_32_bit_float_is_named(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, {"model.layers.3.mlp.up_proj.weight": torch.zeros(4, 6).to(dtype)})
    message = refusal(tmp_path).message
    for fragment in ("model.safetensors", "model.layers.3.mlp.up_proj.weight [4, 6]", name, "BF16, F16, F32"):
        assert fragment in message
