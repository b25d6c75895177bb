"""Speed: how fast a checkpoint reads a prompt and writes tokens here, against bf16 and against memory's own speed.

A token cannot come faster than its weights are read, so the share of the memory-bandwidth limit says how much is left.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.devices import free_bytes
from fewbits.errors import QuantizationError
from fewbits.generate import Generator
from fewbits.linear import QuantLinear
from fewbits.load import HEADROOM_BYTES, load
from fewbits.notes import Note
from fewbits.progress import Progress, Silent

# Several times the largest cache, so that it comes from memory.
PROBE_BYTES = 2**29


@dataclass(frozen=True)
class Rates:
    """Tokens per second: medians over the runs."""

    prompt: float
    decode: float


@dataclass(frozen=True)
class SpeedReport:
    """What was measured.

    bf16: the same model decoded, on transformers' own forward; None if it does not fit, or nothing is quantized.
    bandwidth: bytes read per second. token_bytes: bytes of weights that one token reads.
    decode_shares, prompt_shares: seconds by kernel, of one token and of the prompt, and "everything else".
    """

    prompt_tokens: int
    tokens: int
    runs: int
    rates: Rates
    bf16: Rates | None
    bandwidth: float
    token_bytes: int
    weight_bytes: int
    decode_shares: dict[str, float]
    prompt_shares: dict[str, float]
    notes: tuple[Note, ...]

    @property
    def limit(self) -> float:
        """Tokens per second if reading the weights were all there is to do."""
        return self.bandwidth / self.token_bytes


def measure_speed(
    folder: str | Path,
    *,
    prompt_tokens: int = 512,
    tokens: int = 64,
    runs: int = 3,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> SpeedReport:
    """Measure a checkpoint on random tokens; both sides in turn, medians of `runs`.

    Raises:
        QuantizationError: fewer than two tokens or no run. CheckpointError, KernelError: as `load`.
    """
    if min(prompt_tokens, runs) < 1 or tokens < 2:
        raise QuantizationError(f"{prompt_tokens} prompt tokens, {tokens} tokens, {runs} runs: too few to measure")
    watcher = progress or Silent()
    model = load(folder, device, dtype, progress=progress)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    notes = list(model.load_notes)
    sides = {"quantized": Generator(model)}
    plain = _bf16_copy(model, linears, notes)
    if plain is not None:
        sides["bf16"] = Generator(plain, short_way=False)
    watcher.begin("measure", (runs + 1) * len(sides), "runs")
    measured: dict[str, list[Rates]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, generator in sides.items():
            rates, generation_notes = _one_run(generator, ids, tokens)
            if run:  # The first one warms up.
                measured[name].append(rates)
            elif name == "quantized":
                notes += generation_notes
            watcher.advance(1, name)
    watcher.end()
    medians = {
        name: Rates(statistics.median(r.prompt for r in found), statistics.median(r.decode for r in found))
        for name, found in measured.items()
    }
    rates = medians["quantized"]
    return SpeedReport(
        prompt_tokens, tokens, runs, rates, medians.get("bf16"), read_bandwidth(model.device), _token_bytes(model),
        _weight_bytes(model), _shares(model, linears, 1, 1 / rates.decode),
        _shares(model, linears, prompt_tokens, prompt_tokens / rates.prompt), tuple(notes),
    )  # fmt: skip


def _one_run(generator: Generator, ids: list[int], tokens: int) -> tuple[Rates, tuple[Note, ...]]:
    generation, stream = generator.stream(ids, tokens, stop=())
    for _ in stream:
        pass
    return Rates(generation.prompt_rate, generation.decode_rate), generation.notes


def _bf16_copy(model: Any, linears: list[QuantLinear], notes: list[Note]) -> Any | None:
    """The model with its linears decoded, sharing everything else; None if there is no room, or no need."""
    needed = sum(linear.in_features * linear.out_features * 2 for linear in linears)
    free = free_bytes(model.device)
    if not linears:
        return None
    if free is not None and needed + HEADROOM_BYTES > free:
        notes.append(Note("bf16", "not measured", f"the decoded model takes {needed:,} bytes more; {free:,} are free"))
        return None
    # Parameters and buffers are shared with the original: only the linears are new.
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    for path, module in list(twin.named_modules()):
        if isinstance(module, QuantLinear):
            parent, _, leaf = path.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(module.dequantize(torch.bfloat16), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias, requires_grad=False)
            setattr(twin.get_submodule(parent), leaf, plain)
    return twin.to(torch.bfloat16)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that reading memory reaches: the best of ten sums over what no cache holds."""
    probe = torch.zeros(PROBE_BYTES // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        started_s = time.perf_counter()
        # Reading the result waits for the device.
        probe.sum().item()
        best = min(best, time.perf_counter() - started_s)
    return PROBE_BYTES / best


def _tensors(model: Any) -> dict[int, torch.Tensor]:
    return {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}


def _weight_bytes(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(model).values())


def _token_bytes(model: Any) -> int:
    """All weights but a table of embeddings that is no head at the same time: of that a token reads one row."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(head, "weight", None) is table.weight
    return _weight_bytes(model) - (0 if tied else table.weight.numel() * table.weight.element_size())


def _shares(model: Any, linears: list[QuantLinear], tokens: int, total_s: float) -> dict[str, float]:
    """Seconds by kernel for this many tokens, each linear run in the model's order; and what is left of `total_s`."""
    shares: dict[str, float] = {}
    inputs = {
        width: torch.randn(tokens, width, dtype=model.dtype, device=model.device)
        for width in {linear.in_features for linear in linears}
    }
    with torch.inference_mode():
        rounds = []
        for _ in range(3):
            elapsed: dict[str, float] = {}
            for linear in linears:
                started_s = time.perf_counter()
                linear.forward(inputs[linear.in_features])
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                kernel = linear.kernels((tokens,))[tokens]
                elapsed[kernel] = elapsed.get(kernel, 0.0) + time.perf_counter() - started_s
            rounds.append(elapsed)
    for kernel in rounds[0]:
        shares[kernel] = statistics.median(found[kernel] for found in rounds)
    shares["everything else"] = max(0.0, total_s - sum(shares.values()))
    return shares
