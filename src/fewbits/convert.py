"""Conversion without calibration data: every weight streams through once, tile by tile, and is rounded on its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewbits.checkpoints.reader import TensorReader
from fewbits.checkpoints.writer import ShardWriter
from fewbits.errors import QuantizationError
from fewbits.formats import FORMATS, Format
from fewbits.kernels.rows import RoundedRows, code_bytes, holds_nonfinite, round_tile
from fewbits.kernels.threads import thread_count
from fewbits.layout import TensorEntry
from fewbits.notes import Note
from fewbits.pipeline import Team, Tile, Work, tiles
from fewbits.plan import Plan, PlannedLayer
from fewbits.progress import Progress
from fewbits.report import LayerRecord, layer_record
from fewbits.scale_limits import count_at_limit, note_at_limit
from fewbits.search import DATA_FREE_SEARCH

# More threads than compute at once. With one more, processors and disk were idle a third of the time, as all threads
# were waiting for a write.
AT_THE_DISK = 3
# Beyond this many, threads would only wait for the disk; each has its own buffers.
MOST_THREADS = 16
Source = tuple[TensorEntry, PlannedLayer | None]


class NonFiniteWeights(QuantizationError):
    """A tensor that holds NaN or infinite values."""

    def __init__(self, tensor: TensorEntry, layer: str | None) -> None:
        super().__init__(
            f"{tensor.file}: tensor {tensor.name} holds NaN or infinite values.",
            "repair the checkpoint, or carry such tensors over unquantized with --allow-nonfinite",
        )
        self.layer = layer


@dataclass(frozen=True)
class ShardWork:
    """One shard to write: its number in the plan, and the source tensors that go into it."""

    number: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class FinishedShard:
    """What is known of a shard once it is on disk."""

    number: int
    digests: dict[str, str]
    layers: tuple[LayerRecord, ...]
    notes: tuple[Note, ...] = ()


@dataclass
class Conversion:
    """Converts the given shards of a plan; `on_finished` is called, from a thread, as each reaches the disk."""

    plan: Plan
    open_shard: Callable[[int], ShardWriter]
    on_finished: Callable[[FinishedShard], None]
    progress: Progress
    allow_nonfinite: bool = False

    def run(self, shards: Sequence[ShardWork]) -> None:
        """Stream all `shards`.

        Raises:
            NonFiniteWeights: a weight that was to be quantized, or (unless allowed) any float tensor, is not finite.
        """
        opened = [_Shard(work, self.open_shard) for work in shards]
        jobs = [(shard, place) for shard in opened for place in range(len(shard.work.sources))]
        team = Team(len(jobs))
        counters: list[_Counter] = []
        reported = 0

        def watch() -> None:
            nonlocal reported
            done = sum(counter.bytes for counter in counters)
            if done > reported:
                self.progress.advance(done - reported, counters[-1].name)
                reported = done

        closer = _Closer(self.on_finished, lambda error: team.fail(-1, error))
        with TensorReader(self.plan.source) as reader:

            def prepare() -> Work:
                counter = _Counter()
                counters.append(counter)
                worker = _Worker(FORMATS[self.plan.format], reader, counter, self.allow_nonfinite)

                def work(job: int, check: Callable[[], None]) -> None:
                    shard, place = jobs[job]
                    if shard.fill(place, worker, check):
                        closer.close(shard)

                return work

            try:
                team.run(min(thread_count() + AT_THE_DISK, MOST_THREADS, len(jobs)), prepare, watch)
            finally:
                closer.finish()
                for shard in opened:
                    shard.abort()
        closer.raise_failure()


@dataclass(frozen=True)
class _Converted:
    """What is known of a layer once it is rounded."""

    record: LayerRecord
    note: Note | None


@dataclass
class _Counter:
    bytes: int = 0
    name: str = ""


class _Shard:
    """A shard under way: opened when its first tensor comes, full when its last is written."""

    def __init__(self, work: ShardWork, open_shard: Callable[[int], ShardWriter]) -> None:
        self.work = work
        self._open = open_shard
        self._writer: ShardWriter | None = None
        self._lock = threading.Lock()
        self._left = len(work.sources)
        self._converted: dict[int, _Converted] = {}

    def fill(self, place: int, worker: _Worker, check: Callable[[], None]) -> bool:
        """Write what the source tensor at `place` becomes; True if it was the last that was missing."""
        with self._lock:
            if self._writer is None:
                self._writer = self._open(self.work.number)
        converted = worker.convert(self.work.sources[place], self._writer, check)
        with self._lock:
            if converted is not None:
                self._converted[place] = converted
            self._left -= 1
            return self._left == 0

    def close(self) -> FinishedShard:
        """Bring the shard to the disk."""
        assert self._writer is not None
        layers = [self._converted[place] for place in sorted(self._converted)]
        notes = tuple(layer.note for layer in layers if layer.note is not None)
        return FinishedShard(self.work.number, self._writer.close(), tuple(layer.record for layer in layers), notes)

    def abort(self) -> None:
        """Delete what is not whole."""
        if self._writer is not None:
            self._writer.abort()


class _Closer:
    """Brings full shards to the disk in a thread of its own: the others need not wait for it."""

    def __init__(self, on_finished: Callable[[FinishedShard], None], on_failure: Callable[[BaseException], None]):
        self._on_finished = on_finished
        self._on_failure = on_failure
        self._full: queue.SimpleQueue[_Shard | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self, shard: _Shard) -> None:
        """Have a shard closed."""
        self._full.put(shard)

    def finish(self) -> None:
        """Wait until all that are full are closed."""
        self._full.put(None)
        self._thread.join()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while (shard := self._full.get()) is not None:
                self._on_finished(shard.close())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._failure = error
            self._on_failure(error)


@dataclass
class _Worker:
    """What one thread has: a buffer for tiles as they are read, and one for their codes."""

    format: Format
    reader: TensorReader
    counter: _Counter
    allow_nonfinite: bool
    _buffers: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def convert(self, source: Source, writer: ShardWriter, check: Callable[[], None]) -> _Converted | None:
        """Write what a source tensor becomes; something is to be said of a layer that was quantized."""
        entry, layer = source
        self.counter.name = entry.name
        parts = None if layer is None else _Parts(self.format, layer, writer)
        error = norm = 0.0
        scales = at_limit = 0
        for tile in tiles(entry, layer):
            check()
            content = self._buffer("read", tile.stop - tile.start)
            self.reader.read_bytes(entry.name, tile.start, content)
            if layer is None or parts is None:
                if not self.allow_nonfinite and holds_nonfinite(content, entry.dtype):
                    raise NonFiniteWeights(entry, None)
                writer.write(entry.name, content, tile.start)
            else:
                rows = self._round(tile, layer, content)
                error += rows.squared_error
                norm += rows.squared_norm
                scales += rows.scales.size
                at_limit += count_at_limit(rows.scales, layer.scale_dtype)
                parts.write(tile, rows)
            self.counter.bytes += tile.stop - tile.start
        if layer is None or parts is None:
            return None
        parts.finish()
        note = note_at_limit(layer.name, at_limit, scales, layer.scale_dtype) if at_limit else None
        return _Converted(layer_record(layer, error, norm), note)

    def _round(self, tile: Tile, layer: PlannedLayer, content: Any) -> RoundedRows:
        assert layer.method is not None
        scheme, columns = layer.method.scheme, layer.shape[1]
        row_bytes = tile.entry.nbytes // tile.entry.shape[0]
        codes = self._buffer("codes", content.size // row_bytes * code_bytes(scheme, columns))
        rows = round_tile(content, tile.entry.dtype, columns, scheme, DATA_FREE_SEARCH, layer.scale_dtype, codes)
        if rows.nonfinite:
            raise NonFiniteWeights(tile.entry, layer.name)
        return rows

    def _buffer(self, name: str, size: int) -> np.ndarray[Any, Any]:
        """Memory that is touched once and used again: fresh pages cost more than the rounding."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size]


class _Parts:
    """The stored tensors of one layer, on their way to the file as tiles of its rows come in."""

    def __init__(self, format: Format, layer: PlannedLayer, writer: ShardWriter) -> None:
        self._writer = writer
        self._format, self._layer = format, layer
        self._across = format.ROW_AXIS == 1
        self._shapes = {tensor.name: tensor.shape for tensor in layer.outputs}
        self._filled: dict[str, int] = {}
        self._whole: dict[str, np.ndarray[Any, Any]] = {}

    def write(self, tile: Tile, rows: RoundedRows) -> None:
        """Take the parts that come from one tile; columns are kept until all are there."""
        layer = self._layer
        assert layer.method is not None
        encoded = self._format.encode_rows(layer.name, rows, layer.method.scheme, layer.shape, tile.first_row)
        for name, part in encoded.items():
            filled = self._filled.get(name, 0)
            if self._across and part.ndim == 2:
                if name not in self._whole:
                    self._whole[name] = np.empty(self._shapes[name], part.dtype)
                self._whole[name][:, filled : filled + part.shape[1]] = part
                self._filled[name] = filled + part.shape[1]
            else:
                self._writer.write(name, part, filled)
                self._filled[name] = filled + part.nbytes

    def finish(self) -> None:
        """Write what was kept."""
        for name, whole in self._whole.items():
            self._writer.write(name, whole)
        self._whole.clear()
