"""Progress on the terminal: a bar where there is one, plain lines on a pipe, nothing when asked for silence."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import DownloadColumn as BytesColumn
from rich.progress import Progress as RichProgress

from fewbits.cli.units import bytes_text, seconds_text
from fewbits.notes import Note
from fewbits.progress import Progress, Silent

LINE_EVERY_S = 10.0


class Bar:
    """A bar with speed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.end()
        counts: list[ProgressColumn] = (
            [BytesColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
        )
        columns = [TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn(), TextColumn("left")]
        # A window of 20 s: long enough to smooth over one slow write, short enough to follow a slow disk.
        remaining = TimeRemainingColumn(compact=True)
        self._bar = RichProgress(
            *columns, remaining, TextColumn("[dim]{task.fields[detail]}"),
            console=self._console, transient=True, speed_estimate_period=20.0,
        )  # fmt: skip
        self._bar.add_task(stage, total=total, detail="")
        self._bar.start()

    def advance(self, amount: int, detail: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=amount, detail=detail)

    def note(self, note: Note) -> None:
        self._console.print(f"[yellow]note[/] {note}", highlight=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Lines:
    """A line every ten seconds, for logs."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._total, self._unit, self._done = stage, total, unit, 0
        self._started_s = self._printed_s = time.monotonic()

    def advance(self, amount: int, detail: str = "") -> None:
        self._done += amount
        now_s = time.monotonic()
        if now_s - self._printed_s < LINE_EVERY_S:
            return
        self._printed_s = now_s
        elapsed_s = now_s - self._started_s
        remaining_s = elapsed_s / max(self._done, 1) * (self._total - self._done)
        print(
            f"{self._stage}: {self._amount(self._done)} of {self._amount(self._total)}, {detail}, "
            f"{seconds_text(elapsed_s)} elapsed, about {seconds_text(remaining_s)} left",
            file=sys.stderr,
            flush=True,
        )

    def _amount(self, count: int) -> str:
        return bytes_text(count) if self._unit == "bytes" else f"{count} {self._unit}"

    def note(self, note: Note) -> None:
        print(f"note: {note}", file=sys.stderr, flush=True)

    def end(self) -> None: ...


def watcher(*, quiet: bool) -> Progress:
    """What fits the terminal: a bar, lines, or nothing."""
    if quiet:
        return Silent()
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()
