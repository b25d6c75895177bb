"""Input groups: which linears of a block share an input, and in which order the forward meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbits.absorbing import FoldPlace
from fewbits.statistics import StatisticsAccumulator
from fewbits.token_sample import TokenSample
from fewbits.watching import Slot


@dataclass(eq=False)
class InputGroup:
    """Consumers of one input: the slots that multiply it, and the layers of the files that lie in them."""

    slots: list[Slot]
    order: tuple[int, int, int]
    accumulator: StatisticsAccumulator | None = None
    arrived: set[int] = field(default_factory=set)
    solved: bool = False
    late_tokens: int = 0
    place: FoldPlace | None = None
    sample: TokenSample | None = None
    # Of so many micro-batches one goes into the Gram.
    stride: int = 1
    # Of the distinct input among the block's.
    input: int = -1

    @property
    def has_experts(self) -> bool:
        """Whether its tokens are a choice of all."""
        return any(is_expert(slot) for slot in self.slots)


class InputGroups:
    """The groups of one block, each once, in the order in which they were found."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int | None], InputGroup] = {}
        self._units: dict[str, int] = {}
        self._members: dict[tuple[str, str], int] = {}

    def __iter__(self) -> Iterator[InputGroup]:
        return iter(dict.fromkeys(self._groups.values()))

    def recorder(self) -> Callable[[Slot, torch.Tensor], None]:
        """A watcher that groups the slots of one forward by input: the same tensor, or another view of its memory."""
        seen: list[torch.Tensor] = []  # kept alive, so that memory is not used twice
        by_input: dict[tuple[Any, ...], InputGroup] = {}

        def record(slot: Slot, inputs: torch.Tensor) -> None:
            seen.append(inputs)
            key = (inputs.data_ptr(), inputs.numel(), inputs.shape[-1], inputs._version, inputs.dtype)
            if (slot.parameter, slot.expert) in self._groups:
                return
            group = by_input.setdefault(key, InputGroup([], self._order(slot), input=len(by_input)))
            group.slots.append(slot)
            self._groups[slot.parameter, slot.expert] = group

        return record

    def of(self, slot: Slot) -> InputGroup:
        """The group of a slot; one that no recorder saw has one of its own."""
        key = slot.parameter, slot.expert
        if key not in self._groups:
            self._groups[key] = InputGroup([slot], self._order(slot))
        return self._groups[key]

    def split(self, group: InputGroup) -> None:
        """Give every slot of a group a group of its own, with the same input."""
        for slot in group.slots:
            self._groups[slot.parameter, slot.expert] = InputGroup([slot], self._order(slot), input=group.input)

    def _order(self, slot: Slot) -> tuple[int, int, int]:
        """Where a slot stands: as first seen, and experts of a list by their number, though only some are seen."""
        path = slot.parameter.split(".")
        numbers = _numbered(slot.parameter)
        if slot.expert is not None:
            unit, number, member = ".".join(path[:-1]), slot.expert, path[-1]
        elif numbers:
            unit, number, member = ".".join(path[: numbers[0]]), int(path[numbers[0]]), ".".join(path[numbers[0] + 1 :])
        else:
            unit, number, member = slot.parameter, 0, ""
        place = self._units.setdefault(unit, len(self._units))
        return place, number, self._members.setdefault((unit, member), len(self._members))


def is_expert(slot: Slot) -> bool:
    """Whether a slot is one of several that tokens are divided among: a slice, or a member of a list."""
    return slot.expert is not None or bool(_numbered(slot.parameter))


def _numbered(parameter: str) -> list[int]:
    """Where in a parameter's name numbers of list members stand."""
    return [place for place, part in enumerate(parameter.split(".")) if part.isdecimal()]
