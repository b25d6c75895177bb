"""What lies in a checkpoint folder: which files hold the weights, which come along, and what is refused unopened."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewbits.checkpoints.headers import WeightFile, parse_object, read_weight_file, shown
from fewbits.errors import CheckpointError
from fewbits.notes import Note

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Larger files beside the weights are data, not a tokenizer.
LARGEST_COMPANION = 64 * 2**20
COMPANION_FOLDERS = ("additional_chat_templates", "chat_templates")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
OTHER_WEIGHTS = (".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".npy", ".tflite", ".ot")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
CONVERT_HINT = (
    "pickled weights can run code when opened, so fewbits never does: "
    "load them where you trust them and save with safetensors"
)


def require_folder(path: Path) -> None:
    """Refuse a path that is no folder."""
    if not path.exists():
        hint = "give the folder of a Hugging Face checkpoint"
        if HUB_NAME.fullmatch(str(path)):
            hint += f"; a model of the hub is downloaded first: hf download {path} --local-dir FOLDER"
        raise CheckpointError(f"{path} does not exist.", hint)
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected the folder it lies in.", f"give {path.absolute().parent}")


def listing(path: Path) -> list[Path]:
    """The folder's entries by name."""
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be listed: {error.strerror}.", "check its permissions") from error


def read_json(path: Path, hint: str, *, keys_once: bool = True) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file.", hint)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", hint) from error
    return parse_object(path, content, "the content", hint, keys_once=keys_once)


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json."""
    config = path / CONFIG_FILE
    hint = "every Hugging Face checkpoint has one beside its weights: fetch it again"
    if not config.exists():
        hints = {
            "adapter_config.json": "this is an adapter: merge it into its base model first",
            "model_index.json": "this is a diffusion pipeline: give the folder of one of its models",
            "params.json": "these are weights in their vendor's own layout: fetch the Hugging Face checkpoint",
        }
        found = [hint for name, hint in hints.items() if (path / name).exists()]
        raise CheckpointError(f"{path} has no {CONFIG_FILE}.", found[0] if found else hint)
    # Some published configs name a key twice; every reader takes the last.
    return read_json(config, hint, keys_once=False)


def weight_files(path: Path) -> tuple[WeightFile, ...]:
    """Find and check the safetensors files that hold the checkpoint's weights."""
    entries = listing(path)
    if (path / SINGLE_FILE).exists() or (path / SINGLE_FILE).is_symlink():
        return (read_weight_file(path / SINGLE_FILE),)
    if (path / INDEX_FILE).exists():
        return _indexed_files(path)
    found = [entry for entry in entries if entry.suffix == ".safetensors"]
    if not found:
        raise _no_safetensors(path, entries)
    indexes = [entry for entry in entries if entry.name.endswith(".safetensors.index.json")]
    if len(found) > 1:
        names = ", ".join(shown(entry.name) for entry in found[:3]) + (", …" if len(found) > 3 else "")
        other = f" (found {shown(indexes[0].name)})" if indexes else ""
        raise CheckpointError(
            f"{path} has {len(found)} safetensors files ({names}), but no {INDEX_FILE}{other} that joins them.",
            "fetch the index as well, or leave one file in the folder",
        )
    return (read_weight_file(found[0]),)


def _no_safetensors(path: Path, entries: list[Path]) -> CheckpointError:
    expected = f"expected {SINGLE_FILE}, or {INDEX_FILE} and the files it names"
    if not entries:
        return CheckpointError(f"{path} is empty; {expected}.", "fetch the checkpoint into it")
    pickles = [entry.name for entry in entries if entry.suffix in PICKLES]
    if pickles:
        return CheckpointError(f"{path} holds pickled weights only ({shown(pickles[0])}); {expected}.", CONVERT_HINT)
    if any(entry.suffix == ".gguf" for entry in entries):
        return CheckpointError(
            f"{path} holds GGUF files only; {expected}.",
            "GGUF is quantized already: fetch the original checkpoint it was made from",
        )
    return CheckpointError(f"{path} has no safetensors file; {expected}.", "give the folder that holds the weights")


def _indexed_files(path: Path) -> tuple[WeightFile, ...]:
    index = path / INDEX_FILE
    hint = "the index does not belong to these files: fetch the checkpoint again"
    weight_map = read_json(index, hint).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names.", hint)
    if not weight_map:
        raise CheckpointError(f"{index}: its weight_map names no tensors.", hint)
    files = tuple(_indexed_file(path, index, name, weight_map) for name in sorted(set(weight_map.values())))
    refuse_repeated_tensors(files)
    _compare_with_index(index, weight_map, files, hint)
    return files


def _indexed_file(path: Path, index: Path, name: str, weight_map: Mapping[str, str]) -> WeightFile:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{index} names the file {shown(name)!r}; expected a file in the same folder.",
            "do not trust this checkpoint: its index points elsewhere",
        )
    file = path / name
    if not file.exists():
        tensors = [tensor for tensor, stored in weight_map.items() if stored == name]
        raise CheckpointError(
            f"{index} names {shown(name)}, which is missing; {len(tensors)} tensors should be in it, "
            f"{shown(tensors[0])} first.",
            "fetch the missing file",
        )
    return read_weight_file(file)


def refuse_repeated_tensors(files: Iterable[WeightFile]) -> None:
    """Refuse a tensor that lies in two files."""
    first: dict[str, Path] = {}
    for file in files:
        for entry in file.tensors:
            if entry.name in first:
                raise CheckpointError(
                    f"tensor {shown(entry.name)} lies in two files, {first[entry.name]} and {file.path.name}.",
                    "keep the one that the index means: fetch the checkpoint again",
                )
            first[entry.name] = file.path


def _compare_with_index(index: Path, weight_map: Mapping[str, str], files: tuple[WeightFile, ...], hint: str) -> None:
    held = {entry.name: file.path.name for file in files for entry in file.tensors}
    for name, file in weight_map.items():
        if name not in held:
            raise CheckpointError(f"{index} says that {shown(file)} holds {shown(name)}, which it does not.", hint)
        if held[name] != file:
            raise CheckpointError(
                f"{index} says that {shown(file)} holds {shown(name)}; found it in {shown(held[name])}.", hint
            )
    for name, file in held.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{index} is incomplete: {shown(file)} holds {shown(name)}, which it does not name.", hint
            )


def find_companions(path: Path) -> tuple[tuple[Path, ...], tuple[Note, ...]]:
    """The small files that belong to the model: tokenizer, chat template, generation config, licence, code."""
    companions: list[Path] = []
    notes: list[Note] = []
    folders = [path / name for name in COMPANION_FOLDERS if (path / name).is_dir()]
    for entry in [*listing(path), *(entry for folder in folders for entry in listing(folder))]:
        if _is_weights(entry.name) or entry.name.startswith(".") or entry.name == CONFIG_FILE:
            continue
        try:
            status = entry.stat()
        except OSError as error:
            notes.append(Note(shown(entry.name), "not carried over", f"it cannot be read: {error.strerror}"))
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        if status.st_size > LARGEST_COMPANION:
            why = f"{status.st_size:,} bytes, more than the {LARGEST_COMPANION:,} of a file that comes along"
            notes.append(Note(shown(entry.name), "not carried over", why))
            continue
        companions.append(entry)
    return tuple(companions), tuple(notes)


def _is_weights(name: str) -> bool:
    suffixes = (".safetensors", ".index.json", *PICKLES, *OTHER_WEIGHTS)
    return name.lower().endswith(suffixes)
