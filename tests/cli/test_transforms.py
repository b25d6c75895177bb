"""`fewbits quantize` with AWQ and SmoothQuant: options, and what is said of folds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from commands import Cli
from tiny_transformers import save_tiny, token_ids


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny", "llama")
    np.save(tmp_path / "ids.npy", token_ids(8, 32).numpy())
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    "options", ["-m awq -g 16", "-m awq -g 16 --solver gptq", "-m smoothquant", "-m smoothquant --alpha auto"]
)
def test_both_methods_work_end_to_end(options: str, cli: Cli, tiny: Path) -> None:
    calibration = ["--calibration", "ids.npy", "--samples", "8", "--length", "32"]
    outcome = cli("quantize", "tiny", "out", *options.split(), *calibration, "--json", "--quiet")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert len(report["folds"]) == 2 * 4
    assert report["stages_s"]["folds_s"] > 0
    assert cli("verify", "out", "--against", "tiny").status == 0
    config = json.loads(Path("out/fewbits.json").read_text())["config"]["method"]
    assert config.get("solver", "rtn") == ("gptq" if "gptq" in options else "rtn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-m gptq --solver gptq", "--solver is no option of gptq; it belongs to awq."),
        ("-m awq --solver obq", 'AWQ solver must be "rtn" or "gptq", got \'obq\''),
        ("-m smoothquant --alpha 1.5", "SmoothQuant alpha must be in [0.0, 1.0], got 1.5"),
        ("-m smoothquant --alpha best", "--alpha: expected a number or 'auto', got 'best'."),
        ("-m awq -g 16", "AWQ(group=16) looks at activations and no calibration data was given"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(options: str, message: str, cli: Cli, tiny: Path) -> None:
    outcome = cli("quantize", "tiny", "out", *options.split())
    assert outcome.status != 0
    assert message in " ".join(outcome.err.split())
    assert not Path("out").exists()
