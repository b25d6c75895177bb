"""One run of llm-compressor, in an environment of its own: pip install llmcompressor==0.14.0.1.

Usage: python bench/peers/llm_compressor.py MODEL OUT METHOD --ids IDS.npy [--group-size 64] [--symmetric]

METHOD: int4, int8, fp8 (no data), gptq, awq, smoothquant. IDS: token ids int64 [samples, length], the same for all
sides. Prints one JSON line: seconds of quantizing and of saving, peak resident bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, group_size: int, symmetric: bool, smoothing: float) -> Any:
    """The modifiers of one method, embeddings and head left alone."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group_size, observer="minmax"
    )
    four_bits = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "int4":
        return QuantizationModifier(ignore=["lm_head"], config_groups=four_bits)
    if method == "int8":
        return QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    if method == "fp8":
        return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    if method == "gptq":
        return GPTQModifier(ignore=["lm_head"], config_groups=four_bits)
    if method == "awq":
        from llmcompressor.modifiers.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # Its cache pins memory for a GPU, whether there is one or not.
        IntermediatesCache._pin_intermediate = staticmethod(lambda value: value)
        return AWQModifier(ignore=["lm_head"], config_groups=four_bits)
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    return [
        SmoothQuantModifier(smoothing_strength=smoothing),
        QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ]


def main() -> None:
    """Quantize, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=["int4", "int8", "fp8", "gptq", "awq", "smoothquant"])
    parser.add_argument("--ids")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--smoothing", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    options: dict[str, Any] = {}
    if args.method in ("gptq", "awq", "smoothquant"):
        ids = np.load(args.ids)
        rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
        options = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(ids),
            "max_seq_length": ids.shape[1],
        }
    start = time.perf_counter()
    oneshot(model=model, recipe=recipe(args.method, args.group_size, args.symmetric, args.smoothing), **options)
    quantized = time.perf_counter()
    model.save_pretrained(args.out, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    row = {
        "tool": "llm-compressor",
        "method": args.method,
        "quantize_s": round(quantized - start, 1),
        "save_s": round(time.perf_counter() - quantized, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
