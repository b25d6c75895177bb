"""The journal of a conversion: what was begun, and each shard that reached the disk, so that a killed run can go on.

JSON lines in the scratch folder of OUT.partial. The first line says of what source, config and calibration; a line
is written only after its shard has its final name, and counts only if it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits.checkpoints.headers import shown
from fewbits.checkpoints.partial import SCRATCH_FOLDER
from fewbits.checkpoints.writer import output_error, sync_folder
from fewbits.errors import PlanError

JOURNAL_FILE = "journal.jsonl"
RECORD_KEYS = {"shard", "bytes", "tensors", "layers", "notes", "extra"}


class Journal:
    """An open journal. `finished` has a record for every shard that need not be made again, in the order they came.

    A record: shard, bytes, tensors {name: sha256}, layers, notes, extra.
    """

    def __init__(self, folder: Path, file: Path, finished: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.finished = finished
        self._file = file
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> Journal:
        """Begin a journal in `folder` (OUT.partial), or go on with the one that is there.

        Args:
            fingerprint: all that the bytes of the result depend on, as JSON.

        Raises:
            PlanError: the journal there was begun with another fingerprint.
            OutputError: the journal cannot be written.
        """
        file = folder / SCRATCH_FOLDER / JOURNAL_FILE
        begun = json.loads(json.dumps(fingerprint))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes() if file.exists() else b""
            records, kept_bytes = _whole_records(content)
            if not records:
                kept_bytes = _begin(file, {"fingerprint": begun})
            else:
                _refuse_other(folder, records[0]["fingerprint"], begun)
            finished, kept_bytes = _finished(folder, records[1:], content, kept_bytes)
            os.truncate(file, kept_bytes)
            _delete_unrecorded(folder, finished)
            return cls(folder, file, finished)
        except OSError as error:
            raise output_error(file, error) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def record(
        self,
        shard: str,
        tensors: Mapping[str, str],
        layers: Sequence[Any] = (),
        notes: Sequence[Any] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down a shard that has reached the disk under its final name; on return the record has, too."""
        entry = {
            "shard": shard,
            "bytes": (self.folder / shard).stat().st_size,
            "tensors": dict(tensors),
            "layers": list(layers),
            "notes": list(notes),
            "extra": dict(extra or {}),
        }
        line = _line(entry)
        try:
            _append(self._descriptor, line)
        except OSError as error:
            raise output_error(self._file, error, len(line)) from error
        self.finished[shard] = json.loads(line)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=True).encode() + b"\n"


def _append(descriptor: int, line: bytes) -> None:
    done = 0
    while done < len(line):
        done += os.write(descriptor, line[done:])
    os.fsync(descriptor)


def _begin(file: Path, record: Mapping[str, Any]) -> int:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _append(descriptor, _line(record))
    finally:
        os.close(descriptor)
    sync_folder(file.parent)
    return file.stat().st_size


def _whole_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first that is torn, and the bytes they take."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        expected = RECORD_KEYS if records else {"fingerprint"}
        if not line.endswith(b"\n") or not isinstance(record, dict) or set(record) != expected:
            break
        records.append(record)
        end += len(line)
    return records, end


def _finished(
    folder: Path, records: Sequence[dict[str, Any]], content: bytes, kept_bytes: int
) -> tuple[dict[str, dict[str, Any]], int]:
    """The records whose shards are there, whole; the first that is not ends the journal, as later ones build on it."""
    finished: dict[str, dict[str, Any]] = {}
    lines = content.splitlines(keepends=True)
    for number, record in enumerate(records, start=1):
        shard = folder / record["shard"]
        if not shard.is_file() or shard.stat().st_size != record["bytes"]:
            return finished, sum(map(len, lines[:number]))
        finished[record["shard"]] = record
    return finished, kept_bytes


def _delete_unrecorded(folder: Path, finished: Mapping[str, Any]) -> None:
    """Shards that got their name but not their record will be made again, perhaps under other names."""
    for shard in folder.glob("*.safetensors"):
        if shard.name not in finished:
            shard.unlink()


def _refuse_other(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    keys = [key for key in {**found, **given} if found.get(key) != given.get(key)]
    if not keys:
        return
    details = "; ".join(f"{key}: {_brief(found.get(key))} then, {_brief(given.get(key))} now" for key in keys)
    raise PlanError(
        f"{folder} was begun with another {' and '.join(keys)} ({details}).",
        f"repeat the command it was begun with, or delete {folder} to begin afresh",
    )


def _brief(value: object) -> str:
    text = shown(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}…"
