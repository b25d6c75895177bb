"""Report: what a quantized checkpoint lost, layer by layer, as recorded beside its weights in `fewbits.json`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewbits.notes import Note
from fewbits.plan import Plan, PlannedLayer

MANIFEST = "fewbits.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class LayerRecord:
    """What one layer became.

    squared_error: Σ (W − Ŵ)². squared_norm: Σ W². output_error: tr((W−Ŵ)H(W−Ŵ)ᵀ) / tr(WHWᵀ) where inputs were seen.
    """

    name: str
    kind: str
    method: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    bytes_before: int
    bytes_after: int
    squared_error: float
    squared_norm: float
    output_error: float | None = None

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ in the Frobenius norm; 0 for an all-zero layer."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As stored in the manifest."""
        return asdict(self) | {"shape": list(self.shape), "relative_error": self.relative_error}


def layer_record(
    layer: PlannedLayer, squared_error: float, squared_norm: float, output_error: float | None = None
) -> LayerRecord:
    """Record of a planned layer once its error is known."""
    if layer.method is None:
        raise ValueError(f"{layer.name} was not quantized")
    scheme = layer.method.scheme
    return LayerRecord(
        layer.name, layer.layer.kind, str(layer.method), layer.shape, scheme.bits, scheme.group_size,
        layer.bytes_before, layer.bytes_after, squared_error, squared_norm, output_error,
    )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The outcome of `quantize`.

    stages: seconds by stage. resumed_shards: shards found finished from an interrupted run.
    folds: tensors that took scales up, the layers whose inputs were scaled, and the scales (`FoldRecord.to_dict`).
    """

    out_dir: Path
    plan: Plan
    layers: tuple[LayerRecord, ...]
    notes: tuple[Note, ...]
    tensor_digests: dict[str, str]
    elapsed_s: float
    peak_memory_bytes: int
    stages: dict[str, float] = field(default_factory=dict)
    resumed_shards: int = 0
    calibration: dict[str, Any] | None = None
    folds: tuple[dict[str, Any], ...] = ()

    @property
    def worst(self) -> LayerRecord:
        """The layer with the largest error: of its output where inputs were seen, of its weights otherwise."""
        return max(self.layers, key=lambda record: (record.output_error or 0.0, record.relative_error))

    def manifest(self) -> dict[str, Any]:
        """What is written to `fewbits.json`: the same bytes for the same input, so no times and no paths."""
        from fewbits import __version__

        return {
            "version": MANIFEST_VERSION,
            "fewbits": __version__,
            "format": self.plan.format,
            "config": self.plan.config.to_dict(),
            "calibration": self.calibration,
            "totals": {
                "bytes_before": self.plan.bytes_before,
                "bytes_after": self.plan.bytes_after,
                "effective_bits": self.plan.effective_bits,
            },
            "layers": [record.to_dict() for record in self.layers],
            "notes": [asdict(note) for note in self.notes],
            "folds": list(self.folds),
            "tensors": self.tensor_digests,
        }
