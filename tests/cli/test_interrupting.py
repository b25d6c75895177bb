"""Runs that end early, in processes of their own: signals, limits, and going on afterwards."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fewbits
from tiny_llms import write_model
from tiny_models import write_source

BLOCKS = 300
COMMAND = [sys.executable, "-c", "from fewbits.cli.main import run; run()"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many blocks, so that there is time to stop in the middle."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{block}.mlp.{name}.weight": torch.randn(*shape, generator=generator).bfloat16()
        for block in range(BLOCKS)
        for name, shape in (("up_proj", (512, 256)), ("down_proj", (256, 512)))
    }
    return write_source(tmp_path_factory.mktemp("many") / "model", tensors)


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    return heeding_interrupts("quantize", str(source), str(out), "-m", "int4", "-g", "32", "--quiet")


def heeding_interrupts(*arguments: str, **pipes: int) -> subprocess.Popen[str]:
    # What a shell starts in the background ignores interrupts, and so would what it starts.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=heeding, **pipes)


def wait_for_shards(out: Path, count: int) -> None:
    partial = out.with_name(f"{out.name}.partial")
    deadline_s = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < count:
        assert time.monotonic() < deadline_s and not out.exists()
        time.sleep(0.001)


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_interrupted_or_killed_a_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert start(source, straight).wait() == 0

    interrupted = start(source, broken)
    wait_for_shards(broken, 2)
    interrupted.send_signal(signal.SIGINT)
    message = interrupted.communicate()[1]
    assert interrupted.returncode == 130
    assert message.splitlines() == [
        f"Interrupted: {broken}: not finished, so nothing stands under that name.",
        "hint: the same command goes on where it stopped",
    ]
    assert not broken.exists()

    finished = len(list(broken.with_name("broken.partial").glob("*.safetensors")))
    killed = start(source, broken)
    wait_for_shards(broken, finished + 2)
    killed.kill()
    killed.communicate()
    assert not broken.exists()

    assert start(source, broken).wait() == 0
    assert digests(broken) == digests(straight)
    assert not broken.with_name("broken.partial").exists()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in int4 that writes as long as one lets it."""
    path = tmp_path_factory.mktemp("endless")
    source = write_model(path / "model", "llama", torch.bfloat16)
    fewbits.quantize(source, path / "out", fewbits.QuantConfig(fewbits.Int4Asymmetric(32)))
    for name in ("config.json", "generation_config.json"):
        file = path / "out" / name
        changed = json.loads(file.read_text()) | {"eos_token_id": None}
        if name == "config.json":
            changed["max_position_embeddings"] = 10**6
        file.write_text(json.dumps(changed))
    return path / "out"


def test_interrupted_writing_keeps_the_text_so_far(endless: Path) -> None:
    writing = heeding_interrupts("generate", str(endless), "w3 w9", "-n", "100000", stdout=subprocess.PIPE)
    assert writing.stdout is not None
    # Past the pipe's own buffer, which `communicate` would not see.
    begun = os.read(writing.stdout.fileno(), 20).decode()
    writing.send_signal(signal.SIGINT)
    rest, message = writing.communicate(timeout=60)
    assert writing.returncode == 130, message
    assert re.fullmatch(r"(w\d+ ?)+\n", begun + rest)
    assert re.search(r"wrote \d+, [\d.]+ tokens/s\nInterrupted: \d+ of at most 100000 tokens were written.\n$", message)
    assert "Traceback" not in message


def test_a_full_disk_is_a_failure_with_a_way_out(source: Path, tmp_path: Path) -> None:
    limit = 50_000
    arguments = [*COMMAND, "quantize", str(source), "-m", "int8", "--quiet"]
    # Kernels are compiled and kept here, where there is room.
    subprocess.run([*arguments, str(tmp_path / "before")], check=True)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    done = subprocess.run([*arguments, str(out)], capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("OutputError: ")
    assert "hint: raise the limit (ulimit -f)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_disk_with_too_little_room_is_found_before_the_work(source: Path, small_disk: Path) -> None:
    arguments = [*COMMAND, "quantize", str(source), str(small_disk / "out"), "-m", "int8", "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("OutputError: ")
    assert list(small_disk.iterdir()) == []
