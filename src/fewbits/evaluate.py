"""Evaluate: what is left of a model after quantization, as perplexity, KL divergence and next-token agreement.

Both models run in fp32 on the same consecutive windows of the same text. Quantized layers are decoded; where a scheme
rounds activations, each input is rounded per token as an engine would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.decoded import decoded_model
from fewbits.errors import CheckpointError, QuantizationError
from fewbits.fp32_products import fast_fp32
from fewbits.metrics.divergence import TokenDivergence, token_divergence
from fewbits.progress import Progress, Silent
from fewbits.tokenizer import load_tokenizer

# Characters of text to tokenize per token wanted: ample for every common tokenizer on every script.
CHARACTERS_PER_TOKEN = 12
# Reference logits up to this size are kept for the next candidate rather than computed again.
KEEP_BYTES = 2**30


@dataclass(frozen=True)
class Evaluation:
    """What is left of a model.

    kl: mean KL(reference ‖ quantized) per token, nats. kl_error: its standard error over windows.
    top1: share of positions where both models put the same token first. tokens: positions compared.
    """

    tokens: int
    perplexity_reference: float
    perplexity: float
    kl: float
    kl_error: float
    top1: float
    windows: int
    length: int


def evaluate(
    reference: str | Path,
    quantized: str | Path,
    text: str | Path,
    *,
    windows: int = 16,
    length: int = 1024,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a quantized checkpoint with the original on `text`.

    Args:
        reference: folder of the original checkpoint.
        quantized: folder of the quantized one (any checkpoint of the same vocabulary).
        text: a file (Path), or the text itself (str).
        windows, length: `windows` consecutive windows of `length` tokens from the start of the text.
        device: where both models run.

    Raises:
        QuantizationError: the text is too short. CheckpointError: a folder holds no model, or vocabularies differ.
        MissingDependencyError: transformers is not installed.
    """
    return evaluate_many(
        reference, {"": quantized}, text, windows=windows, length=length, device=device, progress=progress
    )[""]


def evaluate_many(
    reference: str | Path,
    candidates: Mapping[str, str | Path],
    text: str | Path,
    *,
    windows: int = 16,
    length: int = 1024,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Like `evaluate`, for several candidates that share one pass over the reference."""
    _check_tokenizers(Path(reference), candidates)
    ids = _windows(Path(reference), text, windows, length).to(device)
    watch = progress or Silent()
    watch.begin("evaluating", windows * len(candidates), "windows")
    expected = _Reference(decoded_model(reference, device=device), ids, keep=len(candidates) > 1)
    results = {}
    for name, folder in candidates.items():
        model = decoded_model(folder, device=device)
        compared = []
        for number, window in enumerate(ids):
            found = _logits(model, window)
            compared.append(token_divergence(expected.logits(number)[:-1], found[:-1], window[1:]))
            watch.advance(1, name)
        results[name] = _summary(compared, length)
    watch.end()
    return results


class _Reference:
    """The reference's logits, kept between candidates while they are few enough to keep."""

    def __init__(self, model: Any, ids: torch.Tensor, *, keep: bool) -> None:
        self._model, self._ids = model, ids
        self._keep = keep and ids.numel() * model.config.get_text_config().vocab_size * 4 <= KEEP_BYTES
        self._kept: dict[int, torch.Tensor] = {}

    def logits(self, number: int) -> torch.Tensor:
        found = self._kept.get(number)
        if found is None:
            found = _logits(self._model, self._ids[number])
            if self._keep:
                self._kept[number] = found
        return found


@torch.no_grad()
def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    with fast_fp32():
        logits: torch.Tensor = model(window[None]).logits[0]
    return logits


def _summary(compared: list[TokenDivergence], length: int) -> Evaluation:
    kl = torch.stack([window.kl.mean() for window in compared])
    tokens = sum(window.kl.numel() for window in compared)
    return Evaluation(
        tokens=tokens,
        perplexity_reference=math.exp(sum(window.nll_reference.sum().item() for window in compared) / tokens),
        perplexity=math.exp(sum(window.nll.sum().item() for window in compared) / tokens),
        kl=kl.mean().item(),
        kl_error=(kl.std() / math.sqrt(len(kl))).item() if len(kl) > 1 else math.nan,
        top1=sum(window.agrees.sum().item() for window in compared) / tokens,
        windows=len(compared),
        length=length,
    )


def _windows(reference: Path, text: str | Path, windows: int, length: int) -> torch.Tensor:
    if windows < 1 or length < 2:
        raise QuantizationError(f"expected at least 1 window of 2 tokens, got {windows} × {length}")
    if isinstance(text, Path):
        if not text.is_file():
            raise QuantizationError(f"{text}: no such text file.")
        text = text.read_text(encoding="utf-8", errors="replace")
    tokenizer = load_tokenizer(reference)
    ids = tokenizer(text[: windows * length * CHARACTERS_PER_TOKEN], return_tensors="pt").input_ids[0]
    if len(ids) < windows * length:
        raise QuantizationError(
            f"the text has {len(ids)} tokens; {windows} windows of {length} need {windows * length}.",
            f"give a longer text, or at most {len(ids) // length} windows of {length}",
        )
    cut: torch.Tensor = ids[: windows * length].view(windows, length)
    return cut


def _check_tokenizers(reference: Path, candidates: Mapping[str, str | Path]) -> None:
    """Different vocabularies make every figure meaningless."""
    expected = _vocabulary(reference)
    for folder in candidates.values():
        found = _vocabulary(Path(folder))
        if found != expected:
            raise CheckpointError(
                f"{folder}: vocabulary of {found} tokens, but {reference} has {expected}.",
                "compare a quantized checkpoint with the one it was made from",
            )


def _vocabulary(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json.", "give the folder of a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not valid JSON ({error}).") from None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None
