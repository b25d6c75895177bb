"""Kept importance: what the importance pass measured, in files, so that it is measured once, interrupted or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fewbits.block_run import TokenWeights
from fewbits.calibrate import micro_batch_size
from fewbits.importance import Watcher, measure_importance
from fewbits.layers import LinearLayer
from fewbits.output_grams import split
from fewbits.pass_memory import MEMORY_LIMIT
from fewbits.skeleton import Skeleton
from fewbits.states import write_tensors
from fewbits.token_weights import shared_weights

WEIGHTS_FILE = "importance.safetensors"
GRAMS_FILE = "output-grams-{block}.safetensors"


@dataclass(frozen=True)
class KeptImportance:
    """The importance of tokens and the output Grams of layers, in a folder.

    coupled: names of the layers whose output Grams are wanted.
    """

    folder: Path
    coupled: frozenset[str]

    @property
    def is_measured(self) -> bool:
        """Whether all files are there."""
        return self._weights.exists()

    def measure(
        self,
        skeleton: Skeleton,
        ids: torch.Tensor,
        layers: Sequence[LinearLayer],
        seed: int,
        memory_limit: int | None,
        watcher: Watcher,
    ) -> None:
        """Run the model forward and backward, and write the files.

        Raises:
            CalibrationError: a gradient is not finite.
            OutputError: the disk is full or fails.
        """
        weights = measure_importance(
            skeleton, ids, layers, micro_batch=micro_batch_size(ids.shape[1], layers), seed=seed, folder=self.folder,
            memory_limit=MEMORY_LIMIT if memory_limit is None else min(MEMORY_LIMIT, memory_limit),
            watcher=watcher, coupled=self.coupled, keep_grams=self._keep_grams,
        ).weights  # fmt: skip
        # The last file to be written: where it is, so are the others.
        write_tensors(self._weights, weights)

    def token_weights(self) -> TokenWeights:
        """One number a token for the consumers of one input; None where nothing was measured."""
        weights = load_file(str(self._weights))

        def of_group(group: Sequence[LinearLayer]) -> torch.Tensor | None:
            known = [weights[layer.name] for layer in group if layer.name in weights]
            return shared_weights(known) if known else None

        return of_group

    def output_grams(self, layer: LinearLayer) -> list[torch.Tensor] | None:
        """Of runs of the layer's outputs, as `output_grams.split` gives them; None where they were not measured."""
        path = self._grams(layer.block)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return split(file.get_tensor(layer.name), layer.out_features) if layer.name in names else None

    def _keep_grams(self, block: int, grams: dict[str, torch.Tensor]) -> None:
        if grams:
            write_tensors(self._grams(block), grams)

    @property
    def _weights(self) -> Path:
        return self.folder / WEIGHTS_FILE

    def _grams(self, block: int | None) -> Path:
        return self.folder / GRAMS_FILE.format(block=block)
