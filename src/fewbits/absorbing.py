"""Absorbing: a fold's scales taken up by what the files will hold of its producer, and what they become by rounding.

A norm's vector or an unquantized linear is stored divided; a linear whose codes are chosen already has the scales of
its rows divided, which changes no code. Stored numbers are rounded, so the scales that count are those that the stored
numbers imply: the consumers are quantized with these, and the pair is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch

from fewbits.folds import Fold
from fewbits.skeleton import Part
from fewbits.tensors import QuantizedWeight


@dataclass(frozen=True)
class FoldPlace:
    """A fold, and where its producer lies in the files: the tensors of its rows, and its bias if it has one."""

    fold: Fold
    parts: tuple[Part, ...]
    bias: str | None


@dataclass
class FileEdits:
    """What a block's files will hold: quantized weights by the name of their tensor, and tensors stored otherwise."""

    read: Callable[[str], torch.Tensor]
    quantized: MutableMapping[str, QuantizedWeight]
    tensors: MutableMapping[str, torch.Tensor]

    def stored(self, name: str) -> torch.Tensor:
        """An unquantized tensor as it will be stored."""
        return self.tensors[name] if name in self.tensors else self.read(name)


@dataclass(frozen=True, eq=False)
class Absorbed:
    """The scales that count, which are those that the stored numbers imply.

    inputs: of the input channels, fp32 [in]; 1 where a channel cannot be scaled.
    divided: by the name of a tensor that changed, what its rows were divided by, fp32 [rows].
    """

    inputs: torch.Tensor
    divided: Mapping[str, torch.Tensor]


def absorb(place: FoldPlace, s: torch.Tensor, edits: FileEdits) -> Absorbed:
    """Divide the producer's rows by the scales of the input channels they feed.

    Args:
        s: fp32 [in], positive, the same for channels of the same row.
    """
    fold = place.fold
    count = max(part.stop for part in place.parts)
    if fold.producer.transposed:
        count = edits.stored(place.parts[0].tensor).shape[1]
    wanted = fold.by_row(s, count)
    became = torch.ones(count)
    divided: dict[str, torch.Tensor] = {}
    for part in place.parts:
        rows = slice(0, count) if fold.producer.transposed else slice(part.start, part.stop)
        if bool((wanted[rows] == 1).all()):
            continue
        if fold.norm_offset is not None:
            became[rows] = _absorb_in_norm(part.tensor, wanted[rows], fold.norm_offset, edits)
        elif part.tensor in edits.quantized:
            became[rows] = _absorb_in_codes(part.tensor, wanted[rows], edits)
        else:
            became[rows] = _absorb_in_rows(part.tensor, wanted[rows], fold.producer.transposed, edits)
        divided[part.tensor] = became[rows]
    if place.bias is not None:
        bias = edits.stored(place.bias)
        edits.tensors[place.bias] = (bias.float() / became).to(bias.dtype)
        divided[place.bias] = became
    return Absorbed(torch.where(fold.rows >= 0, became[fold.rows.clamp_min(0)], 1.0), divided)


def _absorb_in_norm(name: str, wanted: torch.Tensor, offset: float, edits: FileEdits) -> torch.Tensor:
    stored = edits.stored(name)
    before = stored.float() + offset
    divided = (before / wanted - offset).to(stored.dtype)
    after = divided.float() + offset
    became = before / after
    # Weights of zero have nothing to divide, and what rounds to zero or changes its sign cannot be multiplied back.
    usable = torch.isfinite(became) & (became > 0) & (wanted != 1)
    edits.tensors[name] = torch.where(usable, divided, stored)
    return torch.where(usable, became, 1.0)


def _absorb_in_codes(name: str, wanted: torch.Tensor, edits: FileEdits) -> torch.Tensor:
    weight = edits.quantized[name]
    before = weight.scales.float()
    limits = torch.finfo(weight.scales.dtype)
    divided = before / wanted[:, None]
    divided = (divided.abs().clamp(limits.tiny, limits.max) * divided.sign()).to(weight.scales.dtype)
    edits.quantized[name] = replace(weight, scales=divided)
    # Groups of one row round differently, by 2⁻⁹ in bf16 at most: less than activations are rounded by.
    return (before / divided.float()).mean(1)


def _absorb_in_rows(name: str, wanted: torch.Tensor, transposed: bool, edits: FileEdits) -> torch.Tensor:
    stored = edits.stored(name)
    # Powers of two, so that nothing is rounded a second time.
    powers = wanted.log2().round().exp2()
    divided = stored.float() / (powers if transposed else powers[:, None])
    edits.tensors[name] = divided.to(stored.dtype)
    return powers
