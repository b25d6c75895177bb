"""Logits of loaded checkpoints against the same checkpoints decoded by transformers in fp32, by method.

Usage: python bench/loaded_logits.py MODEL TEXT [--methods int8 gptq4 …] [--group-size 64]

MODEL is quantized with each method, with a few samples of the first half of TEXT where it needs them (these are no
models to use), and loaded. The logits of further text are compared with those of the decoded weights in fp32: of the
whole forward, and of tokens one by one, the way `fewbits generate` takes. What bf16 alone moves them by, by running the
decoded model in bf16, stands beside it, and so does the loaded model in fp32. The decoder is transformers' own (through
compressed-tensors); fewbits' where that does not read the checkpoint (3 bits), or does not round activations. Rows are
appended to results/loaded_logits.jsonl.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from transformers.utils.quantization_config import CompressedTensorsConfig

import fewbits
from fewbits import AWQ, GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantConfig, QuantMethod, SmoothQuant
from fewbits.decoded import decoded_model
from fewbits.generate import Generation, Generator

RESULTS = Path(__file__).parent / "results" / "loaded_logits.jsonl"
SAMPLES, LENGTH = 16, 256
TEXTS, TOKENS, PROMPT = 4, 128, 64


def methods(group: int) -> dict[str, QuantMethod]:
    """Every method, GPTQ at every width that is written."""
    return {
        "int8": Int8Symmetric(),
        "int8-weights": Int8Symmetric(activations=None),
        "int4": Int4Asymmetric(group),
        "fp8": Fp8E4M3(),
        "fp8-weights": Fp8E4M3(activations=None),
        "awq": AWQ(group),
        "smoothquant": SmoothQuant(),
        **{f"gptq{bits}": GPTQ(bits, group) for bits in (8, 4, 3, 2)},
    }


def format_of(method: QuantMethod) -> str:
    """compressed-tensors where it stores the method's numbers."""
    return "gptq" if method.scheme.bits == 3 else "compressed-tensors"


def decoded(folder: Path, method: QuantMethod) -> tuple[Any, str]:
    """The decoded model in fp32, and who decoded it."""
    if method.scheme.activations is not None or format_of(method) != "compressed-tensors":
        return decoded_model(folder), "fewbits"
    option = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=option).float().eval(), "transformers"


def forward_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of whole sequences."""
    found: torch.Tensor = model(ids).logits.float()
    return found


def written_logits(generator: Generator, ids: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """Of the tokens after PROMPT, each given the text before it; and why they took the model's own forward, or None."""
    rows, reason = [], None
    for text in ids.tolist():
        generation = Generation(PROMPT)
        first, step = generator._prompt(generation, text[:PROMPT], len(text) - PROMPT)
        rows.append(torch.stack([first.view(-1).clone(), *[step(token).view(-1).clone() for token in text[PROMPT:-1]]]))
        reason = reason or generation.short_way
    return torch.stack(rows).float(), reason


def distance(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Mean KL divergence in nats, the relative norm, and how often both find the same token likeliest."""
    ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
    return {
        "kl": float(f"{float((theirs.exp() * (theirs - ours)).sum(-1).mean()):.3g}"),
        "relative": float(f"{float((found - expected).norm() / expected.norm()):.3g}"),
        "same_token": round(float((found.argmax(-1) == expected.argmax(-1)).float().mean()), 4),
    }


@torch.inference_mode()
def compare(source: Path, folder: Path, method: QuantMethod, ids: torch.Tensor) -> dict[str, Any]:
    """One row's figures."""
    reference, decoder = decoded(folder, method)
    expected = forward_logits(reference, ids)
    in_bf16 = forward_logits(reference.bfloat16(), ids)
    del reference
    in_fp32 = forward_logits(fewbits.load(folder, dtype=torch.float32), ids)
    model = fewbits.load(folder, dtype=torch.bfloat16)
    found, (written, reason) = forward_logits(model, ids), written_logits(Generator(model), ids)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    return {
        "decoded_by": decoder,
        "forward": distance(found, expected),
        "written": distance(written, expected[:, PROMPT - 1 : -1]),
        "forward_in_fp32": distance(in_fp32, expected),
        "bf16_alone": distance(in_bf16, expected),
        "quantization": distance(expected, forward_logits(plain, ids)),
        "short_way": reason or "taken",
        "kernels": sorted({name for module in model.modules() if isinstance(module, fewbits.QuantLinear)
                           for name in module.kernels((1, TEXTS * TOKENS)).values()}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    text = options.text.read_text()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    further = tokenizer(text[len(text) // 2 :][: 20 * TEXTS * TOKENS])["input_ids"][: TEXTS * TOKENS]
    ids = torch.tensor(further).view(TEXTS, TOKENS)
    known = methods(options.group_size)
    for name in options.methods or known:
        method = known[name]
        with tempfile.TemporaryDirectory() as folder:
            calibration = Path(folder) / "text.txt"
            calibration.write_text(text[: len(text) // 2])
            fewbits.quantize(
                options.model, Path(folder) / "out", QuantConfig(method),
                calibration if method.needs_calibration else None,
                format=format_of(method), samples=SAMPLES, length=LENGTH, importance="none",
            )  # fmt: skip
            found = compare(options.model, Path(folder) / "out", method, ids)
        row = {"bench": "loaded_logits", "model": options.model.name, "method": name, "group_size": options.group_size}
        row |= {"tokens": TEXTS * TOKENS} | found
        print(json.dumps(row), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
