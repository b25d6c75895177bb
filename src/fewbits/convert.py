"""Conversion without calibration data: every weight streams through once, tile by tile, and is rounded on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fewbits.checkpoints.reader import TensorReader
from fewbits.checkpoints.writer import ShardWriter
from fewbits.errors import QuantizationError
from fewbits.formats import FORMATS
from fewbits.layout import TensorEntry
from fewbits.pipeline import BUFFERS, Channel, ReadTile, Stations, Tile, TileReader, tiles
from fewbits.plan import Plan, PlannedLayer
from fewbits.progress import Progress
from fewbits.report import LayerRecord, layer_record
from fewbits.solvers.rtn import quantize_rows


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
    sources: tuple[tuple[TensorEntry, PlannedLayer | None], ...]


@dataclass(frozen=True)
class FinishedShard:
    """What is known of a shard once it is on disk."""

    number: int
    digests: dict[str, str]
    layers: tuple[LayerRecord, ...]


@dataclass
class _Errors:
    squared_error: float = 0.0
    squared_norm: float = 0.0


@dataclass(frozen=True)
class _Write:
    name: str
    content: torch.Tensor
    release: Callable[[], None] | None = None


@dataclass(frozen=True)
class _CloseShard:
    number: int
    layers: tuple[LayerRecord, ...]


_Order = _Write | _CloseShard


@dataclass
class Conversion:
    """Converts the given shards of a plan, in order; `on_finished` is called as each reaches the disk."""

    plan: Plan
    open_shard: Callable[[int], ShardWriter]
    on_finished: Callable[[FinishedShard], None]
    progress: Progress
    allow_nonfinite: bool = False
    _records: list[LayerRecord] = field(default_factory=list)

    def run(self, shards: Sequence[ShardWork]) -> None:
        """Stream all `shards`.

        Raises:
            NonFiniteWeights: a weight that was to be quantized, or (unless allowed) any float tensor, is not finite.
        """
        work = [[tile for source in shard.sources for tile in tiles(*source)] for shard in shards]
        with Stations() as stations, TensorReader(self.plan.source) as reader:
            tile_reader = TileReader(reader, [tile for shard in work for tile in shard], stations.stop)
            orders: Channel[_Order] = Channel(2 * BUFFERS, stations.stop)
            stations.start("reader", tile_reader.run)
            stations.start("writer", lambda: self._write(shards, orders))
            arriving = iter(tile_reader.read)
            for shard, shard_tiles in zip(shards, work, strict=True):
                self._records = []
                errors = _Errors()
                for _ in shard_tiles:
                    item = next(arriving)
                    errors = self._handle(item, errors, orders, tile_reader)
                orders.put(_CloseShard(shard.number, tuple(self._records)))
            orders.put(None)

    def _handle(self, item: ReadTile, errors: _Errors, orders: Channel[_Order], reader: TileReader) -> _Errors:
        tile = item.tile
        if tile.layer is None:
            if not self.allow_nonfinite and holds_nonfinite(item.content, tile.entry.dtype):
                raise NonFiniteWeights(tile.entry, None)
            orders.put(_Write(tile.entry.name, item.content, lambda: reader.give_back(item)))
        else:
            self._quantize(tile, tile.layer, item.content, errors, orders)
            reader.give_back(item)
        self.progress.advance(tile.stop - tile.start, tile.entry.name)
        if tile.is_last:
            if tile.layer is not None:
                self._records.append(layer_record(tile.layer, errors.squared_error, errors.squared_norm))
            return _Errors()
        return errors

    def _quantize(
        self, tile: Tile, layer: PlannedLayer, content: torch.Tensor, errors: _Errors, orders: Channel[_Order]
    ) -> None:
        assert layer.method is not None
        weight = content.view(tile.entry.torch_dtype).view(tile.rows, layer.shape[1])
        quantized = quantize_rows(weight, layer.method)
        if quantized.nonfinite:
            raise NonFiniteWeights(tile.entry, layer.name)
        errors.squared_error += quantized.squared_error
        errors.squared_norm += quantized.squared_norm
        encoded = FORMATS[self.plan.format].encode(layer.name, quantized.weight, layer.shape, tile.first_row)
        for name, tensor in encoded.items():
            orders.put(_Write(name, tensor))

    def _write(self, shards: Sequence[ShardWork], orders: Channel[_Order]) -> None:
        writer: ShardWriter | None = None
        written: dict[str, int] = {}
        waiting = iter(shards)
        try:
            for order in orders:
                if writer is None:
                    writer = self.open_shard(next(waiting).number)
                    written = {}
                if isinstance(order, _CloseShard):
                    self.on_finished(FinishedShard(order.number, writer.close(), order.layers))
                    writer = None
                    continue
                offset = written.get(order.name, 0)
                writer.write(order.name, order.content, offset)
                written[order.name] = offset + order.content.numel() * order.content.element_size()
                if order.release is not None:
                    order.release()
        finally:
            if writer is not None:
                writer.abort()


def holds_nonfinite(content: torch.Tensor, dtype: str) -> bool:
    """Whether raw bytes of the given dtype hold a NaN or an infinity, by the exponent bits alone."""
    masks = {"BF16": (torch.int16, 0x7F80), "F16": (torch.int16, 0x7C00), "F32": (torch.int32, 0x7F800000)}
    if dtype not in masks:
        return False
    integer, exponent = masks[dtype]
    return bool(((content.view(integer) & exponent) == exponent).any())
