"""`fewbits generate`, `kernels` and `bench`: what they print, and what bad input gets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

import fewbits
from commands import Cli
from fewbits import Int4Asymmetric, Int8Symmetric, QuantConfig
from fewbits.generate import TextStream
from tiny_llms import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in int4, its first block's attention in int8."""
    path = tmp_path_factory.mktemp("cli")
    source = write_model(path / "model", "llama", torch.bfloat16)
    config = QuantConfig(Int4Asymmetric(32), {"model.layers.0.self_attn.*": Int8Symmetric()})
    fewbits.quantize(source, path / "out", config)
    return path / "out"


def test_text_goes_to_standard_output_and_speed_to_standard_error(cli: Cli, folder: Path) -> None:
    outcome = cli("generate", folder, "w3 w9 w27", "-n", 4)
    assert outcome.status == 0
    assert re.fullmatch(r"(w\d+ ?)*\n", outcome.out)
    said = re.sub(r"[\d.]+ tokens/s", "N tokens/s", outcome.err)
    assert re.fullmatch(r"prompt 3 tokens, N tokens/s; wrote \d, N tokens/s\n", said)


def test_quiet_says_nothing_but_the_text(cli: Cli, folder: Path) -> None:
    assert cli("generate", folder, "w3", "-n", 2, "-q").err == ""


def test_json_holds_text_tokens_and_speed(cli: Cli, folder: Path) -> None:
    found = json.loads(cli("generate", folder, "w3 w9", "-n", 3, "--json").out)
    assert found["prompt_tokens"] == 2
    assert 0 < len(found["tokens"]) <= 3 or found["stopped"] == "stop"
    assert found["notes"] == [] and found["prompt_tokens_per_s"] > 0


def test_interrupted_json_holds_what_was_written(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = TextStream.push
    calls = iter(range(100))

    def interrupted(stream: TextStream, token: int) -> str:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", interrupted)
    outcome = cli("generate", folder, "w3 w9", "-n", 30, "--json")
    found = json.loads(outcome.out)
    assert (outcome.status, found["stopped"], len(found["tokens"])) == (130, "interrupted", 3)
    assert len(found["text"].split()) == 2
    assert outcome.err == "Interrupted: 3 of at most 30 tokens were written.\n"


def test_the_same_seed_writes_the_same(cli: Cli, folder: Path) -> None:
    options = ("generate", folder, "w3", "-n", 8, "-t", 2, "--top-p", 0.9, "--seed", 5, "-q")
    assert cli(*options).out == cli(*options).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-t", "-1"), snapshot("QuantizationError: temperature must be a number of 0 or more, got -1.0\n")),
        (("--top-p", "0"), snapshot("QuantizationError: top_p must be above 0 and at most 1, got 0.0\n")),
        (("--device", "cdua"), snapshot("KernelError: 'cdua' is no device.\nhint: use cpu, cuda or cuda:1\n")),
        (("--dtype", "half"), snapshot("ConfigError: --dtype: expected bfloat16, float16, float32, got 'half'.\n")),
        (
            ("-n", "1000"),
            snapshot("""\
QuantizationError: 1 tokens of prompt and 1000 to write are more than the model's 128.
hint: shorten the prompt, or ask for fewer tokens
"""),
        ),
    ],
)
def test_bad_options_get_one_message(options: tuple[str, ...], message: str, cli: Cli, folder: Path) -> None:
    outcome = cli("generate", folder, "w3", *options)
    assert (outcome.status, outcome.out, outcome.err) == (2, "", message)


def test_a_folder_without_a_tokenizer_is_refused(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for file in folder.iterdir():
        if "token" not in file.name:
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    outcome = cli("generate", "bare", "w3")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("CheckpointError: bare: its tokenizer cannot be loaded")


def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(cli: Cli) -> None:
    outcome = cli("generate", "nobody/nothing", "w3")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [
        "CheckpointError: nobody/nothing does not exist.",
        "hint: give the folder of a Hugging Face checkpoint; a model of the hub is downloaded first: "
        "hf download nobody/nothing --local-dir FOLDER",
    ]


@pytest.mark.parametrize("command", [("generate", "broken", "w3"), ("bench", "broken")])
def test_a_config_that_contradicts_itself_is_refused_with_its_reason(
    command: tuple[str, ...], cli: Cli, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    outcome = cli(*command)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("CheckpointError: broken: ")
    assert "not a multiple of the number of attention heads (7)" in outcome.err


def test_kernels_of_a_checkpoint_have_a_row_for_each_kind_of_layer(cli: Cli, folder: Path) -> None:
    outcome = cli("kernels", folder, "--json")
    found = json.loads(outcome.out)
    rows = {(kind["name"], kind["scheme"]): (kind["count"], kind["shape"]) for kind in found["kinds"]}
    assert rows["down_proj", "int4 asymmetric group 32"] == (2, [64, 128])
    assert rows["q_proj", "int8 per channel, dynamic activations"] == (1, [64, 64])
    assert rows["q_proj", "int4 asymmetric group 32"] == (1, [64, 64])
    assert all([choice["tokens"] for choice in kind["choices"]] == [1, 16, 512] for kind in found["kinds"])
    assert all(choice["kernel"] for kind in found["kinds"] for choice in kind["choices"])


def test_kernels_without_a_checkpoint_show_the_six_methods(cli: Cli) -> None:
    lines = cli("kernels").out.splitlines()
    assert lines[0].split() == [
        "layers", "count", "out", "×", "in", "numbers", "1", "token", "16", "tokens", "512", "tokens",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:] if "4096 × 4096" in line] == [
        "int8", "int4", "fp8", "awq", "smoothquant", "gptq",
    ]  # fmt: skip
    assert lines[-1].startswith("cpu, bfloat16: ")


def test_kernels_of_an_unquantized_checkpoint_are_torchs(cli: Cli, folder: Path) -> None:
    outcome = cli("kernels", folder.parent / "model")
    assert outcome.status == 2
    assert outcome.err.endswith("is not quantized; its linears run on torch's own product.\n")


def test_bench_reports_rates_shares_and_the_limit(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.speed.PROBE_BYTES", 2**20)
    options = ("bench", folder, "--prompt", 8, "--tokens", 3, "--runs", 1)
    found = json.loads(cli(*options, "--json").out)
    assert found["rates"]["decode"] > 0 and found["bf16"]["prompt"] > 0
    # The head is not tied: a token reads everything but the table of embeddings.
    assert found["weight_bytes"] - found["token_bytes"] == 64 * 64 * 2
    assert found["limit"] == pytest.approx(found["bandwidth"] / found["token_bytes"])
    assert set(found["decode_shares"]) > {"everything else"}
    text = cli(*options, "--quiet").out
    assert "times bf16" in text and "share of the limit" in text and "everything else" in text
