"""AWQ and SmoothQuant against llm-compressor: what is left of a model, and how long it took, on the same tokens.

Usage: python bench/transforms.py MODEL --calibration TEXT --evaluation TEXT --peer PYTHON [--group-size 64]
       [--methods awq smoothquant] [--only NAME ...] [--samples 64] [--length 512] [--windows 16]

PYTHON has llm-compressor 0.14 (see peers/llm_compressor.py). Both sides get the same token ids, run as processes of
their own, in turn, and are measured by one evaluation: KL(reference ‖ quantized) in fp32, inputs rounded where a scheme
says so. Seconds are those of quantizing; reading the model and writing files are left out on the peer's side only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.calibration import read_calibration
from fewbits.evaluate import evaluate_many

RESULTS = Path(__file__).parent / "results" / "transforms.jsonl"
HERE = Path(__file__).parent
# By name: arguments of fewbits (with the group size where there is one), and of the peer; None where it has no such.
OURS: dict[str, dict[str, list[str]]] = {
    "awq": {
        "AWQ, weighed tokens": ["--method", "awq", "--importance", "loss"],
        "AWQ, plain tokens": ["--method", "awq"],
        "AWQ then GPTQ": ["--method", "awq", "--solver", "gptq"],
        "GPTQ asymmetric": ["--method", "gptq", "--asymmetric"],
        "INT4": ["--method", "int4"],
    },
    "smoothquant": {
        "SmoothQuant auto, weighed tokens": ["--method", "smoothquant", "--alpha", "auto", "--importance", "loss"],
        "SmoothQuant auto, plain tokens": ["--method", "smoothquant", "--alpha", "auto"],
        "SmoothQuant 0.5, plain tokens": ["--method", "smoothquant", "--alpha", "0.5"],
        "INT8": ["--method", "int8"],
    },
}
PEER: dict[str, dict[str, list[str]]] = {
    "awq": {"AWQ": ["awq"]},
    "smoothquant": {"SmoothQuant 0.8": ["smoothquant", "--smoothing", "0.8"]},
}


def run(command: list[str]) -> tuple[str, float]:
    """Standard output, and seconds from start to end."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - began


def ours(args: argparse.Namespace, name: str, options: list[str], ids: Path, out: Path) -> dict[str, Any]:
    """Quantize with fewbits."""
    grouped = [] if name.startswith(("Smooth", "INT8")) else ["--group-size", str(args.group_size)]
    calibrated = ["--calibration", str(ids), "--samples", str(args.samples), "--length", str(args.length)]
    calibrated = [] if name in ("INT4", "INT8") else calibrated
    start = "from fewbits.cli.main import run; run()"
    command = [sys.executable, "-c", start, "quantize", args.model, str(out), *options, *grouped, *calibrated, "--json"]
    printed, elapsed_s = run(command)
    report = json.loads(printed)
    return {
        "elapsed_s": round(report["elapsed_s"], 1),
        "process_s": round(elapsed_s, 1),
        "peak_bytes": report["peak_memory_bytes"],
        "stages_s": {stage: round(seconds, 1) for stage, seconds in report["stages_s"].items()},
        "folds": len(report["folds"]),
        "notes": len(report["notes"]),
    }


def peers(args: argparse.Namespace, options: list[str], ids: Path, out: Path) -> dict[str, Any]:
    """Quantize with llm-compressor."""
    script = str(HERE / "peers" / "llm_compressor.py")
    command = [args.peer, script, args.model, str(out), *options, "--ids", str(ids)]
    printed, elapsed_s = run([*command, "--group-size", str(args.group_size)])
    row = json.loads(printed.strip().splitlines()[-1])
    return {"elapsed_s": row["quantize_s"], "process_s": round(elapsed_s, 1), "peak_bytes": row["peak_bytes"]}


def main() -> None:
    """Quantize on both sides, evaluate all, append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--peer")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--only", nargs="+", help="of our rows those with these names")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ids = folder / "ids.npy"
        np.save(ids, read_calibration(args.calibration, args.model, args.samples, args.length).ids.numpy())
        rows: dict[str, dict[str, Any]] = {}
        for method in args.methods:
            for name, options in PEER[method].items() if args.peer else ():
                rows[f"llm-compressor {name}"] = peers(args, options, ids, folder / f"llm-compressor {name}")
            for name in args.only or OURS[method]:
                options = OURS[method].get(name)
                if options is None:
                    continue
                rows[f"fewbits {name}"] = ours(args, name, options, ids, folder / f"fewbits {name}")
        found = evaluate_many(
            args.model, {name: folder / name for name in rows}, Path(args.evaluation), windows=args.windows
        )
        for name, evaluation in found.items():
            row = {
                "name": name, "model": Path(args.model).name, "group_size": args.group_size,
                "calibration_tokens": args.samples * args.length, "windows": args.windows,
                "kl": round(evaluation.kl, 5), "perplexity": round(evaluation.perplexity, 3),
                "top1": round(evaluation.top1, 4), **rows[name],
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as results:
                results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
