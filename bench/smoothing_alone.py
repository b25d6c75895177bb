"""What smoothing alone does to logits, before anything is rounded: it should do nothing.

Usage: python bench/smoothing_alone.py [--peer PYTHON] [--models llama gemma2 …]

Tiny random models in fp32, SmoothQuant with α = 0.5 on both sides; a row gives max |Δ logits| / max |logits| for each.
PYTHON has llm-compressor 0.14 (see peers/llm_compressor_smoothing.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from fewbits.absorbing import FileEdits, FoldPlace, absorb
from fewbits.calibrate import run_blocks
from fewbits.checkpoints.reader import TensorReader, open_checkpoint
from fewbits.layers import LinearLayer, find_layers
from fewbits.methods import SmoothQuant
from fewbits.skeleton import Skeleton, build_model
from fewbits.statistics import Statistics
from fewbits.transforms.problem import ScaleProblem
from fewbits.transforms.smoothquant import find_scales
from fewbits.transforms.ties import Ties

RESULTS = Path(__file__).parent / "results" / "smoothing_alone.jsonl"
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "glm4_moe": (
        "Glm4MoeConfig",
        EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                   "topk_group": 1, "head_dim": 16},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 4, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {}),
}  # fmt: skip


class Smoothing:
    """Scales whatever a fold serves by SmoothQuant's formula, and rounds nothing."""

    def __init__(self, edits: FileEdits) -> None:
        self.edits, self.count = edits, 0

    def wants(self, layers: Sequence[LinearLayer]) -> bool:
        """Everything."""
        return True

    def tokens_for_gram(self, layers: Sequence[LinearLayer]) -> int | None:
        """All."""
        return None

    def solve(
        self,
        layers: Sequence[LinearLayer],
        weights: Sequence[torch.Tensor],
        statistics: Statistics,
        place: FoldPlace,
        sample: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """Scale what the files will hold; the forward goes on as it was."""

        def unrounded(rows: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
            return rows

        stacked = torch.cat([weight.float() for weight in weights])
        ties = Ties(place.fold.rows)
        problem = ScaleProblem(stacked, statistics, ties, sample, SmoothQuant(0.5), unrounded, unrounded)
        s = absorb(place, find_scales(problem), self.edits).inputs
        for layer in layers:
            stored = self.edits.stored(layer.tensor)
            self.edits.tensors[layer.tensor] = stored * (s[:, None] if layer.transposed else s)
        self.count += 1
        return [None] * len(layers)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the checkpoint in fp32."""
    with torch.no_grad():
        found: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return found


def ours(folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Smooth the checkpoint in place and compare."""
    before = logits(folder, ids)
    checkpoint = open_checkpoint(folder)
    found, _ = find_layers(checkpoint.headers, checkpoint.config)
    layers = [layer for layer in found if layer.default_skip is None and layer.block is not None]
    with TensorReader(checkpoint) as reader:
        smoothing = Smoothing(FileEdits(reader.read, {}, {}))
        skeleton = Skeleton(build_model(folder, torch.float32), checkpoint, reader)
        for _ in run_blocks(
            skeleton, ids, layers, lambda layers, weights, statistics: [None] * len(layers), folding=smoothing
        ):
            pass
        tensors = {name: smoothing.edits.stored(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {"change": float((logits(folder, ids) - before).abs().max() / before.abs().max()), "folds": smoothing.count}


def main() -> None:
    """Make each model, run both sides, append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    for name in args.models:
        class_name, options = MODELS[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder, file = Path(scratch) / "model", Path(scratch) / "ids.npy"
            torch.manual_seed(0)
            config = getattr(transformers, class_name)(**(SIZES | options))
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder)
            ids = torch.randint(3, 256, (8, 64))
            np.save(file, ids.numpy())
            row: dict[str, Any] = {"bench": "smoothing_alone", "model": name}
            if args.peer:
                script = Path(__file__).parent / "peers" / "llm_compressor_smoothing.py"
                done = subprocess.run(
                    [args.peer, str(script), str(folder), str(file)], capture_output=True, text=True, check=False
                )
                found = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""
                row["llm-compressor"] = json.loads(found) if found else {"failed": done.stderr[-200:]}
            row["fewbits"] = ours(folder, ids)
        print(json.dumps(row), flush=True)
        with RESULTS.open("a") as results:
            results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
