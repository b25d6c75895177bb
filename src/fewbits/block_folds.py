"""Block folds: the folds of one block in the middle of a pass, and where their producers lie in the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from fewbits.absorbing import FoldPlace
from fewbits.folds import Fold, Refused, find_folds
from fewbits.layers import LinearLayer
from fewbits.notes import Note
from fewbits.probing import ProbedBlock
from fewbits.skeleton import Part, Skeleton
from fewbits.statistics import Statistics
from fewbits.suspended import SuspendedForward
from fewbits.watching import Slot

Group = tuple[Slot, ...]


class Folding(Protocol):
    """Solves layers whose input channels may be scaled, because a fold takes the scales up."""

    def wants(self, layers: Sequence[LinearLayer]) -> bool:
        """Whether a fold is of use to the consumers of one input."""

    def tokens_for_gram(self, layers: Sequence[LinearLayer]) -> int | None:
        """How many tokens are enough for the Gram of layers that are scaled; None if all that there are count."""

    def solve(
        self,
        layers: Sequence[LinearLayer],
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        place: FoldPlace,
        sample: torch.Tensor,
    ) -> Sequence[torch.Tensor | None]:
        """Return for each layer the weight to go on with; it multiplies the input as it is, unscaled.

        Args:
            sample: some of the tokens, fp32 [n, in].
        """


def find_block_folds(
    skeleton: Skeleton,
    forward: SuspendedForward,
    index: int,
    block: nn.Module,
    parts: Mapping[str, Sequence[Part]],
    groups: Sequence[Group],
) -> tuple[dict[Group, FoldPlace], list[Refused]]:
    """Find and prove the folds of a materialized block that all micro-batches wait for.

    Args:
        parts: of each parameter. groups: matrices that share an input, in the order in which the forward meets them.
    """
    first = forward.micro_batches[0]
    with ProbedBlock(
        block, lambda arguments: forward.call(index, first, arguments), forward.arguments_of(index, first)
    ) as probed:
        folds, refused = find_folds(probed, groups)
    places = {}
    for fold in folds:
        place = _place(skeleton, index, fold, parts)
        if place is None:
            refused.append(Refused(fold.consumers, f"{fold.producer.parameter} is not made of rows of the files"))
        else:
            places[fold.consumers] = place
    return places, refused


def _place(skeleton: Skeleton, index: int, fold: Fold, parts: Mapping[str, Sequence[Part]]) -> FoldPlace | None:
    """Where a fold's producer lies in the files; None if it is made of their tensors in other ways than by rows."""
    producer = fold.producer
    bias = None if fold.bias is None else skeleton.tensor_of(index, fold.bias)
    if fold.norm_offset is not None:
        tensor = skeleton.tensor_of(index, producer.parameter)
        found = [] if tensor is None else [Part(tensor, None, 0, len(fold.rows))]
    else:
        found = [part for part in parts.get(producer.parameter, ()) if part.expert == producer.expert]
    if not found or (bias is None) != (fold.bias is None):
        return None
    return FoldPlace(fold, tuple(found), bias)


def refusal_notes(refusals: Iterable[tuple[LinearLayer, str]]) -> list[Note]:
    """Notes on layers whose inputs are not scaled and why; one for all experts that go without for the same reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for layer, why in refusals:
        alike.setdefault((layer.kind, why), []).append(layer.name)
    notes = []
    for (_, why), names in alike.items():
        others = f", nor are those of {len(names) - 1} alike" if len(names) > 1 else ""
        notes.append(Note(names[0], f"its input channels are not scaled{others}", why))
    return notes
