"""The Triton kernel without a GPU: in Triton's interpreter, and compiled for GPUs with Triton's own assembler.

The interpreter takes what no compiler would; so both.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux"),
]

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

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewbits.kernels.triton_int4_run import FEW, INPUTS, MANY, OUTPUTS, _tile

capability, dtype = int(sys.argv[1]), sys.argv[2]
numbers = dict.fromkeys(["tokens", "outputs", "inputs", "words", "groups", "group_size"], "i32")
for has_zeros in (False, True):
    for tokens in (FEW, MANY):
        pointers = {
            "x_at": dtype, "codes_at": "i32", "scales_at": "bf16", "zeros_at": "u8" if has_zeros else "i32",
            "bias_at": dtype, "y_at": dtype,
        }
        constants = {"HAS_ZEROS": has_zeros, "HAS_BIAS": True, "M": tokens, "N": OUTPUTS, "K": INPUTS}
        signature = {name: f"*{kind}" for name, kind in pointers.items()} | numbers
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=_tile, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024
        assert dtype == "fp32" or "mma" in made.asm["ptx"]
"""


def run(script: str, *arguments: str, **variables: str) -> None:
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=environment)


def test_products_in_the_interpreter() -> None:
    run(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_and_uses_their_matrix_units(capability: int, dtype: str) -> None:
    """Of Ampere and Hopper, in no more shared memory than consumer cards of that time have."""
    run(COMPILED, str(capability), dtype)
