"""How much llm-compressor's SmoothQuant changes a model before anything is rounded; an environment of its own has it.

Usage: python bench/peers/llm_compressor_smoothing.py MODEL IDS.npy

Prints one JSON line: max |Δ logits| / max |logits| in fp32, or what it said when it refused.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    """Smooth, compare, print."""
    folder, file = sys.argv[1:]
    ids = np.load(file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(torch.from_numpy(ids)).logits
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
    # It asks for one, though the rows are token ids already.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    try:
        oneshot(
            model=model, processor=tokenizer, recipe=[SmoothQuantModifier(smoothing_strength=0.5)], dataset=rows,
            num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
        )  # fmt: skip
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        print(json.dumps({"refused": f"{type(error).__name__}: {error}"[:200]}))
        return
    with torch.no_grad():
        after = model(torch.from_numpy(ids)).logits
    print(json.dumps({"change": float((after - before).abs().max() / before.abs().max())}))


if __name__ == "__main__":
    main()
