"""Quantized linears against bf16 `F.linear`, one call at a time, and against what memory can deliver.

Usage: python bench/linear.py [--shapes 4096x4096 …] [--tokens 1 4 …] [--seconds 2] [--kernels]

All ways run in turn within one process, each through as many copies of its weight as no cache holds, as a model has
many layers; a row gives medians, for one product. The baseline is the faster of oneDNN and PyTorch's own product. At
one token, layers are also timed as `fewbits generate` runs them: as steps of one program, without calls of modules.
What memory can deliver is then read in turn as well, as it changes with what else the machine does. --kernels times
every kernel that can run, which is how the limits in src/fewbits/kernels were found. Rows are appended to
results/linear.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from fewbits import Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantLinear
from fewbits.kernels.choose import KERNELS
from fewbits.kernels.ops import runs_of
from fewbits.kernels.team import Program
from fewbits.kernels.threads import over_rows

RESULTS = Path(__file__).parent / "results" / "linear.jsonl"
SHAPES = ["4096x4096", "14336x4096", "4096x14336", "576x576", "1536x576"]
TOKENS = [1, 4, 16, 128, 1024]
READING = "reading"
LEFT_OUT = ("reference", "int8 as fp32")


@njit(nogil=True)
def largest(words: np.ndarray) -> int:
    """Reads everything once."""
    top = words[0]
    for index in range(words.size):
        top = max(top, words[index])
    return top


# Of a way's weights together, four times the last cache of the machines measured.
BEYOND_CACHES = 128 * 2**20
WORDS = np.ones((256, 2**17), np.int64)


def read() -> None:
    """Read 256 MB on all threads."""
    over_rows(*WORDS.shape, lambda first, last: largest(WORDS[first:last].reshape(-1)))


def read_bandwidth() -> float:
    """GB/s of reading, the best of ten."""
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        read()
        best = max(best, WORDS.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def without_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PyTorch's own product."""
    with torch.backends.mkldnn.flags(enabled=False):
        return F.linear(x, weight)


class Way(NamedTuple):
    """What is timed: so many products at once, with the bytes of weights that each reads."""

    call: Callable[[], object]
    size: int
    products: int = 1


def copies(size: int) -> range:
    """As many weights of so many bytes as no cache holds."""
    return range(max(2, -(-BEYOND_CACHES // size)))


def one_by_one(runs: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, size: int) -> Way:
    """Call after call."""

    def call() -> None:
        for run in runs:
            run(x)

    return Way(call, size, len(runs))


def in_a_program(layers: list[QuantLinear], x: torch.Tensor, size: int) -> Way:
    """The layers' steps, made once."""
    blocks, kept = [], []
    for layer in layers:
        layer(x)
        out = torch.empty((1, layer.out_features), dtype=x.dtype)
        steps = runs_of(layer.codes)[1, x.dtype].steps(x, out)
        blocks += steps.blocks
        kept.append((layer, steps, out))
    program, threads = Program(blocks), torch.get_num_threads()
    return Way(lambda: (program.run(threads), kept), size, len(layers))


def ways(rows: int, columns: int, tokens: int, every_kernel: bool) -> dict[str, Way]:
    """What is timed, by name."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.normal_(0, 0.02, generator=generator)
    x = torch.randn((tokens, columns), generator=generator).bfloat16()
    size = linear.weight.nbytes
    weights = [linear.weight.detach().clone() for _ in copies(size)]
    found = {"bf16 oneDNN": one_by_one([partial(F.linear, weight=weight) for weight in weights], x, size)}
    if tokens <= 4:
        own = [partial(without_onednn, weight=weight) for weight in weights]
        found["bf16 PyTorch"] = one_by_one(own, x, size)
    methods = {
        "W8A8": Int8Symmetric(),
        "int4": Int4Asymmetric(128 if columns % 128 == 0 else 64),
        "fp8": Fp8E4M3(None),
        "int8": Int8Symmetric(None),
    }
    for name, method in methods.items():
        layer = QuantLinear.from_linear(linear, method)
        size = layer.quantized_weight().size_bytes
        layers = [copy.deepcopy(layer) for _ in copies(size)]
        if not every_kernel:
            found[name] = one_by_one(layers, x, size)
            if tokens == 1:
                found[f"{name} in a program"] = in_a_program(layers, x, size)
            continue
        for kernel in KERNELS:
            able = kernel.why_not(layer.spec(1 if kernel.name != "panels" else tokens)) is None
            if able and kernel.name not in LEFT_OUT:
                runs = [kernel.prepare(each._stored(), None) for each in layers]
                found[f"{name}: {kernel.name}"] = one_by_one(runs, x, size)
    if tokens == 1:
        # Last: whoever follows it, oneDNN's bf16 product, pays for the caches that it empties.
        found[READING] = Way(read, WORDS.nbytes)
    return found


@torch.no_grad()
def measure(shape: str, tokens: int, seconds: float, bandwidth: float, every_kernel: bool) -> list[dict[str, object]]:
    """One row for each way."""
    rows, columns = map(int, shape.split("x"))
    found = ways(rows, columns, tokens, every_kernel)
    times: dict[str, list[float]] = {name: [] for name in found}
    for way in found.values():
        way.call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["bf16 oneDNN"]) < 5:
        for name, way in found.items():
            if READING in found:
                # What the way before has left in the caches may be this one's weights.
                read()
            start = time.perf_counter()
            way.call()
            times[name].append((time.perf_counter() - start) / way.products)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    baseline = min(median for name, median in medians.items() if name.startswith("bf16"))
    if READING in found:
        bandwidth = WORDS.nbytes / medians[READING] / 1e9
    results = []
    for name, way in found.items():
        quartiles = statistics.quantiles(times[name], n=4)
        results.append(
            {
                "shape": shape, "tokens": tokens, "way": name, "median_ms": round(1e3 * medians[name], 4),
                "quartiles_ms": [round(1e3 * quartiles[0], 4), round(1e3 * quartiles[2], 4)],
                "calls": len(times[name]), "of_bf16_speed": round(baseline / medians[name], 2),
                "of_read_bandwidth": round(way.size / medians[name] / 1e9 / bandwidth, 2),
                "gflop_per_s": round(2 * tokens * rows * columns / medians[name] / 1e9),
                "read_gb_per_s": round(bandwidth, 1), "threads": torch.get_num_threads(), "torch": torch.__version__,
            }
        )  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    RESULTS.parent.mkdir(exist_ok=True)
    print(f"read {bandwidth:.1f} GB/s, {torch.get_num_threads()} threads")
    for shape in options.shapes:
        for tokens in options.tokens:
            for row in measure(shape, tokens, options.seconds, bandwidth, options.kernels):
                print(
                    f"{shape:>11} {tokens:5} {row['way']:32} {row['median_ms']:9.3f} ms  "
                    f"{row['of_bf16_speed']:5.2f} of bf16  {row['of_read_bandwidth']:5.2f} of reading",
                    flush=True,
                )
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
