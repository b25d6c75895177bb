"""llm-compressor's GPTQ from Gram to codes, in an environment of its own: pip install llmcompressor==0.14.0.1.

Usage: python bench/peers/llm_compressor_solve.py PROBLEM.safetensors --group-size 128 [--symmetric] [--runs 1]

PROBLEM: W [N, K] and H [K, K], fp32. Prints one JSON line: seconds of each run, and the relative loss by H.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file


def main() -> None:
    """Solve, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = load_file(args.problem)
    W, H = problem["W"], problem["H"]
    how = QuantizationArgs(
        num_bits=4, type="int", symmetric=args.symmetric, strategy="group", group_size=args.group_size
    )
    seconds = []
    for _ in range(args.runs):
        before = time.perf_counter()
        grouped = W.view(len(W), -1, args.group_size)
        scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), how)
        solved, _, _ = quantize_weight(W[None].clone(), H[None].clone(), scale[None], zero[None], None, how)
        seconds.append(round(time.perf_counter() - before, 3))
    missed = W - solved[0]
    loss = float(((missed @ H) * missed).sum() / ((W @ H) * W).sum())
    print(json.dumps({"seconds": seconds, "relative_loss": loss}))


if __name__ == "__main__":
    main()
