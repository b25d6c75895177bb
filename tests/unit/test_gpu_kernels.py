"""Kernels for GPUs, as far as they run without one: on PyTorch's CPU calls, and in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fewbits.kernels.choose import choose
from fewbits.kernels.cuda import CudaFp8, CudaInt8
from fewbits.kernels.spec import LinearSpec, Machine
from fewbits.kernels.triton_int4 import TritonInt4
from fewbits.schemes import Scheme
from linear_cases import activations, int8_product, make

W8A8, FP8 = Scheme("int", 8, True, 0, "dynamic"), Scheme("float", 8, True, 0, "dynamic")
INT4 = Scheme("int", 4, False, 128)
HOPPER = Machine(frozenset({"triton"}), (9, 0))

INTERPRETED = """
import numpy as np, torch
from linear_cases import activations, make
from fewbits.kernels.triton_int4_run import TritonInt4Run
from fewbits.schemes import Scheme
for symmetric, group, rows, columns, tokens in [
    (False, 32, 70, 96, 3), (True, 64, 64, 128, 17), (False, 0, 5, 40, 1), (True, 0, 130, 200, 70),
]:
    case = make(Scheme("int", 4, symmetric, group), rows, columns)
    x = activations(tokens, columns, torch.float32)
    for bias in (None, case.bias):
        expected = x.double().numpy() @ case.decoded.T + (0 if bias is None else bias.numpy())
        assert np.abs(TritonInt4Run(case.weight, bias)(x).numpy() - expected).max() < 1e-3
    assert TritonInt4Run(case.weight, None)(x[:0]).shape == (0, rows)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernel_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)


@pytest.mark.parametrize("tokens", [1, 40])
def test_int8_rows_are_padded_and_sums_exact(tokens: int) -> None:
    case = make(W8A8, 16, 136)
    x = activations(tokens, 136, torch.float32)
    assert torch.equal(CudaInt8().prepare(case.weight, case.bias)(x), int8_product(case, x))


def spec(scheme: Scheme, **changes: object) -> LinearSpec:
    return LinearSpec(scheme, 4096, 4096, 8, device="cuda", **({"machine": HOPPER} | changes))  # type: ignore[arg-type]


def test_the_choice_on_gpus() -> None:
    assert choose(spec(FP8)).name == "CUDA fp8"
    assert choose(spec(W8A8)).name == "CUDA int8"
    assert choose(spec(INT4)).name == "Triton int4"
    assert choose(spec(INT4, machine=Machine(frozenset(), (9, 0)))).name == "reference"
    assert choose(spec(FP8, machine=Machine(frozenset(), (8, 0)))).name == "reference"


def test_reasons_on_gpus() -> None:
    assert CudaFp8().why_not(spec(FP8, machine=Machine(frozenset(), (8, 0)))) == (
        "needs compute capability 8.9, this device has (8, 0)"
    )
    assert "returns bf16" in str(CudaFp8().why_not(spec(FP8, dtype=torch.float16)))
    assert TritonInt4().why_not(spec(INT4, machine=Machine())) == "needs Triton"
    assert np.all([kernel.why_not(LinearSpec(W8A8, 8, 8, 1)) is not None for kernel in (CudaFp8(), TritonInt4())])
