"""One run of GPTQModel's GPTQ, in an environment of its own: pip install --no-deps gptqmodel==7.7.0, then the packages
that it imports.

Usage: python bench/peers/gptqmodel_model.py MODEL OUT gptq --ids IDS.npy [--group-size 64] [--symmetric]

IDS: token ids int64 [samples, length], the same for all sides. Prints one JSON line: seconds of quantizing and of
saving, peak resident bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

# With fewer processors its pools of threads refuse to start; torch has as many threads as --threads says.
os.cpu_count = lambda: 8

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def main() -> None:
    """Quantize, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=["gptq"])
    parser.add_argument("--ids")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = GPTQModel.load(args.model, QuantizeConfig(bits=4, group_size=args.group_size, sym=args.symmetric))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in np.load(args.ids).tolist()]
    start = time.perf_counter()
    model.quantize(rows, batch_size=1)
    quantized = time.perf_counter()
    model.save(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    row = {
        "tool": "GPTQModel",
        "method": args.method,
        "quantize_s": round(quantized - start, 1),
        "save_s": round(time.perf_counter() - quantized, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
