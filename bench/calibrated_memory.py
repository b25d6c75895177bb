"""Peak memory of the calibrated pass on random Llama checkpoints made on the spot, by number of blocks and width.

Usage: python bench/calibrated_memory.py [--blocks 4 8] [--width 3072] [--inner 8192] [--samples 64] [--length 512]
       [--method gptq] [--memory 200MB] [--importance none] [--folder DIR]

The pass runs in a process of its own. Its peak is VmHWM of /proc/<pid>/status, read until it ends: `ru_maxrss` would be
inherited from the process that starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "calibrated_memory.jsonl"
HEAD_DIM, KEY_HEADS = 128, 8
POLL_S = 0.02
COMMAND = [sys.executable, "-c", "from fewbits.cli.main import run; run()"]


def make_checkpoint(folder: Path, blocks: int, width: int, inner: int, vocabulary: int) -> int:
    """Write one file a block; returns how many parameters there are."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    keys = HEAD_DIM * KEY_HEADS
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    norm = torch.ones(width, dtype=torch.bfloat16)
    embedding = torch.randn((vocabulary, width), generator=generator).bfloat16()
    weight_map: dict[str, str] = {}
    parameters = 0
    for number in range(blocks + 1):
        if number == blocks:
            tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm.clone()}
        else:
            prefix = f"model.layers.{number}"
            tensors = {
                f"{prefix}.{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
                for name, shape in shapes.items()
            }
            tensors |= {f"{prefix}.{name}_layernorm.weight": norm.clone() for name in ("input", "post_attention")}
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": width // HEAD_DIM, "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": vocabulary, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def peak_of(command: list[str]) -> tuple[float, int]:
    """Wall seconds of a command and the peak resident bytes of its process."""
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "2"})
    peak = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    return time.perf_counter() - started_s, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="gptq", choices=["gptq", "awq", "smoothquant"])
    parser.add_argument("--memory", default=None)
    parser.add_argument("--importance", default="none")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        ids = torch.randint(0, args.vocabulary, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
        np.save(Path(scratch) / "ids.npy", ids.numpy())
        for blocks in args.blocks:
            source, out = Path(scratch) / "source", Path(scratch) / "out"
            parameters = make_checkpoint(source, blocks, args.width, args.inner, args.vocabulary)
            command = [
                *COMMAND, "quantize", str(source), str(out), "-m", args.method, "--quiet",
                *([] if args.method == "smoothquant" else ["-g", "128"]),
                "--calibration", f"{scratch}/ids.npy", "--samples", str(args.samples), "--length", str(args.length),
                "--importance", args.importance, *([] if args.memory is None else ["--memory", args.memory]),
            ]  # fmt: skip
            seconds, peak = peak_of(command)
            row = {
                "bench": "calibrated_memory", "blocks": blocks, "width": args.width, "inner": args.inner,
                "parameters": parameters, "method": args.method, "samples": args.samples, "length": args.length,
                "importance": args.importance, "memory": args.memory, "peak_mib": round(peak / 2**20),
                "seconds": round(seconds, 1),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shutil.rmtree(source)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
