"""What the tests of the command line share: the type of the `cli` fixture and of what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]
