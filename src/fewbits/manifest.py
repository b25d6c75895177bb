"""The manifest `fewbits.json` of a quantized checkpoint, read back and believed in nothing before it is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError
from fewbits.fold_records import FoldRecord

MANIFEST = "fewbits.json"
KNOWN_VERSIONS = (1,)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HINT = "quantize the model again, or delete the manifest and go without what it recorded"


@dataclass(frozen=True)
class RecordedLayer:
    """What the writer recorded of one layer; `relative_error` is ‖W − Ŵ‖ / ‖W‖ against the source's weight."""

    name: str
    method: str
    bits: int
    group_size: int
    relative_error: float


@dataclass(frozen=True)
class Manifest:
    """What the writer recorded.

    tensors: sha256 of every tensor's bytes. folds: by the name of a source tensor that folds rescaled, those folds.
    """

    tensors: Mapping[str, str]
    layers: Mapping[str, RecordedLayer]
    folds: Mapping[str, tuple[FoldRecord, ...]]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if it has none.

    Raises:
        CheckpointError: the file is there, but is no manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", _HINT) from error
    if not isinstance(content, dict) or content.get("version") not in KNOWN_VERSIONS:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} has the version {found!r}; known is {KNOWN_VERSIONS[0]}.", _HINT)
    return Manifest(_tensors(path, content), _layers(path, content), _folds(path, content))


def _tensors(path: Path, content: dict[str, Any]) -> dict[str, str]:
    tensors = content.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} has no `tensors`; expected the sha256 of every tensor by name.", _HINT)
    for name, digest in tensors.items():
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise CheckpointError(f"{path}: tensors.{name} is {digest!r:.80}; expected a sha256.", _HINT)
    return tensors


def _layers(path: Path, content: dict[str, Any]) -> dict[str, RecordedLayer]:
    layers = content.get("layers")
    if not isinstance(layers, list):
        raise CheckpointError(f"{path} has no `layers`; expected a list.", _HINT)
    recorded = [_layer(path, number, layer) for number, layer in enumerate(layers)]
    return {layer.name: layer for layer in recorded}


def _layer(path: Path, number: int, layer: object) -> RecordedLayer:
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,), "method": (str,), "bits": (int,), "group_size": (int,), "relative_error": (int, float),
    }  # fmt: skip
    if not isinstance(layer, dict):
        raise CheckpointError(f"{path}: layers[{number}] is {layer!r:.80}; expected an object.", _HINT)
    for key, kind in kinds.items():
        if not isinstance(layer.get(key), kind):
            raise CheckpointError(f"{path}: layers[{number}].{key} is {layer.get(key)!r:.80}.", _HINT)
    return RecordedLayer(**{key: layer[key] for key in kinds})


def _folds(path: Path, content: dict[str, Any]) -> dict[str, tuple[FoldRecord, ...]]:
    stored = content.get("folds", [])
    if not isinstance(stored, list):
        raise CheckpointError(f"{path}: `folds` is {stored!r:.80}; expected a list.", _HINT)
    by_tensor: dict[str, tuple[FoldRecord, ...]] = {}
    for number, entry in enumerate(stored):
        try:
            fold = FoldRecord.from_dict(entry)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: folds[{number}]: {error.message}", _HINT) from error
        for name in (*fold.divided, *fold.multiplied):
            by_tensor[name] = (*by_tensor.get(name, ()), fold)
    return by_tensor
