"""Kernels that were read from the disk do what they did in the process that compiled them.

There they may run another copy: what they call was also compiled on its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ERRORS = """
import numpy as np, torch
from fewbits.solvers.factorization import inverse_factor

for width in (33, 34, 35, 36, 64):
    x = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(0))
    H = x.T @ x
    damped = H.double().numpy() + 0.01 * H.diagonal().mean().item() * np.eye(width)
    U = inverse_factor(H).double().numpy()
    print(np.abs(U.T @ U @ damped - np.eye(width)).max())
"""

DIGESTS = """
import hashlib
import numpy as np, torch
from fewbits.kernels import norm_rows, one_token, tokens
from fewbits.kernels.decoders import BY_FOURS, WHOLE_HALVES, WHOLE_SECONDS
from fewbits.kernels.memory import FLOAT32
from fewbits.kernels.rounding import round_rows
from fewbits.kernels.team import Program, Work
from fewbits.schemes import Scheme
from fewbits.search import MINMAX

def show(*arrays):
    print(hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest())

generator = torch.Generator().manual_seed(0)
for width in (37, 576, 1000):
    numbers = torch.randn(3, 40, width, generator=generator).bfloat16()
    x, pulls, update = numbers.view(torch.uint16).numpy()
    weight = torch.rand(width, generator=generator).numpy()
    out, inverses, pulled = np.empty_like(x), np.empty(40, np.float32), np.empty_like(x)
    norm_rows.normalize(x, weight, 1e-6, out, inverses)
    norm_rows.pull_back(x, weight, inverses, pulls, pulled)
    show(out, inverses, pulled, norm_rows.lengths(x))
    residuals, normed = numbers[1].float().numpy(), np.empty_like(x)
    for row in range(40):
        Program([Work(one_token.between("add_norm"), {}).step(1, {
            one_token.X_AT: residuals[row].ctypes.data, one_token.WIDTH: width,
            one_token.WEIGHT_AT: weight.ctypes.data, one_token.EPS: one_token.bits_of(1e-6),
            one_token.OUT_AT: normed[row].ctypes.data, one_token.UPDATE_AT: update[row].ctypes.data,
            one_token.UPDATE_WEIGHT_AT: weight.ctypes.data, one_token.UPDATE_EPS: one_token.bits_of(1e-5),
        })]).run(1)
    show(residuals, normed)
x = torch.randn(3, 576, generator=generator).numpy()
for order in (BY_FOURS, WHOLE_HALVES, WHOLE_SECONDS):
    values, sums = np.zeros((3, 2, 5 * 256), np.uint8), np.empty((3, 2, 2, 9), np.float32)
    units = np.zeros((3, 2, 9), np.float32)
    Program([Work(tokens.arranged(), {}).step(3, {
        tokens.X_AT: x.ctypes.data, tokens.X_KIND: FLOAT32, tokens.COLUMNS: 576, tokens.OUT_AT: values.ctypes.data,
        tokens.GROUPS: 9, tokens.SUMS_AT: sums.ctypes.data, tokens.ORDER: order, tokens.PARTS: 2,
        tokens.UNITS_AT: units.ctypes.data, tokens.RAISED_BY: 8,
    })]).run(1)
    show(values, sums, units)
print(round_rows(torch.randn(64, 256, generator=generator), Scheme("int", 4, False, 32), MINMAX).squared_error)
"""


def outputs_of_two_runs(script: str, cache: Path) -> list[list[str]]:
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True,
            env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        )
        for _ in range(2)
    ]  # fmt: skip
    assert list(cache.rglob("*.nbc"))
    return [run.stdout.split() for run in runs]


def test_factors_are_as_exact(tmp_path: Path) -> None:
    for errors in outputs_of_two_runs(ERRORS, tmp_path):
        assert len(errors) == 5
        assert max(map(float, errors)) < 1e-3


def test_sums_that_may_be_reordered_are_the_same_to_the_bit(tmp_path: Path) -> None:
    compiled, cached = outputs_of_two_runs(DIGESTS, tmp_path)
    assert len(compiled) == 10
    assert compiled == cached
