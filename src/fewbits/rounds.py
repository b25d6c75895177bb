"""Rounds: which inputs of a block are gathered in one go, where micro-batches do not wait for each other in it.

A round takes every micro-batch up to the first input whose consumers are not solved yet, and no further. Linears of one
input share a round, and so do a mixture's experts, member by member: none of them feeds another.
"""

from __future__ import annotations

from collections.abc import Sequence

from fewbits.input_groups import InputGroup, InputGroups

# What one round gathers: a kind, and two numbers.
Stage = tuple[str, int, int]


class Gathered(Exception):
    """A micro-batch has come to what a round gathers, and need not go on."""


class Rounds:
    """The rounds of one block."""

    def __init__(self, groups: InputGroups) -> None:
        self._groups = groups
        self._over: set[Stage] = set()
        self._stage: Stage | None = None
        self._has_gathered = False

    def begin(self) -> bool:
        """Begin the next round: what the forward meets first of what is left. False if nothing is."""
        if self._stage is not None:
            self._over.add(self._stage)
        left = [group for group in self._groups if _stage(group) not in self._over]
        self._stage = _stage(min(left, key=lambda group: group.order)) if left else None
        return bool(left)

    def begin_micro_batch(self) -> None:
        """Begin with a micro-batch: it has gathered nothing yet."""
        self._has_gathered = False

    def met(self, group: InputGroup) -> Sequence[InputGroup]:
        """The groups that an input counts for which a micro-batch has just come to."""
        if _stage(group) != self._stage:
            return ()
        self._has_gathered = True
        return [group] if group.has_experts else self.gathered()

    def is_enough(self, group: InputGroup) -> bool:
        """Whether nothing behind a group is of this round: experts come one by one, each with all its members."""
        return self._has_gathered and _stage(group) not in self._over and not group.has_experts

    def gathered(self) -> list[InputGroup]:
        """The groups of this round, in the order in which they are solved."""
        own = [group for group in self._groups if _stage(group) == self._stage]
        return sorted(own, key=lambda group: group.order)


def _stage(group: InputGroup) -> Stage:
    """The same for groups of one round."""
    place, _, member = group.order
    if group.has_experts:
        return "experts", place, member
    return ("input", group.input, 0) if group.input >= 0 else ("alone", place, member)
