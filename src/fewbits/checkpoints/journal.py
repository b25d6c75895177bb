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
from fewbits.checkpoints.partial import JOURNAL_FILE, SCRATCH_FOLDER
from fewbits.checkpoints.writer import output_error, sync_folder
from fewbits.errors import PlanError

Record = dict[str, Any]
BEGIN_KEYS = {"fingerprint"}
SHARD_KEYS = {"shard", "bytes", "tensors", "layers", "notes", "extra"}
CARRY_KEYS = {"carry"}


class Journal:
    """An open journal.

    finished: a record for every shard that need not be made again, in the order they came: shard, bytes, tensors
        {name: sha256}, layers, notes, extra.
    carried: layers found unfit on the way, to be left unquantized.
    """

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        self.finished = {record["shard"]: record for record in records if "shard" in record}
        self.carried = [record["carry"] for record in records if "carry" in record]
        self._folder = folder
        self._file = _file(folder)
        self._descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND)

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> Journal:
        """Begin a journal in `folder` (OUT.partial), or go on with the one that is there.

        Shards in the folder that the journal does not know are deleted: they will be made again.

        Args:
            fingerprint: all that the bytes of the result depend on, as JSON.

        Raises:
            PlanError: the journal there was begun with another fingerprint.
            OutputError: the journal cannot be written.
        """
        file = _file(folder)
        begun = json.loads(json.dumps(fingerprint))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            records, lengths = _whole_records(file.read_bytes() if file.exists() else b"")
            if records:
                _refuse_other(folder, records[0]["fingerprint"], begun)
                kept = _standing(folder, records)
                os.truncate(file, sum(lengths[: len(kept)]))
            else:
                kept = [{"fingerprint": begun}]
                _begin(file, kept[0])
            journal = cls(folder, kept)
            journal._delete_unrecorded()
            return journal
        except OSError as error:
            raise output_error(file, error) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(
        self,
        shard: str,
        tensors: Mapping[str, str],
        layers: Sequence[Any] = (),
        notes: Sequence[Any] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down a shard that has reached the disk under its final name; on return the record has, too.

        Args:
            shard: file name. tensors: SHA-256 by tensor name, from `ShardWriter.close`.
            layers, notes, extra: whatever is to be known of it after an interruption, as JSON.
        """
        record = {
            "shard": shard,
            "bytes": (self._folder / shard).stat().st_size,
            "tensors": dict(tensors),
            "layers": list(layers),
            "notes": list(notes),
            "extra": dict(extra or {}),
        }
        self.finished[shard] = self._write(record)

    def carry(self, layer: str) -> None:
        """Write down that a layer is to be left unquantized, whatever the config says."""
        self._write({"carry": layer})
        self.carried.append(layer)

    def _write(self, record: Record) -> Record:
        line = _line(record)
        try:
            _append(self._descriptor, line)
        except OSError as error:
            raise output_error(self._file, error, len(line)) from error
        written: Record = json.loads(line)
        return written

    def _delete_unrecorded(self) -> None:
        for shard in self._folder.glob("*.safetensors"):
            if shard.name not in self.finished:
                shard.unlink()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _file(folder: Path) -> Path:
    return folder / SCRATCH_FOLDER / JOURNAL_FILE


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _append(descriptor: int, line: bytes) -> None:
    done = 0
    while done < len(line):
        done += os.write(descriptor, line[done:])
    os.fsync(descriptor)


def _begin(file: Path, record: Record) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _append(descriptor, _line(record))
    finally:
        os.close(descriptor)
    sync_folder(file.parent)


def _whole_records(content: bytes) -> tuple[list[Record], list[int]]:
    """The records before the first that is torn, and the length of each one's line."""
    records: list[Record] = []
    lengths: list[int] = []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        expected = (SHARD_KEYS, CARRY_KEYS) if records else (BEGIN_KEYS,)
        if not line.endswith(b"\n") or not isinstance(record, dict) or set(record) not in expected:
            break
        records.append(record)
        lengths.append(len(line))
    return records, lengths


def _standing(folder: Path, records: Sequence[Record]) -> list[Record]:
    """The records before the first whose shard is gone or cut; later ones may build on it."""
    kept: list[Record] = []
    for record in records:
        if "shard" in record:
            shard = folder / record["shard"]
            if not shard.is_file() or shard.stat().st_size != record["bytes"]:
                break
        kept.append(record)
    return kept


def _refuse_other(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    differing = _differing(found, given)
    if not differing:
        return
    details = "; ".join(f"{key}: {_brief(then)} then, {_brief(now)} now" for key, (then, now) in differing.items())
    raise PlanError(
        f"{folder} was begun with another {' and '.join(differing)} ({details}).",
        f"repeat the command it was begun with, or delete {folder} to begin afresh",
    )


def _differing(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, as dotted names of the innermost objects that both have."""
    differing: dict[str, tuple[Any, Any]] = {}
    for key in {**found, **given}:
        then, now = found.get(key), given.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            differing |= {f"{key}.{inner}": values for inner, values in _differing(then, now).items()}
        elif then != now:
            differing[key] = then, now
    return differing


def _brief(value: object) -> str:
    text = shown(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}…"
