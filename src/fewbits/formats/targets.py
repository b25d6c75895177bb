"""Target strings that name modules in a quantization config: as few as can be, and proven before they are written.

A target is an exact module name, or `re:` and a regular expression that readers match from the start of the name.
Readers disagree on which of two overlapping targets wins, so every module is matched by exactly one.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import TypeVar

Label = TypeVar("Label", bound=Hashable)

# A module name with its numbers taken out (None where one stood), and the numbers.
_Family = tuple[str | None, ...]
_Numbers = tuple[str, ...]


def targets_by_label(labels: Mapping[str, Label | None]) -> dict[Label, list[str]]:
    r"""Name the modules of each label.

    Args:
        labels: every linear module of the model with its label; None where no target may match.

    Returns:
        Targets by label, in the order in which the labels first occur. Every labelled module is matched by exactly
        one target, which is among its label's; modules without a label are matched by none.

    >>> targets_by_label({"h.0.up": 4, "h.1.up": 4, "h.0.down": 8, "h.1.down": 8, "head": None})
    {4: ['re:(.*[.])?h[.][0-9]+[.]up$'], 8: ['re:(.*[.])?h[.][0-9]+[.]down$']}
    """
    # An open prefix survives readers that rename the outermost modules; not every model leaves it unambiguous.
    for open_prefix in (True, False):
        targets = _compact(labels, open_prefix)
        if _proven(targets, labels):
            return targets
    exact: dict[Label, list[str]] = {}
    for name, label in labels.items():
        if label is not None:
            exact.setdefault(label, []).append(name)
    return exact


def matches(target: str, name: str) -> bool:
    """Whether a target names this module (class names aside)."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _proven(targets: Mapping[Label, list[str]], labels: Mapping[str, Label | None]) -> bool:
    exact: dict[str, list[Label]] = {}
    patterns: list[tuple[Label, re.Pattern[str]]] = []
    for owner, listed in targets.items():
        for target in listed:
            if target.startswith("re:"):
                patterns.append((owner, re.compile(target.removeprefix("re:"))))
            else:
                exact.setdefault(target, []).append(owner)
    for name, label in labels.items():
        found = exact.get(name, []) + [matched for matched, pattern in patterns if pattern.match(name)]
        if found != ([] if label is None else [label]):
            return False
    return True


def _compact(labels: Mapping[str, Label | None], open_prefix: bool) -> dict[Label, list[str]]:
    families: dict[_Family, dict[_Numbers, Label | None]] = {}
    for name, label in labels.items():
        family, numbers = _take_numbers_out(name)
        families.setdefault(family, {})[numbers] = label
    targets: dict[Label, list[str]] = {label: [] for label in labels.values() if label is not None}
    # Families of one parent whose numbers are described alike share a target: (q_proj|k_proj|v_proj).
    siblings: dict[tuple[Label, _Family, _Numbers], list[str]] = {}
    for family, members in families.items():
        for label in dict.fromkeys(members.values()):
            if label is None:
                continue
            described = _describe_numbers(members, label) if None in family else None
            if described is None:
                own = [numbers for numbers, found in members.items() if found == label]
                targets[label] += [_put_numbers_in(family, numbers) for numbers in own]
            elif family[-1] is None:
                targets[label].append(_regex(family, described, open_prefix))
            else:
                siblings.setdefault((label, family[:-1], described), []).append(re.escape(family[-1]))
    for (owner, parent, described), names in siblings.items():
        last = names[0] if len(names) == 1 else f"({'|'.join(names)})"
        targets[owner].append(_regex(parent, described, open_prefix, last))
    return targets


def _take_numbers_out(name: str) -> tuple[_Family, _Numbers]:
    parts = name.split(".")
    return tuple(None if _is_number(part) else part for part in parts), tuple(filter(_is_number, parts))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _put_numbers_in(family: _Family, numbers: _Numbers) -> str:
    remaining = iter(numbers)
    return ".".join(next(remaining) if part is None else part for part in family)


def _describe_numbers(members: Mapping[_Numbers, Label | None], label: Label) -> _Numbers | None:
    """A regular expression for each number of those members that have the label; None if it takes more than that."""
    own = [numbers for numbers, found in members.items() if found == label]
    others = [numbers for numbers, found in members.items() if found != label]
    if not others:
        return ("[0-9]+",) * len(own[0])
    for slot in range(len(own[0])):
        mine = {numbers[slot] for numbers in own}
        if mine.isdisjoint(numbers[slot] for numbers in others):
            choice = mine.pop() if len(mine) == 1 else f"({'|'.join(sorted(mine, key=int))})"
            return tuple(choice if index == slot else "[0-9]+" for index in range(len(own[0])))
    return None


def _regex(family: _Family, numbers: _Numbers, open_prefix: bool, last: str | None = None) -> str:
    """`family` with regular expressions in place of its numbers; `last` is one more part, a regular expression."""
    remaining = iter(numbers)
    pieces = [next(remaining) if part is None else re.escape(part) for part in family]
    pieces += [] if last is None else [last]
    start = max(family.index(None) - 1, 0) if open_prefix else 0
    return f"re:{'(.*[.])?' if open_prefix else '^'}{'[.]'.join(pieces[start:])}$"
