"""Folded layers: which groups of linears a fold serves, and what it changes in the files of their block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewbits.absorbing import FileEdits, FoldPlace, absorb
from fewbits.fold_records import FoldRecord, unscaled
from fewbits.layers import LinearLayer
from fewbits.notes import Note
from fewbits.plan import PlannedLayer
from fewbits.solve_layers import TOKENS_PER_CHANNEL, Coupling, Scaling, SolvedLayer, solve_group
from fewbits.statistics import Statistics
from fewbits.tensors import decode
from fewbits.transforms.ties import Ties


@dataclass
class BlockResult:
    """What is known of a block so far.

    records: of solved layers by name. edits: what its files will hold. folds: what was scaled.
    """

    edits: FileEdits
    records: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    folds: list[FoldRecord] = field(default_factory=list)


@dataclass
class LayerSolver:
    """Solves the groups of a block as they come, with or without a fold; `finish` hands the block over.

    coupling: the output Grams of a layer; None if they were not measured.
    """

    planned: Mapping[str, PlannedLayer]
    read: Callable[[str], torch.Tensor]
    check: Callable[[LinearLayer, torch.Tensor], None]
    coupling: Coupling | None = None

    def __post_init__(self) -> None:
        self._layer_of = {layer.layer.tensor: name for name, layer in self.planned.items()}
        self._begin()

    def _begin(self) -> None:
        self._block = BlockResult(FileEdits(self.read, {}, {}))

    def finish(self) -> BlockResult:
        """What became of the block since the last call."""
        done = self._block
        self._begin()
        return done

    def note(self, note: Note) -> None:
        """Add a note to the block at hand."""
        self._block.notes.append(note)

    @property
    def is_folding(self) -> bool:
        """Whether any method has a transform."""
        return any(layer.method is not None and layer.method.transform is not None for layer in self.planned.values())

    def wants(self, layers: Sequence[LinearLayer]) -> bool:
        """Whether the consumers of one input are to be scaled: all have the same method, one with a transform."""
        methods = {self.planned[layer.name].method for layer in layers}
        scaling = [method for method in methods if method is not None and method.transform is not None]
        if scaling and len(methods) > 1:
            why = "layers of unlike methods share them: " + ", ".join(sorted(str(method) for method in methods))
            self._block.notes.append(Note(layers[0].name, "its input channels are not scaled", why))
        return bool(scaling) and len(methods) == 1

    def tokens_for_gram(self, layers: Sequence[LinearLayer]) -> int | None:
        """SmoothQuant's Gram only ranks values of α, which a part of the tokens can; all others solve by theirs."""
        method = self.planned[layers[0].name].method
        ranks = method is not None and method.transform == "smoothquant" and method.solver_name == "rtn"
        return TOKENS_PER_CHANNEL * layers[0].in_features if ranks else None

    def solve_plainly(
        self, layers: Sequence[LinearLayer], weights: Sequence[torch.Tensor], statistics: Statistics | None
    ) -> list[torch.Tensor | None]:
        """Solve layers whose inputs stay as they are."""
        return self._solve(layers, weights, statistics, None)

    def solve(
        self,
        layers: Sequence[LinearLayer],
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        place: FoldPlace,
        sample: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """Solve layers whose input channels may be scaled."""

        def absorbed(s: torch.Tensor) -> torch.Tensor:
            taken, fold = absorb(place, s, self._block.edits), place.fold
            if bool((taken.inputs != 1).any()):
                tensors = tuple(layer.tensor for layer in layers)
                transposed = fold.producer.transposed
                self._block.folds.append(FoldRecord(taken.divided, tensors, taken.inputs, fold.norm_offset, transposed))
                for name in taken.divided.keys() & self._block.edits.quantized.keys():
                    self._compare_divided(name)
            return taken.inputs

        return self._solve(layers, weights, statistics, Scaling(Ties(place.fold.rows), sample, absorbed))

    def _compare_divided(self, tensor: str) -> None:
        """Take the error of a quantized layer anew: its divided scales were rounded once more, group by group."""
        weight, exact = self._block.edits.quantized[tensor], self.read(tensor).float()
        squared_error = (exact - unscaled(decode(weight), tensor, self._block.folds)).square().sum(1)
        name = self._layer_of[tensor]
        self._block.records[name] = replace(
            self._block.records[name], squared_error=squared_error.sum(dtype=torch.float64).item()
        )

    def _solve(
        self,
        layers: Sequence[LinearLayer],
        weights: Sequence[torch.Tensor],
        statistics: Statistics | None,
        scaling: Scaling | None,
    ) -> list[torch.Tensor | None]:
        for layer, weight in zip(layers, weights, strict=True):
            self.check(layer, weight)
        solved: dict[str, SolvedLayer] = solve_group(
            layers, weights, statistics, self.planned, self._block.notes, scaling, self.coupling
        )
        for layer in layers:
            self._block.records[layer.name] = solved[layer.name].record
            self._block.edits.quantized[layer.tensor] = solved[layer.name].weight
        return [solved[layer.name].effective for layer in layers]
