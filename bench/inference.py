"""Loaded checkpoints against transformers in bf16 and against llama.cpp: a prompt of 512 tokens, and writing.

Usage: python bench/inference.py make FOLDER [--model DIR] [--llama-quantize PATH]
       python bench/inference.py run FOLDER [--runs 3] [--tokens 64] [--prompt 512] [--llama-bench PATH] [--only SIDE …]
       python bench/inference.py rows FOLDER [--tokens 64] [--prompt 512]
       python bench/inference.py memory FOLDER [--what int4]

`make` writes a Llama of 1.1B parameters with random weights (or takes the checkpoint in --model), its quantized forms,
and, where llama.cpp's quantizer is given, GGUF files of the same shapes. `run` times all sides in turn and adds what it
saw to FOLDER/samples.jsonl, so that several short runs count together; everyone writes after the whole prompt. `rows`
appends a row for each side: medians, and the ratios to transformers' bf16 and to llama.cpp's file of as many bits.
`memory` appends what a process holds more after loading, and after writing.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import fewbits
from fewbits import Int4Asymmetric, Int8Symmetric, QuantConfig, QuantLinear
from fewbits.generate import Generator
from fewbits.speed import read_bandwidth

RESULTS = Path(__file__).parent / "results" / "inference.jsonl"
SAMPLES = "samples.jsonl"
BASELINE = "transformers bf16"
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

    def rate(*what: str) -> float:
        command = [program, "-m", file, "-t", str(torch.get_num_threads()), "-r", "1", "-o", "json", *what]
        (row,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found: float = row["avg_ts"]
        return found

    # -d: the context that writing begins with, which is empty otherwise.
    return rate("-p", str(prompt), "-n", "0"), rate("-p", "0", "-n", str(tokens), "-d", str(prompt))


def sides_of(folder: Path, source: Path, args: argparse.Namespace) -> dict[str, Callable[[], Rates]]:
    """What is timed, by name; generators have run before."""
    generators: dict[str, Callable[[], Generator]] = {BASELINE: lambda: plain_generator(source)}
    for name in CONFIGS:
        if (folder / name).exists():
            generators[f"fewbits {name}"] = lambda name=name: Generator(fewbits.load(folder / name))
    sides: dict[str, Callable[[], Rates]] = {}
    for name, make_generator in generators.items():
        if args.only and name not in args.only:
            continue
        generator = make_generator()
        # As long as what is timed: a longer stream would make the token's program anew.
        generator_rates(generator, args.prompt, args.tokens)
        sides[name] = lambda generator=generator: generator_rates(generator, args.prompt, args.tokens)
    for file in sorted(folder.glob("Q*.gguf")) if args.llama_bench else []:
        if not args.only or f"llama.cpp {file.stem}" in args.only:
            sides[f"llama.cpp {file.stem}"] = lambda file=file: llama_rates(
                args.llama_bench, file, args.prompt, args.tokens
            )
    return sides


def plain_generator(source: Path) -> Generator:
    """transformers in bf16."""
    return Generator(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval(), short_way=False)


def run(args: argparse.Namespace) -> None:
    """Time all sides in turn."""
    made = json.loads((args.folder / "source.json").read_text())
    sides = sides_of(args.folder, Path(made["source"]), args)
    for _ in range(args.runs):
        for name, side in sides.items():
            prompt_rate, decode_rate = side()
            sample = {"what": name, "prompt": args.prompt, "tokens": args.tokens, "rates": [prompt_rate, decode_rate]}
            sample["gb_per_s"] = read_bandwidth(torch.device("cpu")) / 1e9
            print(json.dumps(sample), flush=True)
            with (args.folder / SAMPLES).open("a") as file:
                file.write(json.dumps(sample) + "\n")


def rows(args: argparse.Namespace) -> None:
    """A row for each side of all samples so far."""
    made = json.loads((args.folder / "source.json").read_text())
    samples = [json.loads(line) for line in (args.folder / SAMPLES).read_text().splitlines()]
    samples = [sample for sample in samples if (sample["prompt"], sample["tokens"]) == (args.prompt, args.tokens)]
    found: dict[str, list[Rates]] = {}
    for sample in samples:
        found.setdefault(sample["what"], []).append(sample["rates"])
    medians = {
        name: [statistics.median(column) for column in zip(*rates, strict=True)] for name, rates in found.items()
    }
    bandwidth = statistics.median(sample["gb_per_s"] for sample in samples)
    for name, rates in found.items():
        peer = medians.get(f"llama.cpp {PEERS.get(name.removeprefix('fewbits '), '')}")
        row = {"bench": "inference", "model": args.folder.name, "what": name, "group_size": made["group_size"]}
        for index, kind in enumerate(("prompt", "decode")):
            row[f"{kind}_tokens_per_s"] = round(medians[name][index], 1)
            row[f"{kind}_range"] = [round(edge(pair[index] for pair in rates), 1) for edge in (min, max)]
            row[f"{kind}_times_bf16"] = round(medians[name][index] / medians[BASELINE][index], 2)
            if peer is not None:
                row[f"{kind}_of_llama_cpp"] = round(medians[name][index] / peer[index], 2)
        row |= {"prompt": args.prompt, "tokens": args.tokens, "runs": len(rates), "gb_per_s": round(bandwidth, 1)}
        keep(row)


def memory(args: argparse.Namespace) -> None:
    """What a process that has transformers and the kernels imported holds more after loading, and after writing."""
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.folder / args.what))
    QuantLinear.from_linear(torch.nn.Linear(256, 256, dtype=torch.bfloat16), Int4Asymmetric(128)).prepare()
    before = resident_bytes()
    model = fewbits.load(args.folder / args.what)
    loaded = resident_bytes()
    stored = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    generator_rates(Generator(model), args.prompt, args.tokens)
    keep(
        {
            "bench": "resident memory", "model": args.folder.name, "what": args.what,
            "tensors_gib": round(stored / 2**30, 3), "loaded_gib": round((loaded - before) / 2**30, 3),
            "after_writing_gib": round((resident_bytes() - before) / 2**30, 3),
            "prompt": args.prompt, "tokens": args.tokens,
        }
    )  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process that lies in memory, by Linux."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def keep(row: dict[str, Any]) -> None:
    """Print a row and append it to the results."""
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
    lengths = argparse.ArgumentParser(add_help=False)
    lengths.add_argument("folder", type=Path)
    lengths.add_argument("--prompt", type=int, default=512)
    lengths.add_argument("--tokens", type=int, default=64)
    running = commands.add_parser("run", parents=[lengths])
    running.add_argument("--runs", type=int, default=3)
    running.add_argument("--llama-bench", type=Path)
    running.add_argument("--only", nargs="+", help="names of sides, as rows have them")
    running.set_defaults(action=run)
    commands.add_parser("rows", parents=[lengths]).set_defaults(action=rows)
    holding = commands.add_parser("memory", parents=[lengths])
    holding.add_argument("--what", default="int4")
    holding.set_defaults(action=memory)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()
