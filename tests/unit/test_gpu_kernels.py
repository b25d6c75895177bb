"""Kernels for GPUs, as far as they run without one: on PyTorch's CPU calls. Triton's are in tests/engines."""

from __future__ import annotations

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
