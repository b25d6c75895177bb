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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fewbits.probing import Place, ProbedBlock, Seen
from fewbits.watching import Slot

# The block's fp32 output may change by this share of what the block adds to its input …
TOLERANCE = 1e-4
# … and by what rounding in fp32 does to what passes it by.
ROUNDING = 2e-6
PROBE_RANGE = (1.25, 5.0)
# Rows of linears are told apart by powers of two, which scale their sums without rounding anything.
PROBE_POWERS = torch.tensor([power for power in range(-32, 33) if power != 0])
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
    seen, norms, norm_rows = dict(probed.inputs), dict(probed.norm_outputs), dict(probed.norm_rows)
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
                refused.append(Refused(search.slots, _why_none(search.seen.inputs, norm_rows)))
            else:
                found.append(search.fold)
    proven, failed = _prove(probed, found, output)
    refused += [Refused(fold.consumers, _why_failed(fold)) for fold in failed]
    return proven, refused


def _why_none(inputs: torch.Tensor, norm_rows: Mapping[str, torch.Tensor]) -> str:
    """Why an input has no producer that could take scales up, as far as can be seen."""
    if not bool(inputs.any()):
        return "its input is zero at every token"
    for norm, rows in norm_rows.items():
        if rows.shape[1] == inputs.shape[1] and bool((rows == inputs[0]).all(1).any()):
            return f"it sees a choice of the tokens of {norm}, which others read as well"
    return "nothing before it can take its scales up"


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
        candidates = [search.candidates[turn] for search in open_searches]
        tries = [(candidate, _factors(candidate, number)) for number, candidate in enumerate(candidates)]
        after = [_inputs_after(probed, tries, run) for run in range(max(len(factors) for _, factors in tries))]
        for search, (candidate, tried) in zip(open_searches, tries, strict=True):
            now = [seen[search.seen.place].inputs.cpu() for seen in after[: len(tried)] if search.seen.place in seen]
            if len(now) < len(tried) or any(inputs.shape != search.seen.inputs.shape for inputs in now):
                continue
            followed = followed_rows(search.seen.inputs.cpu(), now, tried)
            if followed is not None:
                rows = torch.where(followed >= 0, candidate.rows[followed.clamp_min(0)], followed)
                bias = probed.bias_of(candidate.slot.parameter)
                search.fold = Fold(candidate.slot, candidate.norm_offset, bias, rows, search.slots)


def _inputs_after(
    probed: ProbedBlock, tries: Sequence[tuple[_Candidate, Sequence[torch.Tensor]]], run: int
) -> dict[Place, Seen]:
    """What enters the matrices when the rows of candidates are multiplied by their factors for a run."""
    for candidate, factors in tries:
        if run >= len(factors):
            continue
        scattered = torch.ones(len(probed.rows_of(candidate.slot)))
        scattered[candidate.rows] = factors[run]
        probed.scale_rows(candidate.slot, scattered, candidate.norm_offset or 0.0)
    probed.run()
    inputs = dict(probed.inputs)
    probed.reset()
    return inputs


def _factors(candidate: _Candidate, seed: int) -> list[torch.Tensor]:
    """Factors of a candidate's rows for each run, none near 1; no two rows have the same in all runs.

    A row whose sum nearly cancels is rounded otherwise when it is scaled, and may be all that a channel sees: by 3e-5
    seen on SmolLM2-135M, where every token looks at the first one's value. So rows of linears get powers of two, digits
    of the row's number, in as many runs as it has digits. A norm's rows are no sums: one run tells them apart.
    """
    count = len(candidate.rows)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED + seed))
    if candidate.norm_offset is not None:
        low, high = (math.log(bound) for bound in PROBE_RANGE)
        return [torch.exp(low + (high - low) * (order + 0.5) / count)]
    digits = [order % len(PROBE_POWERS)]
    while (order := order // len(PROBE_POWERS)).any():
        digits.append(order % len(PROBE_POWERS))
    return [PROBE_POWERS[digit].float().exp2() for digit in digits]


def followed_rows(
    before: torch.Tensor, after: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """Which row's factors each channel was multiplied by, the same at every token; −1 for channels that are all zero.

    Args:
        before: the input [tokens, in]; after: in each run. factors: of the rows in each run, distinct taken together.

    Returns:
        int64 [in], or None if some channel follows no row.
    """
    size = before.abs().amax(0)
    alive = size > 0
    if not bool(alive.any()):
        return None
    follows = alive
    found = torch.zeros(before.shape[1], dtype=torch.int64)
    expected = torch.zeros(len(factors[0]), dtype=torch.int64)
    for now, tried in zip(after, factors, strict=True):
        levels = torch.from_numpy(np.unique(tried.numpy()))
        nearest, near = _nearest_levels(before, now, size, levels)
        follows = follows & near
        found = found * len(levels) + nearest
        expected = expected * len(levels) + torch.searchsorted(levels, tried)
    numbers, order = expected.sort()
    place = torch.searchsorted(numbers, found).clamp_max(len(numbers) - 1)
    follows = follows & (numbers[place] == found)
    if not bool(follows[alive].all()):
        return None
    return torch.where(alive, order[place], -1)


def _nearest_levels(
    before: torch.Tensor, after: torch.Tensor, size: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each channel the level, of ascending ones, nearest to what it was multiplied by; and whether it is near."""
    unit, scaled = (values / size.clamp_min(torch.finfo(torch.float32).tiny) for values in (before, after))
    ratio = (unit * scaled).sum(0) / unit.square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    constant = (scaled - ratio * unit).abs().amax(0) <= TOLERANCE * ratio.abs()
    right = torch.searchsorted(levels, ratio.contiguous()).clamp_max(len(levels) - 1)
    left = (right - 1).clamp_min(0)
    nearest = torch.where((ratio - levels[left]).abs() < (levels[right] - ratio).abs(), left, right)
    # Less than half the distance of neighbours apart, where rows are many.
    apart = float((levels[1:] / levels[:-1]).min()) - 1 if len(levels) > 1 else math.inf
    return nearest, constant & ((ratio / levels[nearest] - 1).abs() <= min(TOLERANCE, 0.45 * apart))


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
