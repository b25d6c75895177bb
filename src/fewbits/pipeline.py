"""The streamed conversion of one shard: a reader, the kernels and a writer, each in a thread, passing tiles along.

A tile is a run of whole rows of one weight, or a run of bytes of a tensor that is carried over. Buffers circulate, so
that memory stays the same whatever the size of a tensor, and no fresh page is touched after the first tiles.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fewbits.checkpoints.reader import TensorReader
from fewbits.layout import TensorEntry
from fewbits.plan import TILE_BYTES, PlannedLayer

# A tile's height is a multiple of this: zero points pack up to 32 rows into one word.
ROW_MULTIPLE = 32
BUFFERS = 4


@dataclass(frozen=True)
class Tile:
    """Bytes [start, stop) of one source tensor; `layer` is None where they are carried over as they are."""

    entry: TensorEntry
    layer: PlannedLayer | None
    start: int
    stop: int

    @property
    def first_row(self) -> int:
        return self.start // self.row_bytes

    @property
    def rows(self) -> int:
        return (self.stop - self.start) // self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.entry.nbytes // self.entry.shape[0]

    @property
    def is_last(self) -> bool:
        return self.stop == self.entry.nbytes


def tiles(entry: TensorEntry, layer: PlannedLayer | None, tile_bytes: int = TILE_BYTES) -> Iterator[Tile]:
    """Cut one tensor into tiles of about `tile_bytes`."""
    step = tile_bytes
    if layer is not None:
        row_bytes = entry.nbytes // entry.shape[0]
        step = max(ROW_MULTIPLE, tile_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE) * row_bytes
    for start in range(0, entry.nbytes, step):
        yield Tile(entry, layer, start, min(start + step, entry.nbytes))


Item = TypeVar("Item")


class Channel(Generic[Item]):
    """A bounded queue that ends, and that carries the other side's failure."""

    def __init__(self, capacity: int, stop: threading.Event) -> None:
        self._queue: queue.Queue[Item | None] = queue.Queue(capacity)
        self._stop = stop

    def put(self, item: Item | None) -> None:
        """Wait for room; give up when the pipeline stops."""
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise Stopped

    def get(self) -> Item | None:
        """Wait for an item; None is the end."""
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        raise Stopped

    def __iter__(self) -> Iterator[Item]:
        while (item := self.get()) is not None:
            yield item


class Stopped(Exception):
    """Another station failed; its error is the one to show."""


@dataclass(frozen=True)
class ReadTile:
    """A tile and its bytes, in a buffer that is to be given back."""

    tile: Tile
    content: torch.Tensor
    buffer: torch.Tensor


class TileReader:
    """Reads tiles ahead in a thread of its own."""

    def __init__(self, reader: TensorReader, work: list[Tile], stop: threading.Event) -> None:
        self.read: Channel[ReadTile] = Channel(BUFFERS, stop)
        self._free: Channel[torch.Tensor] = Channel(BUFFERS, stop)
        self._reader = reader
        self._work = work
        largest = max((tile.stop - tile.start for tile in work), default=0)
        for _ in range(BUFFERS):
            self._free.put(torch.empty(largest, dtype=torch.uint8))

    def give_back(self, item: ReadTile) -> None:
        """The tile's buffer may be read into again."""
        self._free.put(item.buffer)

    def run(self) -> None:
        for tile in self._work:
            buffer = self._free.get()
            if buffer is None:
                return
            content = buffer[: tile.stop - tile.start]
            self._reader.read_bytes(tile.entry.name, tile.start, content)
            self.read.put(ReadTile(tile, content, buffer))
        self.read.put(None)


class Stations:
    """Runs the stations beside the caller and raises the first failure of any of them."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread; its failure stops all stations."""

        def guarded() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                self._failures.append(error)
                self.stop.set()

        thread = threading.Thread(target=guarded, name=f"fewbits-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def __enter__(self) -> Stations:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.stop.set()
        for thread in self._threads:
            thread.join()
        if self._failures and (error is None or isinstance(error, Stopped)):
            raise self._failures[0] from None
