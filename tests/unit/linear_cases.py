"""Quantized weights made from known codes, and what they multiply to in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from fewbits.kernels.spec import LinearWeight
from fewbits.packing import pack_rows
from fewbits.schemes import Scheme


@dataclass(frozen=True)
class Case:
    """A weight as kernels take it, and the numbers it stands for."""

    weight: LinearWeight
    bias: torch.Tensor
    decoded: Any


def make(scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Case:
    """Random codes over the whole range, the first row all zero, scales of either sign where symmetric."""
    rng = np.random.default_rng(seed)
    groups = scheme.groups(columns)
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (rows, groups))).to(scale_dtype)
    if scheme.symmetric and scheme.kind == "int":
        scales *= torch.from_numpy(rng.choice([-1.0, 1.0], (rows, groups))).to(scale_dtype)
    bias = torch.from_numpy(rng.normal(size=rows)).to(torch.float32)
    zeros = None
    if scheme.kind == "float":
        values = rng.normal(size=(rows, columns)).astype(np.float32) * rng.choice([1e-3, 1.0, 100.0], (rows, columns))
        values[0] = 0
        stored = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        codes, numbers = torch.from_numpy(stored.view(np.uint8)), stored.astype(np.float64)
    else:
        unsigned = rng.integers(0, 2**scheme.bits, (rows, columns), dtype=np.uint8)
        middle = 2 ** (scheme.bits - 1)
        unsigned_zeros = np.full((rows, groups), middle, np.uint8)
        if not scheme.symmetric:
            unsigned_zeros = rng.integers(0, 2**scheme.bits, (rows, groups), dtype=np.uint8)
        spread = np.repeat(unsigned_zeros, columns // groups, axis=1)
        unsigned[0] = spread[0]
        if scheme.bits == 8 and scheme.symmetric:
            unsigned = np.maximum(unsigned, 1)
        numbers = unsigned.astype(np.float64) - spread
        if scheme.bits == 8:
            codes = torch.from_numpy((unsigned ^ 0x80).view(np.int8))
            zeros = torch.from_numpy((unsigned_zeros ^ 0x80).view(np.int8))
        else:
            codes, zeros = pack_rows(torch.from_numpy(unsigned), scheme.bits), torch.from_numpy(unsigned_zeros)
        zeros = None if scheme.symmetric else zeros
    decoded = numbers * np.repeat(scales.double().numpy(), columns // groups, axis=1)
    return Case(LinearWeight(codes, scales, zeros, (rows, columns), scheme), bias, decoded)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, one of them large; the second token is all zero."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    x[:, columns // 3] *= 30
    x[1:2] = 0
    return x.to(dtype)


def rounded_to_fp8(x: torch.Tensor) -> Any:
    """Each token on the grid of float8 with scale max / 448, by ml_dtypes; fp64."""
    wide = x.float().numpy()
    scales = np.maximum(np.abs(wide).max(1, keepdims=True), np.finfo(np.float32).tiny) / np.float32(448)
    codes = (wide / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return codes * scales.astype(np.float64)


def int8_product(case: Case, x: torch.Tensor) -> torch.Tensor:
    """W8A8 with integer sums, scaled in fp32: token, then row, then bias."""
    wide = x.float().numpy()
    scales = np.maximum(np.abs(wide).max(1, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
    codes = np.rint(wide / scales).astype(np.int64)
    sums = (codes @ case.weight.codes.numpy().astype(np.int64).T).astype(np.float32)
    y = sums * scales * case.weight.scales.float().numpy().reshape(1, -1) + case.bias.numpy()
    return torch.from_numpy(y).to(x.dtype)
