"""Progress on the terminal: a bar where there is one, plain lines on a pipe, nothing when asked for silence."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.progress import DownloadColumn as BytesColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from fewbits.cli.pace import Pace
from fewbits.cli.units import bytes_text, seconds_text
from fewbits.notes import Note
from fewbits.progress import Progress, Silent

LINE_EVERY_S = 10.0


class _RepeatedNotes:
    """Of notes that differ in the layer alone the first is shown at once, the others are counted and told of later."""

    def __init__(self) -> None:
        self._more: dict[tuple[str, str], int] = {}

    def is_first(self, note: Note) -> bool:
        """Whether to show it now."""
        kind = note.what, note.why
        self._more[kind] = self._more.get(kind, -1) + 1
        return self._more[kind] == 0

    def rest(self) -> list[str]:
        """What to say of the others; they are forgotten then."""
        lines = [f"{count} more: {what} ({why})" for (what, why), count in self._more.items() if count]
        self._more = dict.fromkeys(self._more, 0)
        return lines


class _RemainingColumn(ProgressColumn):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        remaining_s = self._pace.remaining_s(time.monotonic())
        return Text(
            "" if remaining_s is None else f"about {seconds_text(remaining_s)} left", style="progress.remaining"
        )


class Bar:
    """A bar with speed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._notes = _RepeatedNotes()

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.end()
        counts: list[ProgressColumn] = (
            [BytesColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
        )
        columns = [TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn()]
        self._pace = Pace(total, time.monotonic())
        self._bar = RichProgress(
            *columns, _RemainingColumn(self._pace), TextColumn("[dim]{task.fields[detail]}"),
            console=self._console, transient=True,
        )  # fmt: skip
        self._bar.add_task(stage, total=total, detail="")
        self._bar.start()

    def advance(self, amount: int, detail: str = "") -> None:
        if self._bar is not None:
            self._pace.advance(amount, time.monotonic())
            self._bar.update(self._bar.task_ids[0], advance=amount, detail=detail)

    def note(self, note: Note) -> None:
        if self._notes.is_first(note):
            self._console.print(f"[yellow]note[/] {note}", highlight=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for line in self._notes.rest():
            self._console.print(f"[yellow]note[/] {line}", highlight=False)


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self) -> None:
        self._notes = _RepeatedNotes()

    def begin(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._printed_s = time.monotonic()
        self._pace = Pace(total, self._printed_s)

    def advance(self, amount: int, detail: str = "") -> None:
        now_s = time.monotonic()
        self._pace.advance(amount, now_s)
        if now_s - self._printed_s < LINE_EVERY_S:
            return
        self._printed_s = now_s
        remaining_s = self._pace.remaining_s(now_s)
        print(
            f"{self._stage}: {self._amount(self._pace.done)} of {self._amount(self._total)}, {detail}, "
            f"{seconds_text(now_s - self._pace.started_s)} elapsed"
            + ("" if remaining_s is None else f", about {seconds_text(remaining_s)} left"),
            file=sys.stderr,
            flush=True,
        )

    def _amount(self, count: int) -> str:
        return bytes_text(count) if self._unit == "bytes" else f"{count} {self._unit}"

    def note(self, note: Note) -> None:
        if self._notes.is_first(note):
            print(f"note: {note}", file=sys.stderr, flush=True)

    def end(self) -> None:
        for line in self._notes.rest():
            print(f"note: {line}", file=sys.stderr, flush=True)


def watcher(*, quiet: bool) -> Progress:
    """What fits the terminal: a bar, lines, or nothing."""
    if quiet:
        return Silent()
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()
