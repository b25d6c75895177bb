"""The command line as a fixture: `cli("plan", model, "-m", "int8")` runs a command and hands back what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from commands import Cli, Outcome
from fewbits.cli.main import run
from tiny_models import random_model, write_source


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs a command in `tmp_path`. A traceback is an exception here, so it fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        capfd.readouterr()
        try:
            run()
            status = 0
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            status = stop.code or 0
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny checkpoint, `model`, in the folder that commands run in."""
    write_source(tmp_path / "model", random_model())
    return Path("model")
