"""Notes: what did not go the plain way, so that nothing degrades in silence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """One departure from the plain way: in the report and the exit summary, an error under `--strict`.

    layer: the module, tensor or file it happened to. what: what was done in place of the usual. why: the reason.
    """

    layer: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.what} ({self.why})"
