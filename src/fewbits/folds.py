"""Folds: scales of a linear's input channels that what produces the input can take up, found by probing and proven.

A fold says: multiply the weight's columns by s, divide the producer's rows by s, and nothing changes. Producers are
norms (of either kind, w or 1 + w) and linears whose rows reach the input channel by channel: v through attention to o,
up through the product with the gate to down. Nothing is listed by name. Structure proposes (the norm whose output is
the very tensor that is multiplied, the linears under the same parent); random scales on the candidate's rows show which
row each input channel follows; and random scales folded in both places must leave the block's output as it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fewbits.probing import Place, ProbedBlock, Seen
from fewbits.watching import Slot

# The block's fp32 output may change by this share of what the block adds to its input …
TOLERANCE = 1e-4
# … and by what rounding in fp32 does to what passes it by.
ROUNDING = 2e-6
PROBE_RANGE = (1.25, 5.0)
PROOF_RANGE = (0.25, 4.0)
SEED = 0


@dataclass(frozen=True, eq=False)
class Fold:
    """A producer and the consumers of one input.

    norm_offset: a norm multiplies by (w + offset), 0 or 1; None for a linear, whose rows are scaled.
    bias: the producer's bias, divided as well.
    rows: for each input channel the producer's row, int64 [in]; −1 where the channel cannot be scaled. Channels with
    the same row (under grouped queries) share a scale.
    """

    producer: Slot
    norm_offset: float | None
    bias: str | None
    rows: torch.Tensor
    consumers: tuple[Slot, ...]

    def by_row(self, s: torch.Tensor, count: int) -> torch.Tensor:
        """Scales of the producer's `count` rows from those of the input channels; 1 for rows that feed none."""
        factors = torch.ones(count, dtype=s.dtype)
        scaled = self.rows >= 0
        factors[self.rows[scaled]] = s[scaled]
        return factors


@dataclass(frozen=True)
class Refused:
    """Consumers of one input without a fold, and why."""

    consumers: tuple[Slot, ...]
    why: str


def find_folds(probed: ProbedBlock, groups: Sequence[tuple[Slot, ...]]) -> tuple[list[Fold], list[Refused]]:
    """Folds for groups of matrices that share an input, each proven; and the groups that have none.

    Args:
        probed: the block. groups: the slots of each input, in the order in which the forward meets them.
    """
    output = probed.run()
    seen, norms = dict(probed.inputs), dict(probed.norm_outputs)
    found: list[Fold] = []
    refused: list[Refused] = []
    searched: dict[tuple[str, ...], list[_Search]] = {}
    for slots in groups:
        first = seen.get((slots[0].parameter, slots[0].expert))
        if first is None:
            refused.append(Refused(slots, "no token of the probe reached it"))
            continue
        norm = norms.get(first.identity)
        search = _Search(slots, first, _candidates(probed, seen, first, norm))
        searched.setdefault(_family(slots[0]), []).append(search)
    for family in searched.values():
        _probe(probed, family)
        for search in family:
            if search.fold is None:
                refused.append(Refused(search.slots, "nothing before it can take its scales up"))
            else:
                found.append(search.fold)
    proven, failed = _prove(probed, found, output)
    refused += [Refused(fold.consumers, _why_failed(fold)) for fold in failed]
    return proven, refused


def _why_failed(fold: Fold) -> str:
    return f"scaling {fold.producer.parameter} changes the block's output: something else uses it as well"


@dataclass(frozen=True)
class _Candidate:
    """A producer to try, and which of its rows."""

    slot: Slot
    norm_offset: float | None
    rows: torch.Tensor


@dataclass
class _Search:
    slots: tuple[Slot, ...]
    seen: Seen
    candidates: list[_Candidate]
    fold: Fold | None = None


def _family(slot: Slot) -> tuple[str, ...]:
    """Experts of one kind make a family: they cannot influence each other and are probed together."""
    return tuple("#" if part.isdecimal() else part for part in slot.parameter.split("."))


def _candidates(probed: ProbedBlock, seen: dict[Place, Seen], consumer: Seen, norm: str | None) -> list[_Candidate]:
    """What may produce an input: the norm that returned it, else the linears under the same parent, nearest first."""
    width = consumer.inputs.shape[1]
    if norm is not None:
        rows = torch.arange(probed.parameters[norm].numel())
        return [_Candidate(Slot(norm), offset, rows) for offset in (0.0, 1.0)]
    found: list[_Candidate] = []
    parent = _parent(consumer.slot)
    before = list(itertools.takewhile(lambda other: other.identity != consumer.identity, seen.values()))
    for producer in reversed(before):
        if _parent(producer.slot) != parent or producer.slot.expert != consumer.slot.expert:
            continue
        matrix = probed.parameters[producer.slot.parameter]
        count = matrix.shape[-1] if producer.slot.transposed else matrix.shape[-2]
        found += [_Candidate(producer.slot, None, rows) for rows in _row_choices(count, width)]
    return found


def _parent(slot: Slot) -> str:
    """Where a matrix belongs: the module that holds its linear, or the stack's."""
    depth = 1 if slot.expert is not None else 2
    return slot.parameter.rsplit(".", depth)[0] if slot.parameter.count(".") >= depth else ""


def _row_choices(count: int, width: int) -> Iterator[torch.Tensor]:
    """Which rows of a producer could feed `width` channels: all, or a part of what several linears were fused into."""
    every = torch.arange(count)
    if count <= width:
        if width % count == 0:
            yield every
        return
    if (count - width) % 2 == 0 and width % max((count - width) // 2, 1) == 0:
        yield every[(count + width) // 2 :]  # q, k, v one after the other: v
    if count == 2 * width:
        yield every[width:]  # gate, up
        yield every[:width]
    if count == 3 * width:
        for size in range(8, width + 1, 8):
            if width % size == 0:
                yield every.view(-1, 3, size)[:, 2].reshape(-1)  # q, k, v of one head after the other


def _probe(probed: ProbedBlock, family: list[_Search]) -> None:
    """Try the candidates of all members at once, the first of each, then the second, until each has its fold."""
    for turn in range(max((len(search.candidates) for search in family), default=0)):
        open_searches = [search for search in family if search.fold is None and turn < len(search.candidates)]
        if not open_searches:
            return
        factors = []
        for number, search in enumerate(open_searches):
            candidate = search.candidates[turn]
            factors.append(_distinct_factors(len(candidate.rows), number))
            scattered = torch.ones(len(probed.rows_of(candidate.slot)))
            scattered[candidate.rows] = factors[-1]
            probed.scale_rows(candidate.slot, scattered, candidate.norm_offset or 0.0)
        probed.run()
        after = dict(probed.inputs)
        probed.reset()
        for search, tried in zip(open_searches, factors, strict=True):
            candidate = search.candidates[turn]
            now = after.get(search.seen.place)
            if now is None or now.inputs.shape != search.seen.inputs.shape:
                continue
            followed = followed_rows(search.seen.inputs, now.inputs, tried)
            if followed is not None:
                rows = torch.where(followed >= 0, candidate.rows[followed.clamp_min(0)], followed)
                bias = probed.bias_of(candidate.slot.parameter)
                search.fold = Fold(candidate.slot, candidate.norm_offset, bias, rows, search.slots)


def _distinct_factors(count: int, seed: int) -> torch.Tensor:
    """As many factors as rows, no two alike, none near 1, in no order."""
    low, high = (math.log(bound) for bound in PROBE_RANGE)
    steps = (torch.randperm(count, generator=torch.Generator().manual_seed(SEED + seed)) + 0.5) / count
    return torch.exp(low + (high - low) * steps)


def followed_rows(before: torch.Tensor, after: torch.Tensor, factors: torch.Tensor) -> torch.Tensor | None:
    """Which row's factor each channel was multiplied by, the same at every token; −1 for channels that are all zero.

    Args:
        before, after: the input [tokens, in]. factors: of the rows, distinct.

    Returns:
        int64 [in], or None if some channel follows no row.
    """
    size = before.abs().amax(0)
    alive = size > 0
    if not bool(alive.any()):
        return None
    unit = before / size.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = after / size.clamp_min(torch.finfo(torch.float32).tiny)
    ratio = (unit * scaled).sum(0) / unit.square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    constant = (scaled - ratio * unit).abs().amax(0) <= TOLERANCE * ratio.abs()
    values, order = factors.sort()
    place = torch.searchsorted(values, ratio.contiguous()).clamp(1, max(len(values) - 1, 1))
    if len(values) == 1:
        nearest = torch.zeros_like(place)
    else:
        left = ratio - values[place - 1] < values[place] - ratio
        nearest = torch.where(left, place - 1, place)
    # Half the distance of neighbours apart, where rows are many.
    near = min(TOLERANCE, 0.45 * math.log(PROBE_RANGE[1] / PROBE_RANGE[0]) / len(values))
    follows = constant & ((ratio / values[nearest] - 1).abs() <= near)
    if not bool(follows[alive].all()):
        return None
    return torch.where(alive, order[nearest], -1)


def _prove(probed: ProbedBlock, folds: list[Fold], output: torch.Tensor) -> tuple[list[Fold], list[Fold]]:
    """Fold random scales in; together, and if that fails one by one. Returns the folds that hold, and the others."""
    if not folds or _holds(probed, folds, output):
        return folds, []
    alone = [fold for fold in folds if _holds(probed, [fold], output)]
    if len(alone) > 1 and not _holds(probed, alone, output):
        alone = []
    return alone, [fold for fold in folds if fold not in alone]


def _holds(probed: ProbedBlock, folds: list[Fold], output: torch.Tensor) -> bool:
    for number, fold in enumerate(folds):
        apply_scales(probed, fold, _random_scales(fold, number))
    changed = probed.run()
    probed.reset()
    return unchanged(output, changed, probed.hidden)


def _random_scales(fold: Fold, seed: int) -> torch.Tensor:
    """Scales of the input channels, the same for channels of the same row."""
    low, high = (math.log(bound) for bound in PROOF_RANGE)
    generator = torch.Generator().manual_seed(SEED + seed)
    by_row = torch.exp(low + (high - low) * torch.rand(int(fold.rows.max()) + 1, generator=generator))
    return torch.where(fold.rows >= 0, by_row[fold.rows.clamp_min(0)], 1.0)


def apply_scales(probed: ProbedBlock, fold: Fold, s: torch.Tensor) -> None:
    """Multiply the consumers' columns by s [in], divide the producer's rows."""
    rows = fold.by_row(s, len(probed.rows_of(fold.producer)))
    probed.scale_rows(fold.producer, 1 / rows, fold.norm_offset or 0.0)
    for slot in fold.consumers:
        probed.scale_inputs(slot, s)


def unchanged(before: torch.Tensor, after: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether a block's output is the same at every token, measured by what the block adds to its input."""
    added = torch.linalg.vector_norm(before - hidden, dim=-1)
    passed = torch.linalg.vector_norm(before, dim=-1)
    changed = torch.linalg.vector_norm(after - before, dim=-1)
    return bool((changed <= TOLERANCE * added + ROUNDING * passed).all())
