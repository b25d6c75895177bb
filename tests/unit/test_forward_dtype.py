"""The dtype of calibration forwards, on which every byte of the result depends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from fewbits.forward_dtype import forward_dtype

UNHINDERED = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    forward_dtype.cache_clear()
    yield
    forward_dtype.cache_clear()


def _after(seconds: float, wait: Callable[[float], None]) -> Callable[..., torch.Tensor]:
    """A product in which bf16 takes `seconds` more."""

    def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if rows.dtype == torch.bfloat16:
            wait(seconds)
            return torch.empty(len(rows), len(weight), dtype=rows.dtype)
        return UNHINDERED(rows, weight)

    return linear


def _compute(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_processor_slow_at_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", _after(0.1, _compute))
    assert forward_dtype() is torch.float32


def test_a_thread_kept_waiting_by_other_programs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", _after(0.1, time.sleep))
    assert forward_dtype() is torch.bfloat16


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    forward_dtype()
    assert torch.get_num_threads() == before
