"""`fewbits quantize` with calibration data: what it says, what bad input gets, and that the bytes never differ."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Cli
from tiny_transformers import VOCABULARY, save_tiny, token_ids

SAMPLES, LENGTH = 12, 16
GPTQ = ["-m", "gptq", "-g", "16", "--samples", str(SAMPLES), "--length", str(LENGTH)]
COMMAND = [sys.executable, "-c", "from fewbits.cli.main import run; run()"]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama, `source`, beside `ids.npy`, in the folder that commands run in."""
    save_tiny(tmp_path / "source", "llama")
    np.save(tmp_path / "ids.npy", token_ids(SAMPLES, LENGTH).numpy())
    return Path("source")


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a checkpoint of one file."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def nothing_made(folder: Path) -> bool:
    return not (folder / "out").exists() and not list(folder.rglob("*.unfinished"))


def test_the_summary_and_the_report_say_what_was_calibrated_with(cli: Cli, source: Path, tmp_path: Path) -> None:
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy")
    assert outcome.status == 0, outcome.err
    assert "calibrated with 192 tokens of ids.npy (12 samples of 16), forward in " in outcome.out
    for stage in ("importance", "forward", "statistics", "solving", "peak memory", "output error", "worst layer"):
        assert stage in outcome.out
    facts = json.loads((tmp_path / "out" / "fewbits.json").read_text())["calibration"]
    assert (facts["tokens"], facts["samples"], facts["length"]) == (192, 12, 16)
    assert cli("verify", "out", "--against", "source").status == 0
    assert not list(tmp_path.glob("out.partial")) and not (tmp_path / "out" / ".fewbits").exists()


def test_a_statistic_of_too_few_tokens_is_noted(cli: Cli, source: Path) -> None:
    # 192 tokens are enough for inputs 32 wide, not for those 64 wide.
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy")
    [note] = [line for line in outcome.out.splitlines() if "solved on" in line]
    assert note == (
        "note model.layers.0.mlp.down_proj and 1 more: solved on 192 tokens for 64 inputs (fewer than 4 times its "
        "width: give more text)"
    )


def test_samples_that_a_file_does_not_hold_are_noted(cli: Cli, source: Path) -> None:
    options = ["-m", "gptq", "-g", "16", "--samples", "20", "--length", str(LENGTH), "--calibration", "ids.npy"]
    outcome = cli("quantize", source, "out", *options)
    assert outcome.status == 0
    assert "ids.npy: calibrated with 12 samples in place of 20" in outcome.out
    strict = cli("quantize", source, "out2", *options, "--strict")
    assert strict.status == 2 and "strict: ids.npy: calibrated with 12 samples" in strict.err


def test_states_past_the_memory_limit_wait_in_a_file_and_that_is_noted(cli: Cli, source: Path, tmp_path: Path) -> None:
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy", "--memory", "1kB")
    assert outcome.status == 0, outcome.err
    assert "calibration: blocks run some three times, their states wait in a file" in outcome.out
    assert cli("verify", "out").status == 0
    roomy = cli("quantize", source, "roomy", *GPTQ, "--calibration", "ids.npy", "--memory", "1GiB")
    assert "three times" not in roomy.out
    assert nothing_made(tmp_path / "out")


@pytest.mark.parametrize(("text", "status"), [("many", 2), ("-3", 2), ("1iB", 2), ("1.5MiB", 0)])
def test_a_memory_limit_is_a_size(text: str, status: int, cli: Cli, source: Path) -> None:
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy", f"--memory={text}")
    assert outcome.status == status
    assert status == 0 or outcome.err.startswith("ConfigError: --memory: expected a size such as 2GiB")


def test_a_model_writes_its_own_text_when_told_to(cli: Cli, source: Path, tmp_path: Path) -> None:
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "self")
    assert outcome.status == 0, outcome.err
    assert "calibrated with 192 tokens of self" in outcome.out
    assert "note self: calibrated with text that the model wrote itself" in outcome.out
    assert cli("quantize", source, "again", *GPTQ, "--calibration", "self").status == 0
    other = cli("quantize", source, "other", *GPTQ, "--calibration", "self", "--seed", "1")
    assert other.status == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "again") != digests(tmp_path / "other")


def test_a_conv1d_is_refused_with_the_way_out(cli: Cli, tmp_path: Path, source: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2")
    outcome = cli("quantize", "gpt2", "out", *GPTQ, "--calibration", "ids.npy")
    assert outcome.status == 2
    assert "is a Conv1D (its weight is stored [in, out]), which no reader of this format accepts." in outcome.err
    assert '"skip" under per_layer' in outcome.err


# What is written to the calibration file, its name, and what is said.
FILES: list[tuple[str, bytes | None, str]] = [
    ("missing.txt", None, "The calibration file missing.txt does not exist."),
    ("empty.txt", b"", "The calibration file empty.txt is empty."),
    ("binary.txt", b"\xff\xfe\x80", "binary.txt is no text: byte 0 is not UTF-8."),
    ("zeros.txt", b"a\0b", "zeros.txt is no text: it holds zero bytes."),
    ("field.jsonl", b'{"content": "x"}\n', 'field.jsonl, line 1 has no "text", "messages" or "input_ids"'),
    ("torn.jsonl", b'{"text": \n', "torn.jsonl, line 1 is not JSON"),
    ("short.jsonl", b"[1, 2, 3]\n", "short.jsonl holds 3 tokens; one sample takes 16."),
    ("beyond.jsonl", json.dumps([5] * 15 + [VOCABULARY]).encode(), "token 15 is 96; the vocabulary has 96 tokens"),
    ("negative.jsonl", json.dumps([-1] * 16).encode(), "token 0 is -1"),
    ("floats.npy", b"", ""),
    ("pickle.npy", b"", ""),
    ("no.parquet", b"PAR1", "no.parquet is no Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=[name for name, _, _ in FILES])
def test_calibration_files_that_cannot_be_used_are_refused(
    name: str, content: bytes | None, expected: str, cli: Cli, source: Path, tmp_path: Path
) -> None:
    if name == "floats.npy":
        np.save(tmp_path / name, np.ones(64))
        expected = "floats.npy holds float64; token ids are whole numbers."
    elif name == "pickle.npy":
        np.save(tmp_path / name, np.array([{}]), allow_pickle=True)
        expected = "pickle.npy is no NumPy array of numbers"
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", name)
    assert outcome.err.startswith("CalibrationError: ") and expected in outcome.err
    assert outcome.status == 2
    assert not list(tmp_path.glob("out*"))


def test_text_without_a_tokenizer_says_so(cli: Cli, source: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("Some text. " * 100)
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "some.txt")
    assert outcome.status == 2
    assert outcome.err.startswith("CheckpointError: source: its tokenizer cannot be loaded: ")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("package", ["transformers", "greenlet"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    package: str, cli: Cli, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy")
    assert outcome.status == 2
    assert outcome.err.startswith("MissingDependencyError: ") and package in outcome.err
    assert outcome.err.endswith("hint: pip install 'fewbits[transformers]'\n")
    assert not list(tmp_path.glob("out*"))


def test_a_device_that_is_not_there_is_refused(cli: Cli, source: Path, tmp_path: Path) -> None:
    for device in ("cuda", "mps", "gpu0"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy", "--device", device)
        assert outcome.status == 2 and outcome.err.startswith("KernelError: ")
    assert not list(tmp_path.glob("out*"))


def unknown_class(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"model_type": "llamo", "architectures": ["LlamoForCausalLM"]})
    )


def missing_weight(path: Path) -> None:
    change(path, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))


def missing_norm(path: Path) -> None:
    change(path, lambda tensors: tensors.pop("model.norm.weight"))


def other_shape(path: Path) -> None:
    change(path, lambda tensors: tensors.update({DOWN: torch.zeros(48, 64).bfloat16()}))


def exploding(path: Path) -> None:
    """Finite weights whose product is not."""
    change(path, lambda tensors: tensors[DOWN].fill_(3e38))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (unknown_class, "CalibrationError: source: transformers cannot build this model: "),
        (missing_weight, "CheckpointError: The checkpoint has no weights for model.layers.1.self_attn.o_proj.weight.\n"),
        (missing_norm, "CheckpointError: The checkpoint has no weights for model.norm.weight.\n"),
        (other_shape, f"CheckpointError: {DOWN} has shape [48, 64] in the files; the model's config says [32, 64]."),
        (exploding, "CalibrationError: model.layers.1 returned NaN or infinite hidden states; the last good block is "
                    "model.layers.0.\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("importance", ["loss", "none"])
def test_models_that_cannot_be_run_are_refused(
    edit: Callable[[Path], None], expected: str, importance: str, cli: Cli, source: Path, tmp_path: Path
) -> None:
    edit(tmp_path / "source")
    outcome = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy", "--importance", importance)
    assert outcome.status == 2
    assert f"\n{outcome.err}".rpartition("\nC")[2].startswith(expected[1:])  # what comes before are notes
    assert "Traceback" not in outcome.err
    assert nothing_made(tmp_path)


def test_a_weight_that_is_not_finite_is_named_and_carried_over_when_allowed(
    cli: Cli, source: Path, tmp_path: Path
) -> None:
    change(tmp_path / "source", lambda tensors: tensors[DOWN][0].fill_(torch.inf))
    refused = cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy", "--importance", "none")
    assert refused.status == 2
    assert DOWN in refused.err or "model.layers.1 returned NaN or infinite" in refused.err
    assert nothing_made(tmp_path)


def test_a_run_cannot_go_on_with_other_text_seed_importance_or_config(
    cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.calibrated import CalibratedConversion

    real = CalibratedConversion._finish

    def fail(self: CalibratedConversion, *arguments: object, **options: object) -> None:
        if self.journal.finished:
            raise KeyboardInterrupt
        real(self, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedConversion, "_finish", fail)
        assert cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy").status == 130
    np.save(tmp_path / "other.npy", token_ids(SAMPLES, LENGTH, seed=1).numpy())
    for options, named in (
        (["--calibration", "other.npy"], "another calibration"),
        (["--calibration", "ids.npy", "--seed", "5"], "another calibration"),
        (["--calibration", "ids.npy", "--importance", "none"], "another calibration"),
        (["--calibration", "ids.npy", "--asymmetric"], "another config"),
    ):
        outcome = cli("quantize", source, "out", *GPTQ, *options)
        assert outcome.status == 2 and outcome.err.startswith("PlanError: ") and named in outcome.err
    assert cli("quantize", source, "out", *GPTQ, "--calibration", "ids.npy").status == 0
    assert cli("quantize", source, "straight", *GPTQ, "--calibration", "ids.npy").status == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def start(folder: Path, out: str, threads: int = 1, *options: str) -> subprocess.Popen[str]:
    arguments = [*COMMAND, "quantize", "source", out, *GPTQ, "--calibration", "ids.npy", "--quiet", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)


def test_killed_at_several_points_and_with_other_threads_the_bytes_are_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", num_hidden_layers=6, hidden_size=64, intermediate_size=192)
    np.save(tmp_path / "ids.npy", token_ids(SAMPLES, LENGTH).numpy())
    straight = start(tmp_path, "straight", 1)
    assert straight.wait() == 0, straight.stderr
    partial = tmp_path / "broken.partial"
    # Shards are those of the blocks; before the first, the embeddings' and a file with the importance of tokens.
    for reached in (
        lambda: (partial / ".fewbits" / "importance.safetensors").exists(),
        lambda: len(list(partial.glob("*.safetensors"))) >= 3,
        lambda: len(list(partial.glob("*.safetensors"))) >= 5,
    ):
        run = start(tmp_path, "broken", 2)
        deadline_s = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline_s
            if run.poll() is not None:
                break
            time.sleep(0.001)
        run.kill()
        run.communicate()
        assert not (tmp_path / "broken").exists()
    last = start(tmp_path, "broken", 2)
    assert last.communicate()[1] == "" and last.returncode == 0
    assert digests(tmp_path / "broken") == digests(tmp_path / "straight")
    assert not partial.exists()


def test_a_disk_that_fills_up_while_states_are_put_away_is_a_failure_with_a_way_out(
    cli: Cli, small_disk: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "source", "llama")
    np.save(tmp_path / "ids.npy", token_ids(256, 64).numpy())
    options = ["-m", "gptq", "-g", "16", "--samples", "256", "--length", "64", "--calibration", "ids.npy"]
    for more in (["--memory", "1kB", "--importance", "none"], ["--importance", "none"]):
        shutil.rmtree(small_disk / "out.partial", ignore_errors=True)
        outcome = cli("quantize", "source", small_disk / "out", *options, *more)
        assert outcome.status == 1
        assert outcome.err.startswith("OutputError: ")
        assert "free some space" in outcome.err
        assert not (small_disk / "out").exists()
