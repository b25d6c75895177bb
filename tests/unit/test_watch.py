"""What is said while a verb runs: remaining time by the pace of late, and notes that repeat themselves."""

from __future__ import annotations

import pytest

from fewbits.cli.pace import Pace
from fewbits.cli.watch import Lines
from fewbits.notes import Note


def test_the_first_step_says_nothing_of_the_others() -> None:
    pace = Pace(100, now_s=0.0)
    pace.advance(1, now_s=60.0)
    assert pace.remaining_s(60.0) is None
    for step in range(1, 5):
        pace.advance(1, now_s=60.0 + step)
    assert pace.remaining_s(64.0) == pytest.approx(95.0)


def test_remaining_time_follows_the_pace_of_late() -> None:
    pace = Pace(1000, now_s=0.0)
    now_s = 0.0
    for seconds in [1.0] * 100 + [2.0] * 60:
        now_s += seconds
        pace.advance(1, now_s)
    assert pace.remaining_s(now_s) == pytest.approx(2.0 * 840, rel=0.05)


def test_remaining_time_runs_down_between_steps_and_ends_at_nothing() -> None:
    pace = Pace(10, now_s=0.0)
    for step in range(1, 10):
        pace.advance(1, now_s=10.0 * step)
    assert pace.remaining_s(94.0) == pytest.approx(6.0)
    assert pace.remaining_s(200.0) == 0.0


def test_few_large_steps_have_a_pace_too() -> None:
    pace = Pace(8, now_s=0.0)
    for step in range(1, 6):
        pace.advance(1, now_s=100.0 * step)
    assert pace.remaining_s(500.0) == pytest.approx(300.0)


def test_notes_that_differ_in_the_layer_alone_are_shown_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.begin("calibrating", 4, "linears")
    for name in ("a", "b", "c"):
        lines.note(Note(name, "solved on 8 tokens", "give more text"))
    lines.note(Note("d", "left alone", "it is tied"))
    lines.end()
    lines.note(Note("e", "solved on 8 tokens", "give more text"))
    lines.end()
    assert capsys.readouterr().err.splitlines() == [
        "note: a: solved on 8 tokens (give more text)",
        "note: d: left alone (it is tied)",
        "note: 2 more: solved on 8 tokens (give more text)",
        "note: 1 more: solved on 8 tokens (give more text)",
    ]
