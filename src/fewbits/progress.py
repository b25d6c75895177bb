"""Progress: what the verbs tell whoever watches. The command line draws it; the library stays silent by default."""

from __future__ import annotations

from typing import Protocol

from fewbits.notes import Note


class Progress(Protocol):
    """A watcher. Calls come from the thread that called the verb."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` units ("bytes", "blocks", "tokens") starts."""

    def advance(self, amount: int, detail: str = "") -> None:
        """`amount` more units are done; `detail` names what is being worked on."""

    def note(self, note: Note) -> None:
        """Something fell back or was left alone."""

    def end(self) -> None:
        """The stage is over."""


class Silent:
    """Watches nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int, detail: str = "") -> None: ...

    def note(self, note: Note) -> None: ...

    def end(self) -> None: ...
