"""The folder that output is written to, OUT.partial, until one rename makes it OUT.

At no instant does a half-written checkpoint lie under the final name; a second process is kept out by a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.checkpoints.folder import CONFIG_FILE
from fewbits.checkpoints.writer import UNFINISHED_SUFFIX, disk_full, free_bytes, output_error, sync_folder
from fewbits.errors import CheckpointError, OutputError, PlanError

if TYPE_CHECKING:
    from fewbits.checkpoints.reader import Checkpoint

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
# Journal, lock and spilled states live here; it never comes into OUT for longer than it takes to delete it.
SCRATCH_FOLDER = ".fewbits"
LOCK_FILE = "lock"
JOURNAL_FILE = "journal.jsonl"
# There while the old OUT is put aside: a run killed between the two renames is put right by the next.
REPLACING_FILE = "replacing"


def refuse_output(out: Path, source: Path | None = None, *, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot be, before any work: it exists, or it and the source are entangled.

    Raises:
        PlanError: the user must choose another folder (or say `overwrite`).
    """
    try:
        _refuse_output(out, _real(out), source, overwrite)
    except OSError as error:
        raise output_error(out, error) from error


def _refuse_output(out: Path, target: Path, source: Path | None, overwrite: bool) -> None:
    if source is not None:
        origin = _real(source)
        if target == origin:
            raise PlanError(f"{out} is the source itself.", "choose another output folder")
        if target.is_relative_to(origin):
            raise PlanError(f"{out} lies inside the source {source}.", "choose an output folder outside it")
        if origin.is_relative_to(target):
            raise PlanError(f"the source {source} lies inside {out}.", "choose another output folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise PlanError(f"{out} is a file; expected a folder that does not exist yet.", "choose another name")
    if not overwrite:
        raise PlanError(f"{out} exists already.", "choose another folder, or replace it with --overwrite")
    if any(target.iterdir()) and not (target / CONFIG_FILE).exists():
        raise PlanError(
            f"{out} exists and holds no checkpoint (no {CONFIG_FILE}); it is not overwritten.",
            "choose another folder, or delete it yourself",
        )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


class PartialFolder:
    """OUT.partial, open and locked. `finish` makes it OUT; `close` leaves it for the next run to go on from.

    path: the folder to write into. scratch: a folder in it for what is not part of the result.

    Args:
        out: the final name; refused if it exists, unless `overwrite`.
        source: the checkpoint that is read, which the output must not be entangled with.
        needed_bytes: size of the result; refused if the disk has less room than is still missing.

    Raises:
        PlanError: another name is to be chosen, or another process is writing there.
        OutputError: the folder cannot be made, or the disk is too full.
    """

    def __init__(
        self,
        out: str | Path,
        source: Checkpoint | None = None,
        needed_bytes: int = 0,
        *,
        overwrite: bool = False,
    ) -> None:
        refuse_output(Path(out), None if source is None else source.path, overwrite=overwrite)
        self.out = _real(Path(out))
        self._source = source
        self.path = self.out.with_name(self.out.name + PARTIAL_SUFFIX)
        self.scratch = self.path / SCRATCH_FOLDER
        self._replaced = self.out.with_name(self.out.name + REPLACED_SUFFIX)
        self._overwrite = overwrite
        self._lock = -1
        try:
            self._open()
            self._require_room(needed_bytes)
        except OSError as error:
            self.close()
            raise output_error(self.path, error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> None:
        if self.path.exists() and not self.scratch.is_dir() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise PlanError(
                f"{self.path} is in the way and was not made by an earlier run.", "move it, or choose another output"
            )
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if (self.scratch / REPLACING_FILE).exists():
            self._bring_old_back()
            refuse_output(self.out, overwrite=self._overwrite)
        if self._overwrite and (self.out / SCRATCH_FOLDER / REPLACING_FILE).exists():
            self._delete_old()
        if self._overwrite and self._replaced.exists():
            raise PlanError(f"{self._replaced} is in the way of replacing {self.out}.", "move or delete it")
        for leftover in self.path.iterdir():
            if leftover != self.scratch and leftover.suffix != ".safetensors":
                _delete(leftover)

    def _take_lock(self) -> None:
        descriptor = os.open(self.scratch / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise PlanError(
                f"{self.path} is being written by another process (pid {holder}).",
                "wait for it, or choose another output folder",
            ) from None
        if not _is_same_file(descriptor, self.scratch / LOCK_FILE):
            os.close(descriptor)
            raise PlanError(f"{self.out} was finished by another process meanwhile.", "choose another output folder")
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _require_room(self, needed_bytes: int) -> None:
        missing = needed_bytes - sum(shard.stat().st_size for shard in self.path.glob("*.safetensors"))
        if free_bytes(self.path) < missing:
            raise disk_full(self.path, missing)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file whole: temporary name, sync, rename. `name` may lie in a subfolder."""
        final = self.path / name
        temporary = final.with_name(final.name + UNFINISHED_SUFFIX)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
            sync_folder(final.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise output_error(final, error, len(content)) from error

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self.write_file(name, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")

    def copy_companions(self) -> None:
        """Copy the source's small files as they are."""
        if self._source is None:
            return
        for companion in self._source.companions:
            try:
                content = companion.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{companion} cannot be read: {error.strerror}.") from error
            self.write_file(str(companion.relative_to(self._source.path)), content)

    def finish(self) -> Path:
        """Give the folder its final name, in one rename; what it replaces is deleted afterwards.

        Raises:
            OutputError: the rename failed, or OUT appeared meanwhile and may not be overwritten.
        """
        try:
            sync_folder(self.path)
            self._put_old_aside()
            self.path.rename(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            self._bring_old_back()
            raise output_error(self.out, error) from error
        self._release()
        self._delete_old()
        return self.out

    def _delete_old(self) -> None:
        # In this order: while the marker is there, the next run knows that what was replaced is ours to delete.
        if (self.out / SCRATCH_FOLDER / REPLACING_FILE).exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
        shutil.rmtree(self.out / SCRATCH_FOLDER, ignore_errors=True)

    def _put_old_aside(self) -> None:
        if not self.out.exists():
            return
        if not self._overwrite:
            raise OutputError(
                f"{self.out} appeared while {self.path} was written; the result stays there.",
                f"move one of them: mv {self.path} elsewhere",
            )
        refuse_output(self.out, overwrite=True)
        (self.scratch / REPLACING_FILE).touch()
        self.out.rename(self._replaced)

    def _bring_old_back(self) -> None:
        """Undo `_put_old_aside`, if it was done: in this run or in one that was killed."""
        marker = self.scratch / REPLACING_FILE
        if marker.exists() and self._replaced.exists() and not self.out.exists():
            self._replaced.rename(self.out)
        marker.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock. What was written stays, to be gone on from; if that is nothing, the folder goes."""
        if self._lock < 0:
            return
        if self.scratch.is_dir() and not self._worth_keeping():
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def _worth_keeping(self) -> bool:
        spilled = any(entry.name not in (LOCK_FILE, JOURNAL_FILE) for entry in self.scratch.iterdir())
        return spilled or any(self.path.glob("*.safetensors"))

    def discard(self) -> None:
        """Delete the folder and all that was written."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies under its name, and not in a folder that was renamed since."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
