"""A whole checkpoint through calibrated GPTQ: fewbits with and without importance against llm-compressor.

Usage: python bench/gptq.py MODEL --calibration TEXT --evaluation TEXT --peer-python PYTHON [--group-size 64]
       [--symmetric] [--samples 64] [--length 512] [--windows 16] [--sides fewbits fewbits-plain llm-compressor]

PYTHON has llm-compressor (bench/peers/llm_compressor.py). All sides get the same token ids and run as processes of
their own, one after the other; seconds are wall clock, from start to exit, loading and saving included, beside the CPU
time that was used. KL divergence is that of `fewbits evaluate` on the evaluation text.
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

from fewbits.calibration import read_calibration
from fewbits.evaluate import evaluate_many

RESULTS = Path(__file__).parent / "results" / "gptq.jsonl"
PEER = Path(__file__).parent / "peers" / "llm_compressor.py"
RUN = "from fewbits.cli.main import run; run()"


def timed(command: list[str], log: Path) -> dict[str, object]:
    """Wall and CPU seconds and peak resident memory of a child process, and the last line that it printed."""
    started_s = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - started_s
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "wall_s": round(elapsed_s, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(peak / 2**20),
        "printed": json.loads(log.read_text().strip().splitlines()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--sides", nargs="+", default=["fewbits", "fewbits-plain", "llm-compressor"])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        ids = Path(scratch) / "ids.npy"
        np.save(ids, read_calibration(args.calibration, args.model, args.samples, args.length).ids.numpy())
        ours = [sys.executable, "-c", RUN, "quantize", str(args.model), "OUT", "-m", "gptq", "--json", "--quiet"]
        ours += ["-g", str(args.group_size), "--calibration", str(ids)]
        ours += ["--samples", str(args.samples), "--length", str(args.length)]
        ours += [] if args.symmetric else ["--asymmetric"]
        theirs = [args.peer_python or "", str(PEER), str(args.model), "OUT", "gptq", "--ids", str(ids)]
        theirs += ["--group-size", str(args.group_size)] + (["--symmetric"] if args.symmetric else [])
        commands = {
            "fewbits": [*ours, "--importance", "loss"],
            "fewbits-plain": [*ours, "--importance", "none"],
            "llm-compressor": theirs,
        }
        rows: dict[str, dict[str, object]] = {}
        folders = {}
        for side in args.sides:
            out = Path(scratch) / side
            shutil.rmtree(out, ignore_errors=True)
            command = [str(out) if part == "OUT" else part for part in commands[side]]
            rows[side] = timed(command, Path(scratch) / f"{side}.log")
            printed = rows[side].pop("printed")
            assert isinstance(printed, dict)
            rows[side]["stages_s"] = printed.get("stages_s") or {"quantize_s": printed["quantize_s"]}
            folders[side] = out
            print(side, rows[side], flush=True)
        found = evaluate_many(args.model, folders, args.evaluation, windows=args.windows)
        for side, row in rows.items():
            report = {
                "bench": "gptq", "model": args.model.name, "group_size": args.group_size,
                "symmetric": args.symmetric, "tokens": f"{args.samples}x{args.length}", "what": side,
                "kl": round(found[side].kl, 5), "perplexity": round(found[side].perplexity, 3),
            }  # fmt: skip
            print(json.dumps(report | row), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(report | row) + "\n")


if __name__ == "__main__":
    main()
