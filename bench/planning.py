"""What `fewbits plan` takes for a checkpoint of 100 GB and more, and how soon the command itself answers.

Usage: python bench/planning.py [--runs 5]

Headers are real: Llama 3 70B shapes, and Mixtral 8x22B shapes with each expert on its own, in bf16 in 30 files. What
follows them is a hole in the file, since planning reads headers alone. Seconds of whole processes, median and spread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "planning.jsonl"
Shapes = dict[str, tuple[int, ...]]


def attention(hidden: int, keys: int) -> Shapes:
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip


def gated(prefix: str, names: tuple[str, str, str], hidden: int, inner: int) -> Shapes:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}


def llama_70b() -> tuple[dict[str, object], Shapes]:
    """80 blocks, 141 GB."""
    block = attention(8192, 1024) | gated("mlp", ("gate_proj", "up_proj", "down_proj"), 8192, 28672)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
              "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
              "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    return config, _model(block, 80, 8192, 128256)


def mixtral_8x22b() -> tuple[dict[str, object], Shapes]:
    """56 blocks of 8 experts, 281 GB, 1,568 linears."""
    block = attention(6144, 1024) | {"block_sparse_moe.gate": (8, 6144)}
    for expert in range(8):
        block |= gated(f"block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), 6144, 16384)
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 6144,
              "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
              "num_key_value_heads": 8, "vocab_size": 32768, "num_local_experts": 8}  # fmt: skip
    return config, _model(block, 56, 6144, 32768)


def _model(block: Shapes, blocks: int, hidden: int, vocabulary: int) -> Shapes:
    tensors: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(blocks):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_checkpoint(folder: Path, config: dict[str, object], tensors: Shapes, files: int = 30) -> int:
    """Write headers and holes; returns the bytes of the files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    names, weight_map, total = list(tensors), {}, 0
    for number in range(files):
        part = names[number * len(names) // files : (number + 1) * len(names) // files]
        header: dict[str, object] = {}
        at = 0
        for name in part:
            size = 2
            for length in tensors[name]:
                size *= length
            header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + at)
        weight_map |= dict.fromkeys(part, file)
        total += 8 + len(text) + at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    fewbits = str(Path(sys.executable).parent / "fewbits")
    with tempfile.TemporaryDirectory() as scratch:
        sizes: dict[str, int] = {}
        commands: dict[str, list[str]] = {}
        for name, (config, tensors) in {"llama-70b": llama_70b(), "mixtral-8x22b": mixtral_8x22b()}.items():
            size = make_checkpoint(Path(scratch) / name, config, tensors)
            for method in ("int4", "awq"):
                what = f"plan {name} {method}"
                sizes[what] = round(size / 1e9)
                commands[what] = [fewbits, "plan", str(Path(scratch) / name), "-m", method]
        commands["help"] = [fewbits, "--help"]
        commands["import"] = [sys.executable, "-c", "import fewbits"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(args.runs + 1):
            for name, command in commands.items():
                started_s = time.perf_counter()
                subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                if run:  # The first of all fills caches.
                    seconds[name].append(time.perf_counter() - started_s)
    with RESULTS.open("a") as file:
        for name, found in seconds.items():
            row = {
                "bench": "planning", "what": name, "gigabytes": sizes.get(name),
                "median_s": round(statistics.median(found), 3),
                "min_s": round(min(found), 3), "max_s": round(max(found), 3), "runs": args.runs,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
