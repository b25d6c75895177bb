"""Loaded checkpoints against transformers in bf16 and against llama.cpp: a prompt of 512 tokens, and writing.

Usage: python bench/inference.py make FOLDER [--model DIR] [--llama-quantize PATH]
       python bench/inference.py run FOLDER [--runs 3] [--tokens 64] [--prompt 512] [--llama-bench PATH]

`make` writes a Llama of 1.1B parameters with random weights (or takes the checkpoint in --model), its quantized forms,
and, where llama.cpp's quantizer is given, GGUF files of the same shapes. `run` times all sides in turn and appends a
row for each: medians, and the ratios to transformers' bf16 and to llama.cpp's file of as many bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import fewbits
from fewbits import Int4Asymmetric, Int8Symmetric, QuantConfig
from fewbits.generate import Generator
from fewbits.speed import read_bandwidth

RESULTS = Path(__file__).parent / "results" / "inference.jsonl"
HEAD = {"lm_head": Int8Symmetric(activations=None)}
# What llama.cpp's quantizer makes of the head is 6 or 8 bits, so both sides have a packed head as well.
CONFIGS: dict[str, Callable[[int], QuantConfig]] = {
    "int4": lambda group: QuantConfig(Int4Asymmetric(group)),
    "int4-head8": lambda group: QuantConfig(Int4Asymmetric(group), HEAD),
    "int8": lambda group: QuantConfig(Int8Symmetric()),
    "int8-head8": lambda group: QuantConfig(Int8Symmetric(), HEAD),
}
PEERS = {"int4": "Q4_0", "int4-head8": "Q4_0", "int8": "Q8_0", "int8-head8": "Q8_0"}


def llama_config() -> LlamaConfig:
    """TinyLlama's shapes."""
    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        head_dim=64, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def write_random_llama(folder: Path) -> None:
    """A bf16 checkpoint, one file."""
    folder.mkdir(parents=True)
    config = llama_config()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(source: Path, file: Path) -> None:
    """An F16 file of the checkpoint's shapes with random weights and no vocabulary; its numbers mean nothing."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    width, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or width // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, (random.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16))

    matrix("token_embd.weight", config["vocab_size"], width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    if not config.get("tie_word_embeddings"):
        matrix("output.weight", config["vocab_size"], width)
    for index in range(blocks):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{norm}.weight", np.ones(width, np.float32))
        for name, rows, columns in (
            ("attn_q", heads * head, width), ("attn_k", kv_heads * head, width), ("attn_v", kv_heads * head, width),
            ("attn_output", width, heads * head), ("ffn_gate", inner, width), ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):  # fmt: skip
            matrix(f"blk.{index}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(args: argparse.Namespace) -> None:
    """Write what `run` needs; what is there already stays."""
    folder: Path = args.folder
    source: Path = args.model or folder / "model"
    if args.model is None and not source.exists():
        write_random_llama(source)
    folder.mkdir(parents=True, exist_ok=True)
    tied = json.loads((source / "config.json").read_text()).get("tie_word_embeddings", False)
    for name, config in CONFIGS.items():
        if not (folder / name).exists() and not (tied and name.endswith("head8")):
            fewbits.quantize(source, folder / name, config(args.group_size))
    (folder / "source.json").write_text(json.dumps({"source": str(source), "group_size": args.group_size}))
    if args.llama_quantize is not None:
        plain = folder / "F16.gguf"
        if not plain.exists():
            write_gguf(source, plain)
        for kind in ("Q4_0", "Q8_0"):
            if not (folder / f"{kind}.gguf").exists():
                subprocess.run([args.llama_quantize, plain, folder / f"{kind}.gguf", kind, "2"], check=True)


Rates = tuple[float, float]


def generator_rates(generator: Generator, prompt: int, tokens: int) -> Rates:
    """Tokens per second of the prompt and of writing."""
    ids = torch.randint(1000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    generation, stream = generator.stream(ids, tokens, stop=())
    for _ in stream:
        pass
    return generation.prompt_rate, generation.decode_rate


def llama_rates(program: Path, file: Path, prompt: int, tokens: int) -> Rates:
    """The same by llama-bench, one repetition after its own warm-up."""
    threads = str(torch.get_num_threads())
    command = [program, "-m", file, "-p", str(prompt), "-n", str(tokens), "-t", threads, "-r", "1", "-o", "json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    by_kind = {bool(row["n_gen"]): row["avg_ts"] for row in found}
    return by_kind[False], by_kind[True]


def sides_of(folder: Path, source: Path, args: argparse.Namespace) -> dict[str, Callable[[], Rates]]:
    """What is timed, by name."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    generators = {"transformers bf16": Generator(plain, short_way=False)}
    for name in CONFIGS:
        if (folder / name).exists():
            generators[f"fewbits {name}"] = Generator(fewbits.load(folder / name))
    sides: dict[str, Callable[[], Rates]] = {
        name: lambda generator=generator: generator_rates(generator, args.prompt, args.tokens)
        for name, generator in generators.items()
    }
    for file in sorted(folder.glob("Q*.gguf")) if args.llama_bench else []:
        sides[f"llama.cpp {file.stem}"] = lambda file=file: llama_rates(
            args.llama_bench, file, args.prompt, args.tokens
        )
    return sides


def run(args: argparse.Namespace) -> None:
    """Time all sides in turn."""
    made = json.loads((args.folder / "source.json").read_text())
    sides = sides_of(args.folder, Path(made["source"]), args)
    found: dict[str, list[Rates]] = {name: [] for name in sides}
    for number in range(args.runs + 1):
        for name, side in sides.items():
            rates = side()
            if number:  # The first round warms up.
                found[name].append(rates)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    bandwidth = read_bandwidth(torch.device("cpu"))
    for name, rows in found.items():
        peer = medians.get(f"llama.cpp {PEERS.get(name.removeprefix('fewbits '), '')}")
        row = {"bench": "inference", "model": args.folder.name, "what": name, "group_size": made["group_size"]}
        for index, kind in enumerate(("prompt", "decode")):
            row[f"{kind}_tokens_per_s"] = round(medians[name][index], 1)
            row[f"{kind}_range"] = [round(edge(rates[index] for rates in rows), 1) for edge in (min, max)]
            row[f"{kind}_times_bf16"] = round(medians[name][index] / medians["transformers bf16"][index], 2)
            if peer is not None:
                row[f"{kind}_of_llama_cpp"] = round(medians[name][index] / peer[index], 2)
        row |= {"prompt": args.prompt, "tokens": args.tokens, "runs": args.runs, "gb_per_s": round(bandwidth / 1e9, 1)}
        print(json.dumps(row), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--model", type=Path, help="an unquantized checkpoint in place of the random one")
    making.add_argument("--group-size", type=int, default=128)
    making.add_argument("--llama-quantize", type=Path)
    making.set_defaults(action=make)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--runs", type=int, default=3)
    running.add_argument("--prompt", type=int, default=512)
    running.add_argument("--tokens", type=int, default=64)
    running.add_argument("--llama-bench", type=Path)
    running.set_defaults(action=run)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()
