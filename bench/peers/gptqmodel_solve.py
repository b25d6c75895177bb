"""GPTQModel's GPTQ from Gram to codes, in an environment of its own: pip install --no-deps gptqmodel==7.7.0, then
the packages that it imports.

Usage: python bench/peers/gptqmodel_solve.py PROBLEM.safetensors --group-size 128 [--symmetric] [--runs 1]

PROBLEM: W [N, K] and H [K, K], fp32. Prints one JSON line: seconds of each run, and the relative loss by H.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
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
    seconds = []
    for _ in range(args.runs):
        layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
        layer.weight.data = W.clone()
        solver = GPTQ(layer, QuantizeConfig(bits=4, group_size=args.group_size, sym=args.symmetric, desc_act=False))
        solver.quantizer.configure(perchannel=True)
        # As many tokens as the bench's Gram was made of, summed already.
        solver.nsamples = 2 * W.shape[1]
        solver.H = H.clone()
        solver.finalize_hessian = lambda *_, solver=solver, **__: solver.H
        before = time.perf_counter()
        solved = solver.quantize()[0]
        seconds.append(round(time.perf_counter() - before, 3))
    missed = W - solved.float()
    loss = float(((missed @ H) * missed).sum() / ((W @ H) * W).sum())
    print(json.dumps({"seconds": seconds, "relative_loss": loss}))


if __name__ == "__main__":
    main()
