"""Coupled runs: which outputs of a linear are taken as felt alike by the loss, and so how large their Grams are."""

from __future__ import annotations

import math
from itertools import pairwise

# Neighbouring outputs that may be coupled.
COUPLED = 1024


def coupled_runs(outputs: int) -> list[slice]:
    """Runs of at most COUPLED neighbouring outputs, as even as can be, that are coupled among themselves."""
    count = math.ceil(outputs / COUPLED)
    return [slice(*ends) for ends in pairwise(round(outputs * index / count) for index in range(count + 1))]


def gram_numbers(outputs: int) -> int:
    """Numbers in the output Grams of a linear."""
    return sum((run.stop - run.start) ** 2 for run in coupled_runs(outputs))
