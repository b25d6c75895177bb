"""Pass memory: what calibration takes, estimated from shapes: a block, its probe, its statistics, states of all tokens.

The peak is the largest of what lies in memory together at one time. Held against eight runs of two models and a made-up
one of width 3072 (bench/results: transforms, gptq, calibrated_memory) it is 0.8 to 1.3 times what was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.coupled_runs import gram_numbers
from fewbits.layers import LinearLayer, block_index
from fewbits.layout import TensorEntry
from fewbits.methods import QuantMethod

# Interpreter, torch, transformers, compiled kernels and what small products need on the way.
PROCESS_BYTES = 680 * 2**20
# What large products need on the way, and what the allocator holds.
OVERHEAD = 1.4
# Importance computes so many logits at a time, in 16 MB of bf16; as fp32 and fp64 where there is no kernel for those.
LOGITS = 1 << 23
# Hidden states that it keeps in memory before a file takes them, which costs no time that could be measured.
MEMORY_LIMIT = 1 << 28
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class CalibrationSize:
    """How much text, and whether its tokens are weighed: what memory depends on beside the model."""

    samples: int
    length: int
    importance: bool

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * self.length


def pass_bytes(
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    solved: Iterable[tuple[LinearLayer, QuantMethod]],
    size: CalibrationSize,
) -> int:
    """Peak bytes of a calibrated pass.

    Args:
        tensors, config: of the source. solved: the layers that calibration solves, with their methods.
    """
    solved = list(solved)
    blocks: dict[int, int] = {}
    outside = [0]
    for name, entry in tensors.items():
        block, parameters = block_index(name), _parameters(entry)
        if block is None:
            outside.append(parameters)
        else:
            blocks[block] = blocks.get(block, 0) + parameters
    block, widest = max(blocks.values(), default=0), max(layer.in_features for layer, _ in solved)
    stream = size.tokens * _hidden_size(config, widest) * BF16
    states = 2 * stream + size.tokens * widest * BF16
    rows = max(layer.out_features * layer.in_features for layer, _ in solved)
    probing = block * (BF16 + FP32) + stream if any(method.transform is not None for _, method in solved) else 0
    solving = block * BF16 + states + 2 * widest**2 * FP32 + 2 * rows * FP32
    starting = max(outside) * BF16 + stream
    weighing = 0
    if size.importance:
        kept = len(blocks) * stream if len(blocks) * stream <= MEMORY_LIMIT else 0
        weighing = block * BF16 + kept + max(outside) * BF16 + 5 * LOGITS * FP32 + _output_gram_bytes(solved)
    return PROCESS_BYTES + max(starting, weighing, int(OVERHEAD * max(probing, solving)))


def _output_gram_bytes(solved: Iterable[tuple[LinearLayer, QuantMethod]]) -> int:
    """Of the block that has the most."""
    by_block: dict[int | None, int] = {}
    for layer, method in solved:
        if method.solver_name == "gptq":
            by_block[layer.block] = by_block.get(layer.block, 0) + FP32 * gram_numbers(layer.out_features)
    return max(by_block.values(), default=0)


def _parameters(entry: TensorEntry) -> int:
    count = 1
    for length in entry.shape:
        count *= length
    return count


def _hidden_size(config: Mapping[str, Any], otherwise: int) -> int:
    text = config.get("text_config")
    for place in (text if isinstance(text, dict) else {}, config):
        for key in ("hidden_size", "n_embd", "d_model"):
            if isinstance(place.get(key), int):
                return int(place[key])
    return otherwise
