"""Solving alone, from a Gram to codes: fewbits against llm-compressor and GPTQModel, on the same weights and Gram.

Usage: python bench/solving.py [--llm-compressor PYTHON] [--gptqmodel PYTHON] [--shapes 4096x4096 14336x4096]
       [--group-size 128] [--runs 3]

Each PYTHON has that peer (bench/peers/llm_compressor_solve.py, gptqmodel_solve.py). Inputs are correlated and their
channels unlike each other, as a model's are. All sides run as processes of their own, in turn; loss is relative, by
the same Gram.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fewbits.allocator import keep_blocks
from fewbits.fp32_products import fast_fp32
from fewbits.schemes import Scheme
from fewbits.solvers import gptq

RESULTS = Path(__file__).parent / "results" / "solving.jsonl"
PEERS = {"llm-compressor": "llm_compressor_solve.py", "gptqmodel": "gptqmodel_solve.py"}


def make_problem(path: Path, rows: int, columns: int) -> None:
    """Write W [rows, columns] and the Gram of 2 × columns inputs with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    with fast_fp32():
        inputs = torch.randn(2 * columns, columns, generator=generator) @ mixing.T
        inputs *= torch.rand(columns, generator=generator).add(0.1)
        gram = inputs.T @ inputs
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    save_file({"W": weight, "H": ((gram + gram.T) / 2).contiguous()}, str(path))


def solve_here(path: Path, scheme: Scheme, runs: int) -> dict[str, object]:
    """What the child process of our side does."""
    keep_blocks()  # as `fewbits quantize` does
    problem = load_file(str(path))
    W, H = problem["W"], problem["H"]
    gptq.solve(W[:64], scheme, torch.bfloat16, H)  # compiles, or reads the compiled kernels
    seconds = []
    for _ in range(runs):
        before = time.perf_counter()
        solution = gptq.solve(W, scheme, torch.bfloat16, H)
        seconds.append(round(time.perf_counter() - before, 3))
    assert solution.output_error is not None and solution.output_norm is not None
    return {
        "seconds": seconds,
        "relative_loss": float(solution.output_error.sum() / solution.output_norm.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], help="out x in")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scheme = Scheme("int", 4, args.symmetric, args.group_size)
    if args.here:
        print(json.dumps(solve_here(Path(args.here), scheme, 1)))
        return
    common = ["--group-size", str(args.group_size), "--threads", str(args.threads)]
    common += ["--symmetric"] if args.symmetric else []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in args.shapes:
            rows, columns = (int(size) for size in shape.split("x"))
            path = Path(scratch) / f"{shape}.safetensors"
            make_problem(path, rows, columns)
            sides = {"fewbits": [sys.executable, __file__, "--here", str(path)]}
            for peer, script in PEERS.items():
                if python := getattr(args, peer.replace("-", "_")):
                    sides[peer] = [python, str(Path(__file__).parent / "peers" / script), str(path)]
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            losses: dict[str, float] = {}
            for _ in range(args.runs):
                for side, command in sides.items():
                    done = subprocess.run([*command, *common], check=True, capture_output=True, text=True)
                    row = json.loads(done.stdout.strip().splitlines()[-1])
                    seconds[side] += row["seconds"]
                    losses[side] = row["relative_loss"]
            for side in sides:
                median = statistics.median(seconds[side])
                report = {
                    "bench": "solving", "shape": shape, "group_size": args.group_size, "symmetric": args.symmetric,
                    "what": side, "median_s": round(median, 3), "min_s": min(seconds[side]),
                    "max_s": max(seconds[side]), "relative_loss": losses[side],
                    "times_fewbits": round(median / statistics.median(seconds["fewbits"]), 2),
                    "threads": args.threads, "runs": args.runs,
                }  # fmt: skip
                print(json.dumps(report), flush=True)
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(report) + "\n")
            path.unlink()


if __name__ == "__main__":
    main()
