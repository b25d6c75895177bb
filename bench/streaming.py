"""A whole checkpoint through `fewbits quantize`, against `cp` of the same files with a final sync.

Usage: python bench/streaming.py [--sizes 1 4 8] [--runs 3] [--folder DIR]
       python bench/streaming.py --summary

Llama 3 8B shapes in bf16 (as many blocks as fit the size, the embeddings included), in three files, made on the spot
unless they lie in DIR already. Both sides run as processes of their own, in turn; a row gives one round: the seconds
and the peak resident memory of each. The summary gives medians over all rounds of a size, and of the ratio to `cp` in
the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results" / "streaming.jsonl"
HIDDEN, INNER, KEYS, VOCABULARY = 4096, 14336, 1024, 128256
# Deleted files are still being discarded after a sync.
SETTLE_S = 2.0
METHODS = {"int8": [], "fp8": [], "int4": ["--group-size", "128"]}


def block(index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One decoder block of random weights."""
    import torch

    prefix = f"model.layers.{index}"
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    tensors = {
        f"{prefix}.{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint of about `gigabytes` in three files.

    Runs in a process of its own: what a parent had resident would count as its children's peak.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    block_bytes = 2 * (2 * HIDDEN * HIDDEN + 2 * KEYS * HIDDEN + 3 * INNER * HIDDEN)
    embedding_bytes = 2 * VOCABULARY * HIDDEN
    vocabulary = VOCABULARY if gigabytes > 2 else VOCABULARY // 8
    remaining = gigabytes * 1e9 - embedding_bytes * vocabulary / VOCABULARY
    blocks = max(2, round(remaining / block_bytes))
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": blocks, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    first = {"model.embed_tokens.weight": torch.randn((vocabulary, HIDDEN), generator=generator).bfloat16()}
    parts: list[dict[str, torch.Tensor]] = [first, {}, {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}]
    weight_map = {}
    indices = [range(0, blocks // 3), range(blocks // 3, 2 * blocks // 3), range(2 * blocks // 3, blocks)]
    for number, (part, part_blocks) in enumerate(zip(parts, indices, strict=True), start=1):
        for index in part_blocks:
            part |= block(index, generator)
        name = f"model-{number:05d}-of-00003.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
        part.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def timed(command: list[str], out: Path) -> tuple[float, int]:
    """Wall seconds until everything is on disk, and peak resident bytes of the child."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    time.sleep(SETTLE_S)
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    subprocess.run(["sync"], check=True)
    elapsed_s = time.perf_counter() - started_s
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    shutil.rmtree(out, ignore_errors=True)
    return elapsed_s, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[4.0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--summary", action="store_true", help="only print medians of all rounds so far")
    parser.add_argument("--make", type=Path, help="only write a checkpoint of the first size into this folder")
    args = parser.parse_args()
    if args.make is not None:
        make_checkpoint(args.make, args.sizes[0])
        return
    if args.summary:
        summarize()
        return
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            source = (args.folder or Path(scratch)) / f"source-{size:g}"
            if not source.exists():
                subprocess.run([sys.executable, __file__, "--sizes", str(size), "--make", str(source)], check=True)
            for run in range(args.runs):
                row = measure(source, source.with_name("out"), backwards=run % 2 == 1)
                print(json.dumps(row | {"gigabytes": size}), flush=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps({"bench": "streaming round", "gigabytes": size} | row) + "\n")


def measure(source: Path, out: Path, *, backwards: bool) -> dict[str, dict[str, float]]:
    """One round: each command once. What the one before left for the disk to do counts for each alike over two."""
    fewbits = str(Path(sys.executable).parent / "fewbits")
    commands = {"cp": ["cp", "-r", str(source), str(out)]}
    for method, options in METHODS.items():
        commands[method] = [fewbits, "quantize", str(source), str(out), "-m", method, *options, "--quiet"]
    for file in source.iterdir():  # Into the page cache.
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    row = {}
    for name in list(commands)[:: -1 if backwards else 1]:
        elapsed_s, peak_bytes = timed(commands[name], out)
        row[name] = {"s": round(elapsed_s, 3), "peak_mib": round(peak_bytes / 2**20)}
    return row


def summarize() -> None:
    """Medians of what the results hold, by size and command."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rounds = [row for row in rows if row["bench"] == "streaming round"]
    for size in sorted({row["gigabytes"] for row in rounds}):
        alike = [row for row in rounds if row["gigabytes"] == size]
        for name in ("cp", *METHODS):
            seconds = [row[name]["s"] for row in alike]
            ratio = statistics.median(row[name]["s"] / row["cp"]["s"] for row in alike)
            print(
                f"{size:g} GB, {name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
                f"{ratio:.2f} of cp, peak {max(row[name]['peak_mib'] for row in alike)} MiB, {len(alike)} rounds"
            )


if __name__ == "__main__":
    main()
