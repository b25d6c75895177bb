"""Calibration text: files of many kinds, or the model's own writing, as token ids of equal length.

Documents are tokenized one after the other, joined, and cut into consecutive samples from the start; nothing is drawn
by chance and nothing is padded, so the same file always gives the same tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbits.errors import CalibrationError, MissingDependencyError
from fewbits.notes import Note
from fewbits.tokenizer import load_tokenizer

OWN_TEXT = "self"
KINDS_HINT = (
    'give text (.txt, .md), JSON lines with a "text" or "messages" field (.jsonl), Parquet with such a column '
    "(.parquet), or token ids (.npy, or JSON lines of whole numbers)"
)
# Characters of text that are tokenized at a time; more tokens than this many never come of them.
CHUNK = 1 << 20

Encode = Callable[[str], list[int]]
Document = str | list[int]


@dataclass(frozen=True)
class Calibration:
    """Samples of equal length to calibrate with.

    ids: int64 [samples, length]. source: where they come from, as the report names it.
    """

    ids: torch.Tensor
    source: str
    notes: tuple[Note, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.ids.numel()

    @property
    def digest(self) -> str:
        """sha256 of the token ids and their arrangement."""
        shape = "x".join(str(size) for size in self.ids.shape)
        return hashlib.sha256(shape.encode() + self.ids.contiguous().numpy().tobytes()).hexdigest()


def read_calibration(path: str | Path, model_dir: str | Path, samples: int, length: int) -> Calibration:
    """The first `samples` × `length` tokens of a file.

    Args:
        path: text, JSON lines, Parquet or token ids; the kind follows from the suffix.
        model_dir: the checkpoint, for its tokenizer and the size of its vocabulary.

    Raises:
        CalibrationError: the file is missing, empty, of another kind, or shorter than one sample.
        CheckpointError: the checkpoint's tokenizer cannot be loaded.
    """
    file = Path(path).expanduser()
    if samples < 1 or length < 2:
        raise CalibrationError(f"Calibration needs at least 1 sample of 2 tokens, got {samples} of {length}.")
    _require_file(file)
    vocabulary = _vocabulary_size(model_dir)
    tokenizer: list[Any] = []

    def encode(document: Document) -> list[int]:
        if not isinstance(document, str):
            return document
        if not tokenizer:
            tokenizer.append(load_tokenizer(model_dir, ", or give token ids"))
        return list(tokenizer[0](document)["input_ids"])

    def render(messages: list[dict[str, Any]]) -> str:
        if not tokenizer:
            tokenizer.append(load_tokenizer(model_dir, ", or give token ids"))
        return _render_messages(tokenizer[0], messages)

    wanted = samples * length
    ids: list[int] = []
    if file.suffix.lower() == ".npy":
        ids = _read_array(file, wanted)
    elif file.suffix.lower() in (".jsonl", ".json", ".ndjson", ".parquet"):
        for document in _documents(file, render):
            ids += encode(document)
            if len(ids) >= wanted:
                break
    else:
        ids = _encode_text(file, encode, wanted)
    return _cut(ids, file, samples, length, vocabulary)


def _cut(ids: list[int], file: Path, samples: int, length: int, vocabulary: int | None) -> Calibration:
    count = min(samples, len(ids) // length)
    if count == 0:
        raise CalibrationError(
            f"{file} holds {len(ids):,} tokens; one sample takes {length:,}.", "give more text, or a smaller --length"
        )
    used = torch.tensor(ids[: count * length], dtype=torch.int64)
    outside = (used < 0) if vocabulary is None else (used < 0) | (used >= vocabulary)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise CalibrationError(
            f"{file}: token {place:,} is {int(used[place])}; the vocabulary has {vocabulary:,} tokens, from 0 on.",
            "were these ids made with another model's tokenizer?",
        )
    notes: tuple[Note, ...] = ()
    if count < samples:
        why = f"the file holds {len(ids):,} tokens; {samples} samples of {length:,} take {samples * length:,}"
        notes = (Note(file.name, f"calibrated with {count} samples in place of {samples}", why),)
    return Calibration(used.view(count, length), file.name, notes)


def _require_file(file: Path) -> None:
    if not file.exists():
        raise CalibrationError(f"The calibration file {file} does not exist.", KINDS_HINT)
    if not file.is_file():
        raise CalibrationError(f"{file} is not a file; calibration reads one file.", KINDS_HINT)
    try:
        with file.open("rb") as content:
            beginning = content.read(1)
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}.") from error
    if not beginning:
        raise CalibrationError(f"The calibration file {file} is empty.", KINDS_HINT)


def _encode_text(file: Path, encode: Callable[[Document], list[int]], wanted: int) -> list[int]:
    """Tokenize the beginning of a text, doubled until it is enough; its last tokens may be cut in two, so not used."""
    size = max(CHUNK, 8 * wanted)
    while True:
        text, whole = _read_text(file, size)
        ids = encode(text)
        if whole or len(ids) >= wanted + 64:
            return ids[:wanted] if not whole else ids
        size *= 2


def _read_text(file: Path, characters: int) -> tuple[str, bool]:
    """The beginning of a text file, and whether that is all."""
    try:
        with file.open(encoding="utf-8") as content:
            text = content.read(characters)
            whole = not content.read(1)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is no text: byte {error.start:,} is not UTF-8.", KINDS_HINT) from error
    if "\0" in text:
        raise CalibrationError(f"{file} is no text: it holds zero bytes.", KINDS_HINT)
    return text, whole


def _documents(file: Path, render: Callable[[list[dict[str, Any]]], str]) -> Iterator[Document]:
    records = _parquet_records(file) if file.suffix.lower() == ".parquet" else _json_records(file)
    for where, record in records:
        yield _document(where, record, render)


def _document(where: str, record: Any, render: Callable[[list[dict[str, Any]]], str]) -> Document:
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        messages: Any = record.get("messages")
        if _is_conversation(messages):
            return render(messages)
        if _are_ids(record.get("input_ids")):
            return list(record["input_ids"])
        found = ", ".join(str(name) for name in itertools.islice(record, 8)) or "no fields"
        raise CalibrationError(
            f'{where} has no "text", "messages" or "input_ids" that can be read; found {found}.', KINDS_HINT
        )
    if _are_ids(record):
        return list(record)
    raise CalibrationError(f"{where} is neither an object nor a list of token ids.", KINDS_HINT)


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(isinstance(item, dict) and "content" in item for item in messages)


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in values)


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", json.loads(line)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is no text: after line {number} it is not UTF-8.", KINDS_HINT) from error
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{file}, line {number} is not JSON: {error.msg}.", KINDS_HINT) from error


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingDependencyError(f"Reading {file} needs pyarrow.", "pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(str(file))
        known = [name for name in table.schema_arrow.names if name in ("text", "messages", "input_ids")]
        if not known:
            found = ", ".join(table.schema_arrow.names[:8])
            raise CalibrationError(
                f'{file} has no column "text", "messages" or "input_ids"; found {found}.', KINDS_HINT
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=known[:1]):
            for record in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", record
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{file} is no Parquet file: {error}", KINDS_HINT) from error


def _read_array(file: Path, wanted: int) -> list[int]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CalibrationError(f"{file} is no NumPy array of numbers: {error}", KINDS_HINT) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        found = getattr(array, "dtype", type(array).__name__)
        raise CalibrationError(f"{file} holds {found}; token ids are whole numbers.", KINDS_HINT)
    flat = array.reshape(-1)[:wanted]
    if flat.size and int(flat.max()) > np.iinfo(np.int64).max:
        raise CalibrationError(f"{file} holds {int(flat.max())}, which is no token id.", KINDS_HINT)
    return [int(value) for value in flat]


def _render_messages(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return "\n\n".join(str(message["content"]) for message in messages)


def _vocabulary_size(model_dir: str | Path) -> int | None:
    """Rows of the embedding as the config says; None if it does not say."""
    try:
        config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model_dir}: its config.json cannot be read: {error}") from error
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None
