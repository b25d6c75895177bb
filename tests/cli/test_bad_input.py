"""What bad input gets: one message that says what was found and the way out, status 2, and nothing under OUT."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from commands import Cli
from fewbits import Int8Symmetric
from handmade import entry, file_bytes, make_folder
from tiny_models import random_model, write_quantized, write_source

UP = "model.layers.1.mlp.up_proj.weight"


def only_pickles(path: Path) -> None:
    make_folder(path, {"pytorch_model.bin": b"never opened"})


def truncated(path: Path) -> None:
    write_source(path, random_model())
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def huge_header(path: Path) -> None:
    make_folder(path, {"model.safetensors": (10**12).to_bytes(8, "little") + b"{}"})


def overlapping(path: Path) -> None:
    header = {"a.weight": entry("BF16", [4, 4], 0, 32), "b.weight": entry("BF16", [4, 4], 16, 48)}
    make_folder(path, {"model.safetensors": file_bytes(header, bytes(48))})


def index_of_missing_file(path: Path) -> None:
    write_source(path, random_model())
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    weight_map = {UP: "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_of_missing_tensor(path: Path) -> None:
    write_source(path, random_model())
    (path / "model.safetensors").rename(path / "weights.safetensors")
    weight_map = dict.fromkeys([*random_model(), "model.layers.7.mlp.up_proj.weight"], "weights.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def ints(path: Path) -> None:
    write_source(path, random_model() | {UP: torch.ones(72, 64, dtype=torch.int32)})


def nan(path: Path) -> None:
    tensors = random_model()
    tensors[UP][3, 5] = torch.nan
    write_source(path, tensors)


def quantized_already(path: Path) -> None:
    write_quantized(path, random_model(), {"model.layers.0.mlp.up_proj": Int8Symmetric()})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, snapshot("""\
CheckpointError: source does not exist.
hint: give the folder of a Hugging Face checkpoint
""")),
        (Path.mkdir, snapshot("""\
CheckpointError: source is empty; expected model.safetensors, or model.safetensors.index.json and the files it names.
hint: fetch the checkpoint into it
""")),
        (only_pickles, snapshot("""\
CheckpointError: source holds pickled weights only (pytorch_model.bin); expected model.safetensors, or model.safetensors.index.json and the files it names.
hint: pickled weights can run code when opened, so fewbits never does: load them where you trust them and save with safetensors
""")),
        (truncated, snapshot("""\
CheckpointError: source/model.safetensors is truncated: expected 73,392 bytes (tensor model.layers.1.self_attn.q_proj.weight ends there), found 73,292.
hint: the file is damaged or was not downloaded completely: fetch it again
""")),
        (huge_header, snapshot("""\
CheckpointError: source/model.safetensors: the header claims 1,000,000,000,000 bytes; at most 100,000,000 are allowed.
hint: this is no safetensors file, or the file is damaged or was not downloaded completely: fetch it again
""")),
        (overlapping, snapshot("""\
CheckpointError: source/model.safetensors: tensor b.weight begins at byte 171, which overlaps tensor a.weight; expected 187.
hint: the file is damaged or was not downloaded completely: fetch it again
""")),
        (index_of_missing_file, snapshot("""\
CheckpointError: source/model.safetensors.index.json names model-00002-of-00002.safetensors, which is missing; 1 tensors should be in it, model.layers.1.mlp.up_proj.weight first.
hint: fetch the missing file
""")),
        (index_of_missing_tensor, snapshot("""\
CheckpointError: source/model.safetensors.index.json says that weights.safetensors holds model.layers.7.mlp.up_proj.weight, which it does not.
hint: the index does not belong to these files: fetch the checkpoint again
""")),
        (ints, snapshot("""\
CheckpointError: source/model.safetensors: tensor model.layers.1.mlp.up_proj.weight [72, 64] has the dtype I32; a weight is expected to be BF16, F16, F32.
hint: convert it to BF16, F16 or F32
""")),
        (nan, snapshot("""\
QuantizationError: source/model.safetensors: tensor model.layers.1.mlp.up_proj.weight holds NaN or infinite values.
hint: repair the checkpoint, or carry such tensors over unquantized with --allow-nonfinite
""")),
        (quantized_already, snapshot("""\
CheckpointError: source is quantized already: config.json has quantization_config (compressed-tensors).
hint: fewbits starts from bf16, fp16 or fp32 weights: fetch the original checkpoint
""")),
    ],
    ids=[
        "missing", "empty", "pickles", "truncated", "huge header", "overlap", "index: file", "index: tensor", "ints",
        "nan", "quantized",
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_used_is_refused(
    make: Callable[[Path], None], expected: str, cli: Cli, tmp_path: Path
) -> None:
    make(tmp_path / "source")
    outcome = cli("quantize", "source", "out", "--method", "int8")
    assert outcome.err == expected
    assert outcome.status == 2
    assert outcome.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "--method gptk",
            snapshot("""\
ConfigError: --method: unknown method 'gptk'
hint: did you mean 'gptq'?
"""),
        ),
        (
            "--method int8 --group-size 32",
            snapshot("""\
ConfigError: --group-size is no option of int8; it belongs to int4, awq, gptq.
hint: int8 takes --weight-only
"""),
        ),
        (
            "--method int4 --group-size 0",
            snapshot("""\
QuantizationError: INT4 group_size must be > 0, got 0
hint: use 32, 64, 128, 256 or "channel"
"""),
        ),
        (
            "--method int4 --group-size many",
            snapshot("ConfigError: --group-size: expected a whole number or 'channel', got 'many'.\n"),
        ),
        (
            "--method int4 --group-size 128",
            snapshot("""\
PlanError: model.layers.0.mlp.down_proj and 1 more have in_features 96, which group size 128 does not divide.
model.layers.0.mlp.up_proj and 3 more have in_features 64, which group size 128 does not divide.
hint: group sizes that fit: 32, "channel"; or give these layers their own method in a recipe (--config)
"""),
        ),
        ("--method gptq --bits 9", snapshot("QuantizationError: GPTQ bits must be in [1, 8], got 9\n")),
        (
            "--method gptq --bits 3 --group-size 32",
            snapshot("""\
PlanError: model.layers.0.mlp.down_proj: GPTQ(3bit, group=32) cannot be stored: compressed-tensors stores ints of 2, 4 or 8 bits; readers disagree on the layout of 3.
hint: --format gptq stores it
"""),
        ),
        (
            "--method smoothquant --alpha 2",
            snapshot("QuantizationError: SmoothQuant alpha must be in [0.0, 1.0], got 2.0\n"),
        ),
        (
            "--method smoothquant --alpha nan",
            snapshot("QuantizationError: SmoothQuant alpha must be in [0.0, 1.0], got nan\n"),
        ),
        (
            "",
            snapshot("""\
ConfigError: no method given.
hint: choose one: --method int8 | int4 | fp8 | awq | smoothquant | gptq, or give a recipe with --config
"""),
        ),
        (
            "--config recipe.toml --method int8",
            snapshot("""\
ConfigError: --config and --method both choose methods.
hint: put everything into the recipe
"""),
        ),
        (
            "--config recipe.toml --bits 4",
            snapshot("""\
ConfigError: --config and --bits both choose methods.
hint: put everything into the recipe
"""),
        ),
        (
            "--config recipe.toml",
            snapshot("""\
PlanError: model: '*.dwn_proj' in per_layer matches no linear layer.
hint: did you mean '*.down_proj'?
"""),
        ),
        (
            "--config broken.toml",
            snapshot("ConfigError: broken.toml: not valid TOML: Invalid value (at line 1, column 10)\n"),
        ),
        (
            "--config unknown.toml",
            snapshot("""\
ConfigError: unknown.toml: unknown key 'metod'
hint: did you mean 'method'?
"""),
        ),
        ("--config missing.toml", snapshot("ConfigError: missing.toml: cannot be read: No such file or directory\n")),
    ],
)
@pytest.mark.parametrize("command", ["quantize model out", "plan model"])
def test_a_configuration_that_cannot_be_done_is_refused(
    command: str, options: str, expected: str, cli: Cli, model: Path, tmp_path: Path
) -> None:
    Path("recipe.toml").write_text('method = "int8"\n[per_layer]\n"*.dwn_proj" = "skip"\n')
    Path("broken.toml").write_text("method = int8\n")
    Path("unknown.toml").write_text('metod = "int8"\n')
    outcome = cli(*command.split(), *options.split())
    assert outcome.err == expected
    assert outcome.status == 2
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("options", ["--method awq", "--method smoothquant", "--method gptq"])
def test_methods_that_look_at_activations_say_that_they_need_calibration(
    options: str, cli: Cli, model: Path, tmp_path: Path
) -> None:
    size = [] if "smooth" in options else ["--group-size", "32"]
    assert cli("plan", model, *options.split(), *size).status == 0
    outcome = cli("quantize", model, "out", *options.split(), *size)
    assert outcome.status == 2
    assert outcome.err.startswith("CalibrationError: ")
    assert "--calibration FILE" in outcome.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("command", "expected"), [("quantize model out --metod int8", "--method"), ("qauntize model out", "quantize")]
)
def test_a_misspelt_option_or_command_is_answered_with_the_near_one(
    command: str, expected: str, cli: Cli, model: Path
) -> None:
    outcome = cli(*command.split())
    assert outcome.status == 2
    assert expected in outcome.err
    assert "Traceback" not in outcome.err


def test_a_weight_that_is_not_finite_is_carried_over_when_allowed(cli: Cli, tmp_path: Path) -> None:
    nan(tmp_path / "source")
    refused = cli("quantize", "source", "out", "-m", "int8")
    assert UP in refused.err
    allowed = cli("quantize", "source", "out", "-m", "int8", "--allow-nonfinite")
    assert allowed.status == 0
    assert "model.layers.1.mlp.up_proj: carried over unquantized (holds NaN or infinite weights)" in allowed.out
    assert cli("verify", "out", "--against", "source").status == 0


def test_an_output_folder_that_exists_is_kept_unless_told_otherwise(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert cli("quantize", model, "out", "-m", "fp8").status == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused = cli("quantize", model, "out", "-m", "int8")
    assert refused.err == snapshot("""\
PlanError: out exists already.
hint: choose another folder, or replace it with --overwrite
""")
    assert refused.status == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert cli("quantize", model, "out", "-m", "int8", "--overwrite").status == 0
    assert cli("verify", "out").status == 0
    assert "int-quantized" in (tmp_path / "out" / "config.json").read_text()


def test_a_folder_that_holds_no_checkpoint_is_never_overwritten(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused = cli("quantize", model, "out", "-m", "int8", "--overwrite")
    assert refused.err == snapshot("""\
PlanError: out exists and holds no checkpoint (no config.json); it is not overwritten.
hint: choose another folder, or delete it yourself
""")
    assert refused.status == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("out", "status", "expected"),
    [
        (
            "model/out",
            2,
            snapshot("""\
PlanError: model/out lies inside the source model.
hint: choose an output folder outside it
"""),
        ),
        (
            "model",
            2,
            snapshot("""\
PlanError: model is the source itself.
hint: choose another output folder
"""),
        ),
        (
            "file/out",
            1,
            snapshot("""\
OutputError: …/file/out.partial cannot be written: Not a directory.
hint: check the disk that it is on
"""),
        ),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    out: str, status: int, expected: str, cli: Cli, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    outcome = cli("quantize", model, out, "-m", "int8")
    assert outcome.err.replace(str(tmp_path), "…") == expected
    assert outcome.status == status
    assert sorted(tmp_path.rglob("*")) == before
