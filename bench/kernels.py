"""Rounding one weight and decoding it, compiled, against a copy of the same bytes and against plain torch.

Usage: python bench/kernels.py [--rows 14336] [--columns 4096] [--runs 15]

Every side is called in turn, run after run; a row gives the median and spread of its time, the speed in bytes of bf16
weights per second as a share of the copy's, and how many times faster than plain torch it is. Output buffers are used
again, as in a conversion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fewbits import numerics
from fewbits.kernels.channels import round_channel_fp8, round_channel_int8
from fewbits.kernels.groups import round_groups
from fewbits.kernels.rounding import round_rows
from fewbits.kernels.row_decoder import RowDecoder
from fewbits.kernels.spec import LinearWeight
from fewbits.methods import Int4Asymmetric
from fewbits.packing import pack_rows, words_for
from fewbits.schemes import Scheme
from fewbits.search import DATA_FREE_SEARCH, MINMAX, Search

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
INT8, FP8, INT4 = Scheme("int", 8, True), Scheme("float", 8, True), Int4Asymmetric(group_size=128).scheme
# OpenMP's threads, torch's copy among their work, spin for milliseconds before they leave a processor to others.
PAUSE_S = 0.02
# Plain torch takes seconds for the search; once is enough to tell.
SLOW_RUNS = 1


def sides(weight: torch.Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is measured, by name: the compiled kernel and plain torch."""
    target = torch.empty_like(weight)
    bytes_of = torch.empty(weight.shape, dtype=torch.int8)
    floats = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    words = torch.empty((weight.shape[0], words_for(weight.shape[1], 4)), dtype=torch.int32)
    dtype = weight.dtype

    def packed(search: Search) -> Callable[[], object]:
        return lambda: round_groups(weight, INT4, dtype, search, packed=True, out=words)

    def plain(scheme: Scheme, search: Search) -> Callable[[], object]:
        return lambda: pack_rows(numerics.round_groups(weight, scheme, dtype, search).codes, 4)

    def decoding(scheme: Scheme) -> tuple[Callable[[], object], Callable[[], object]]:
        rounded = round_rows(weight, scheme, MINMAX)
        codes = rounded.codes.view(torch.uint8) if scheme.kind == "float" else rounded.codes
        stored = LinearWeight(codes, rounded.scales, rounded.zeros, (weight.shape[0], weight.shape[1]), scheme)
        decoder = RowDecoder(stored)
        return lambda: decoder.decode(0, target), lambda: target.copy_(stored.decoded())

    return {
        "copy": (lambda: target.copy_(weight), lambda: target.copy_(weight)),
        "int8": (
            lambda: round_channel_int8(weight, dtype, bytes_of),
            lambda: numerics.round_channel_int8(weight, dtype),
        ),
        "fp8": (lambda: round_channel_fp8(weight, dtype, floats), lambda: numerics.round_channel_fp8(weight, dtype)),
        "int4 min/max, packed": (packed(MINMAX), plain(INT4, MINMAX)),
        "int4 searched, packed": (packed(DATA_FREE_SEARCH), plain(INT4, DATA_FREE_SEARCH)),
        "int8 decoded": decoding(INT8),
        "fp8 decoded": decoding(FP8),
        "int4 decoded": decoding(INT4),
    }


def elapsed_ms(call: Callable[[], object]) -> float:
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure, print, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn((args.rows, args.columns), generator=generator) * 0.02).bfloat16()
    measured = sides(weight)
    for compiled, _ in measured.values():  # Compiles, and touches every buffer.
        compiled()
    compiled_ms: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(args.runs):
        for name, (compiled, _) in measured.items():
            compiled_ms[name].append(elapsed_ms(compiled))
    torch_ms: dict[str, list[float]] = {name: [] for name in measured}
    for name, (_, plain) in measured.items():
        for _ in range(SLOW_RUNS if "searched" in name else 3):
            torch_ms[name].append(elapsed_ms(plain))
    copy_ms = statistics.median(compiled_ms["copy"])
    with RESULTS.open("a") as file:
        for name, times in compiled_ms.items():
            median = statistics.median(times)
            row = {
                "bench": "kernels", "shape": [args.rows, args.columns], "what": name,
                "threads": torch.get_num_threads(),
                "median_ms": round(median, 2), "min_ms": round(min(times), 2), "max_ms": round(max(times), 2),
                "of_copy_speed": round(copy_ms / median, 3),
                "times_torch": round(statistics.median(torch_ms[name]) / median, 1), "runs": args.runs,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
