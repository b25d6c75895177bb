"""The streamed conversion: tensors cut into tiles, and threads that take one tensor after another.

A thread reads, rounds, hashes and writes a tile before the next, in buffers of its own that stay in the cache. While
one waits for the disk, the others compute. No tile changes hands, and each tensor's bytes come in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fewbits.layout import TensorEntry
from fewbits.plan import TILE_BYTES, PlannedLayer

# A tile's height is a multiple of this: zero points pack up to 32 rows into one word.
ROW_MULTIPLE = 32
WATCH_EVERY_S = 0.1


@dataclass(frozen=True)
class Tile:
    """Bytes [start, stop) of one source tensor; `layer` is None where they are carried over as they are."""

    entry: TensorEntry
    layer: PlannedLayer | None
    start: int
    stop: int

    @property
    def first_row(self) -> int:
        return self.start // (self.entry.nbytes // self.entry.shape[0])


def tiles(entry: TensorEntry, layer: PlannedLayer | None, tile_bytes: int = TILE_BYTES) -> Iterator[Tile]:
    """Cut one tensor into tiles of about `tile_bytes`."""
    step = tile_bytes
    if layer is not None:
        row_bytes = entry.nbytes // entry.shape[0]
        step = max(ROW_MULTIPLE, tile_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE) * row_bytes
    for start in range(0, entry.nbytes, step):
        yield Tile(entry, layer, start, min(start + step, entry.nbytes))


class Stopped(Exception):
    """An earlier job failed, or the run was interrupted; this one need not go on."""


# A job, by its number and a function to call now and then, which raises Stopped.
Work = Callable[[int, Callable[[], None]], None]


class Team:
    """Threads that take numbered jobs in order. Of several failures the one with the least number is raised.

    After a failure no job begins, later ones stop where they are, and earlier ones go on: which failure is found does
    not depend on the threads.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._next = 0
        self._lock = threading.Lock()
        self._limit = jobs
        self._failures: dict[int, BaseException] = {}

    def run(self, threads: int, prepare: Callable[[], Work], watch: Callable[[], None]) -> None:
        """Do all jobs.

        Args:
            prepare: called in each thread; returns what the thread does for each job.
            watch: called now and then from the caller's thread.
        """
        team = [threading.Thread(target=self._take, args=(prepare,), daemon=True) for _ in range(threads)]
        try:
            for thread in team:
                thread.start()
            for thread in team:
                while thread.is_alive():
                    thread.join(WATCH_EVERY_S)
                    watch()
        finally:
            # Only an interruption finds threads still running here.
            self._limit = min(self._limit, -1 if any(thread.is_alive() for thread in team) else self._limit)
            for thread in team:
                thread.join()
        if self._failures:
            raise self._failures[min(self._failures)]

    def fail(self, job: int, error: BaseException) -> None:
        """Have `error` raised, and later jobs stopped; -1 stops all."""
        with self._lock:
            self._failures.setdefault(job, error)
            self._limit = min(self._limit, job)

    def _take(self, prepare: Callable[[], Work]) -> None:
        try:
            work = prepare()
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            return self.fail(-1, error)
        while (job := self._claim()) is not None:
            try:
                work(job, lambda job=job: self._check(job))  # type: ignore[misc]
            except Stopped:
                return
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                self.fail(job, error)

    def _claim(self) -> int | None:
        with self._lock:
            if self._next >= self._jobs or self._next > self._limit:
                return None
            self._next += 1
            return self._next - 1

    def _check(self, job: int) -> None:
        if job > self._limit:
            raise Stopped
