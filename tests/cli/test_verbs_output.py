"""What the verbs print when all goes well: figures before prose, plain lines on a pipe, one JSON object on demand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from commands import Cli, Outcome
from tiny_llama import TEXT, small_llama


def steady(text: str) -> str:
    """Text without what differs from run to run: times, memory and folders."""
    text = re.sub(r"/\S*/out", "out", text)
    text = re.sub(r"in [0-9.]+ s, peak memory [0-9.]+ [MG]B", "in … s, peak memory …", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def quantized(cli: Cli) -> Outcome:
    outcome = cli("quantize", "model", "out", "-m", "int8", "--quiet")
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
    return outcome


def test_quantize_ends_with_what_was_lost(cli: Cli, model: Path) -> None:
    outcome = cli("quantize", model, "out", "-m", "int4", "-g", "32")
    assert outcome.status == 0
    assert steady(outcome.out) == snapshot("""\
layers     method           count  bits  weight error   worst   before    after
down_proj  INT4-Asymmetric      2  4.65        0.0788  0.0792  24.6 KB  7.14 KB
up_proj    INT4-Asymmetric      2  4.65        0.0775  0.0784  18.4 KB  5.36 KB
q_proj     INT4-Asymmetric      2  4.66        0.0796  0.0799  16.4 KB  4.77 KB
worst layer: model.layers.0.self_attn.q_proj, relative error 0.0799 of its weights
out: 73.4 KB → 33.2 KB (2.21× smaller, 4.65 bits per quantized weight) in … s, peak memory …\
""")


def test_quantize_says_in_json_what_it_did(cli: Cli, model: Path) -> None:
    found = json.loads(cli("quantize", model, "out", "-m", "int8", "--json").out)
    assert sorted(found) == snapshot(
        [
            "calibration",
            "config",
            "elapsed_s",
            "fewbits",
            "folds",
            "format",
            "layers",
            "notes",
            "out",
            "peak_memory_bytes",
            "resumed_shards",
            "stages_s",
            "tensors",
            "totals",
            "version",
        ]
    )
    errors = {layer["name"]: layer["relative_error"] for layer in found["layers"]}
    recorded = json.loads(Path("out/fewbits.json").read_text())["layers"]
    assert errors == {layer["name"]: layer["relative_error"] for layer in recorded}


def test_verify_says_what_it_checked(cli: Cli, model: Path) -> None:
    quantized(cli)
    outcome = cli("verify", "out", "--against", model)
    assert outcome.status == 0
    assert steady(outcome.out) == snapshot(
        "whole out: 18 tensors, 6 quantized layers, 43.3 KB, errors equal to those recorded against model"
    )


def test_verify_names_a_tensor_that_changed(cli: Cli, model: Path) -> None:
    quantized(cli)
    file = max(Path("out").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x10
    file.write_bytes(content)
    outcome = cli("verify", "out")
    assert outcome.status == 1
    assert "VerificationError" in outcome.err and ".weight" in outcome.err


def test_inspect_shows_what_is_inside(cli: Cli, model: Path) -> None:
    quantized(cli)
    outcome = cli("inspect", "out")
    assert outcome.status == 0
    assert steady(outcome.out) == snapshot("""\
layers                               count    shape  numbers                            bits    bytes             scales
lm_head.weight                           1  48 × 64  BF16                                 16  6.14 KB
model.embed_tokens.weight                1  48 × 64  BF16                                 16  6.14 KB
model.layers.*.input_layernorm.weig      2       64  BF16                                 16    256 B
ht
model.layers.*.mlp.down_proj             2  64 × 96  int8 per channel, dynamic          8.17  12.5 KB   0.0007 to 0.0015
                                                     activations
model.layers.*.mlp.up_proj               2  72 × 64  int8 per channel, dynamic          8.25   9.5 KB  0.00072 to 0.0015
                                                     activations
model.layers.*.self_attn.q_proj          2  64 × 64  int8 per channel, dynamic          8.25  8.45 KB  0.00069 to 0.0017
                                                     activations
model.layers.*.self_attn.q_proj.bia      2       64  BF16                                 16    256 B
s
out: llama, compressed-tensors, int-quantized, 36,096 parameters in 45,152 bytes (9.60 bits each), 18 tensors in 3 files\
""")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama") / "model")


def test_evaluate_says_what_was_lost(cli: Cli, llama: Path) -> None:
    Path("text.txt").write_text(TEXT)
    assert cli("quantize", llama, "out", "-m", "int4", "-g", "32", "--quiet").status == 0
    options = ("--text", "text.txt", "--windows", "2", "--length", "32")
    outcome = cli("evaluate", llama, "out", *options)
    found = json.loads(cli("evaluate", llama, "out", *options, "--json").out)
    first, second, third = outcome.out.splitlines()
    assert first.startswith(f"KL divergence  {found['kl']:.4f} ± {found['kl_error']:.4f} nats per token")
    assert f"{found['perplexity_reference']:.3f} → {found['perplexity']:.3f}" in second
    assert third.endswith("of 62 positions")


def test_the_demo_measures_every_method_on_another_model(
    cli: Cli, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.demo.python_documentation", lambda: (TEXT, " ".join([TEXT] * 8)))
    monkeypatch.setattr("fewbits.demo.GROUP_SIZE", 32)
    monkeypatch.setattr("fewbits.demo.WINDOWS", 1)
    monkeypatch.setattr("fewbits.demo.LENGTH", 32)
    rows = json.loads(cli("demo", "--model", llama, "--json").out)
    assert rows[0]["method"] == "original (bf16)" and rows[0]["bits"] == 16
    assert all(row["size_bytes"] < rows[0]["size_bytes"] and row["evaluation"]["kl"] > 0 for row in rows[1:])
