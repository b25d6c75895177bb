"""`fewbits plan`: exact to the byte, quick for any size, and nothing read but headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from commands import Cli
from handmade import entry, file_bytes
from tiny_models import random_model, write_source

MIXED = """\
method = { name = "gptq", bits = 4, group_size = 32 }
[per_layer]
"*" = "fp8"
"lm_head" = "int8"
"model.layers.1.*" = { name = "int4", group_size = 32 }
"re:.*\\\\.q_proj" = { name = "int8", activations = "none" }
"model.layers.0.mlp.down_proj" = "skip"
"""


@pytest.mark.parametrize(
    "options",
    ["-m int8", "-m fp8", "-m fp8 --weight-only", "-m int4 -g 32", "-m int4 -g channel", "-c mixed.toml"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_bytes_planned_are_the_bytes_written(
    options: str, dtype: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "model", {name: t.to(getattr(torch, dtype)) for name, t in random_model().items()})
    Path("mixed.toml").write_text(MIXED)
    planned = json.loads(cli("plan", "model", *options.split(), "--json").out)
    outcome = cli("quantize", "model", "out", *options.split(), "--quiet")
    assert (outcome.status, outcome.out) == (0, "")
    written = sum(file.stat().st_size for file in Path("out").glob("*.safetensors"))
    assert planned["bytes_after"] == written
    assert planned["bytes_before"] == Path("model/model.safetensors").stat().st_size


def test_the_table_says_what_becomes_of_each_kind_of_layer(cli: Cli, model: Path) -> None:
    outcome = cli("plan", model, "-m", "int8")
    assert "\n".join(line.rstrip() for line in outcome.out.splitlines()) == snapshot("""\
layer      count  out × in  bits   before    after  method
lm_head        1   48 × 64    16  6.14 KB  6.14 KB  output head
down_proj      2   64 × 96  8.17  24.6 KB  12.5 KB  INT8-Symmetric int8 per channel, dynamic activations
up_proj        2   72 × 64  8.25  18.4 KB   9.5 KB  INT8-Symmetric int8 per channel, dynamic activations
q_proj         2   64 × 64  8.25  16.4 KB  8.45 KB  INT8-Symmetric int8 per channel, dynamic activations
engine        loads  why not, or why slowly
vLLM (GPU)    fast
vLLM (CPU)    fast
SGLang (GPU)  fast
transformers  loads  decodes weights to the model's dtype (model.layers.0.mlp.down_proj and 5 more)
llama.cpp     no     reads GGUF, not compressed-tensors
73,392 → 45,152 bytes (73.4 KB → 45.2 KB, 1.63× smaller) · 8.216 bits per quantized weight · peak memory 369 MB\
""")


def test_peak_memory_of_calibration_is_said_with_its_tokens(cli: Cli, model: Path) -> None:
    out = cli("plan", model, "-m", "gptq", "-g", "32", "--samples", "8", "--length", "512").out
    assert " ".join(out.split()).endswith("peak memory about 882 MB for 8 × 512 tokens")


def test_every_layer_has_a_row_on_demand(cli: Cli, model: Path) -> None:
    out = cli("plan", model, "-m", "int8", "--all").out
    assert all(name.removesuffix(".weight") in out for name in random_model() if "_proj.weight" in name)


def test_unlike_members_of_a_fused_group_are_named(cli: Cli, tmp_path: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    tensors = {f"model.layers.0.self_attn.{name}.weight": torch.randn(128, 128).bfloat16() for name in names}
    write_source(tmp_path / "model", tensors)
    Path("recipe.toml").write_text('method = "fp8"\n[per_layer]\n"*.q_proj" = "int8"\n')
    engines = {
        row["engine"]: row for row in json.loads(cli("plan", "model", "-c", "recipe.toml", "--json").out)["engines"]
    }
    assert not engines["vLLM (GPU)"]["loads"]
    assert "fused layers of unlike schemes: model.layers.0.self_attn.q_proj" in engines["vLLM (GPU)"]["reasons"][0]
    assert engines["transformers"]["loads"]


def sparse_checkpoint(path: Path, blocks: int, width: int) -> int:
    """Real headers over files that are all hole; returns the bytes of the weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128256, "hidden_size": width}))
    shapes = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (3 * width, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, 3 * width),
    }
    weight_map, total = {}, 0
    for block in range(blocks):
        header, offset = {}, 0
        for name, (rows, columns) in shapes.items():
            size = 2 * rows * columns
            header[f"model.layers.{block}.{name}.weight"] = entry("BF16", [rows, columns], offset, offset + size)
            offset += size
        file = path / f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        content = file_bytes(header)
        file.write_bytes(content)
        os.truncate(file, len(content) + offset)
        weight_map |= dict.fromkeys(header, file.name)
        total += len(content) + offset
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def test_a_hundred_gigabytes_are_planned_in_two_seconds(tmp_path: Path) -> None:
    total = sparse_checkpoint(tmp_path / "model", blocks=60, width=8192)
    assert total > 100e9
    command = [sys.executable, "-c", "from fewbits.cli.main import run; run()", "plan", str(tmp_path / "model")]
    started_s = time.monotonic()
    done = subprocess.run([*command, "-m", "int4", "--json"], capture_output=True, text=True, check=True)
    # Twice what it takes on a busy machine; alone it takes half a second.
    assert time.monotonic() - started_s < 2
    planned = json.loads(done.stdout)
    assert planned["bytes_before"] == total
    assert len(planned["layers"]) == 60 * 7


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, fewbits.cli.main; print(sorted({'torch', 'numba', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
