"""Find the linear layers of a checkpoint from tensor names, shapes and the config alone; no model class is known here.

A linear's weight is a two-dimensional float tensor called `….weight`. What else looks like that is told apart by words
that authors of models agree on (embed, router, vision, …) together with what shapes and config say.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbits.layout import WEIGHT_DTYPES
from fewbits.notes import Note

Shape = tuple[int, ...]
Headers = Mapping[str, tuple[Shape, str]]

# Ten digits and more are no index, and Python refuses to read very long numbers.
NUMBER = re.compile(r"[0-9]{1,9}")
BLOCK_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|$)")
EMBEDDING_LEAF = re.compile(r"(^|_)(embed|embeds|embedding|embeddings|embd)(_|$)|^(wte|wpe|shared|codebook)$")
# A projection of embeddings is a linear; `embed_out` is what some models call their head.
NO_EMBEDDING_LEAF = re.compile(r"proj|mapping|linear|dense|^embed_out$")
POSITION_BIAS_LEAF = re.compile(r"relative.*(bias|position)|position_bias|(^|_)positions?$")
HEAD_LEAVES = frozenset(
    {"lm_head", "embed_out", "output", "score", "head", "classifier", "qa_outputs", "output_layer", "cls"}
)
ROUTER_LEAF = re.compile(r"^gate$|_gate$|router|^wg$")
OTHER_MODALITIES = {"vision": ("vision", "visual", "image"), "audio": ("audio", "speech")}
CONNECTOR_WORDS = ("projector", "connector", "aligner")
# Engines run the members of a group as one matrix product, so they must be quantized alike.
FUSED_LEAVES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# A weight that is larger than its vocabulary is padded by less than this.
LARGEST_PADDING = 512
# Smaller odd tensors (tables, biases) are not worth a Note.
SMALLEST_NOTED = 2**14
CARRIED = "carried over unquantized"


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a checkpoint.

    name: the module. tensor: its weight's name in the file. dtype: as safetensors names it.
    transposed: stored as [in, out] (Conv1D). block: number of the decoder block it is in, None outside of all.
    kind: last part of the name ("q_proj"). default_skip: why it is left alone unless it is named, else None.
    """

    name: str
    tensor: str
    out_features: int
    in_features: int
    dtype: str
    transposed: bool = False
    block: int | None = None
    kind: str = ""
    default_skip: str | None = None


def block_index(name: str) -> int | None:
    """The number of the block a tensor or module belongs to: the first number in its path.

    >>> block_index("model.layers.7.mlp.experts.3.w1.weight")
    7
    """
    found = BLOCK_NUMBER.search(name)
    return None if found is None else int(found[1])


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part), "") if NUMBER.fullmatch(part) else (1, 0, part) for part in name.split("."))


def find_layers(tensors: Headers, config: Mapping[str, Any]) -> tuple[list[LinearLayer], list[Note]]:
    """Find the linear layers among a checkpoint's tensors.

    Args:
        tensors: (shape, safetensors dtype) by tensor name.
        config: the checkpoint's config.json.

    Returns:
        The layers in natural order (heads, routers and towers among them, with `default_skip` set), and a Note for each
        large weight that is no linear's.
    """
    facts = _Facts(tensors, config)
    layers: list[LinearLayer] = []
    notes: list[Note] = []
    for name in sorted(tensors, key=natural_order):
        shape, dtype = tensors[name]
        if dtype not in WEIGHT_DTYPES or len(shape) < 2:
            continue
        why_not = facts.why_no_linear(name, shape)
        if why_not is None:
            layers.append(facts.layer(name, shape, dtype))
        elif why_not:
            notes.append(Note(name.removesuffix(".weight"), CARRIED, why_not))
    return layers, notes


def fusion_groups(layers: Iterable[LinearLayer]) -> list[tuple[str, ...]]:
    """Names of the layers that engines fuse: q, k and v of one attention, gate and up of one MLP or expert."""
    members: dict[str, dict[str, str]] = {}
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        members.setdefault(parent, {})[layer.kind] = layer.name
    groups = []
    for kinds in members.values():
        for leaves in FUSED_LEAVES:
            present = tuple(kinds[leaf] for leaf in leaves if leaf in kinds)
            if len(present) > 1:
                groups.append(present)
    return groups


class _Facts:
    """What the config and all tensors together say about any one of them."""

    def __init__(self, tensors: Headers, config: Mapping[str, Any]) -> None:
        self._tensors = tensors
        values = list(_values(config))
        self._vocabularies = {value for key, value in values if key == "vocab_size"}
        self._expert_counts = {value for key, value in values if "expert" in key and value > 1}
        self._tied = config.get("tie_word_embeddings") is True
        self._modalities = {
            modality: words
            for modality, words in OTHER_MODALITIES.items()
            if any(key.startswith(words) and key.endswith("_config") for key in _keys(config))
        }
        self._with_experts = {name[: name.index(".experts.")] for name in tensors if ".experts." in name}
        self._transposed_families = _transposed_families(tensors)

    def why_no_linear(self, name: str, shape: Shape) -> str | None:
        """None for a linear's weight; else why it is none, "" where that needs no Note."""
        path = name.split(".")
        leaf = path[-2] if len(path) > 1 else ""
        if any("lora_" in part for part in path):
            return "adapter weights stay as they are: merge them into the model first"
        if len(shape) > 2 and ("expert" in name or (shape[0] in self._expert_counts and min(shape) > 1)):
            return f"{shape[0]} experts fused into one tensor {list(shape)}"
        if path[-1] != "weight":
            noted = math.prod(shape) >= SMALLEST_NOTED and path[-1] != "bias"
            return f"not named like a linear's weight, shape {list(shape)}" if noted else ""
        if len(shape) > 2:
            return f"convolution {list(shape)}"
        if 0 in shape or POSITION_BIAS_LEAF.search(leaf) or self._is_embedding(leaf):
            return ""
        return None

    def _is_embedding(self, leaf: str) -> bool:
        return bool(EMBEDDING_LEAF.search(leaf)) and not NO_EMBEDDING_LEAF.search(leaf)

    def layer(self, tensor: str, shape: Shape, dtype: str) -> LinearLayer:
        """Describe the linear whose weight is `tensor`."""
        name = tensor.removesuffix(".weight")
        vote = _transposed_vote(self._tensors, tensor)
        transposed = vote if vote is not None else _family(tensor) in self._transposed_families
        out_features, in_features = reversed(shape) if transposed else shape
        return LinearLayer(
            name=name,
            tensor=tensor,
            out_features=out_features,
            in_features=in_features,
            dtype=dtype,
            transposed=transposed,
            block=block_index(tensor),
            kind=name.rpartition(".")[2],
            default_skip=self._default_skip(name, out_features),
        )

    def _default_skip(self, name: str, out_features: int) -> str | None:
        path = name.split(".")
        for modality, words in self._modalities.items():
            if any(word in part for part in path for word in words):
                return f"{modality} tower"
        if self._modalities and any(word in part for part in path for word in CONNECTOR_WORDS):
            return "connector between modalities"
        signs = (block_index(name) is None, path[-1] in HEAD_LEAVES, self._is_vocabulary(out_features))
        # Two of three: models with several predicted tokens have a head inside a block.
        if sum(signs) >= 2:
            return "output head, tied to the embeddings" if self._tied else "output head"
        return "expert router" if self._is_router(path, out_features) else None

    def _is_vocabulary(self, rows: int) -> bool:
        return any(
            rows == size or (size >= LARGEST_PADDING and 0 < rows - size < LARGEST_PADDING)
            for size in self._vocabularies
        )

    def _is_router(self, path: Sequence[str], rows: int) -> bool:
        if not any(ROUTER_LEAF.search(part) for part in path[-2:]):
            return False
        return rows == 1 or rows in self._expert_counts or ".".join(path[:-1]) in self._with_experts


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number in the config with its key, nested configs included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _values(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of every nested object."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield key
            yield from _keys(value)


def _family(tensor: str) -> str:
    """What comes before the block number: layers of one stack store their weights alike."""
    number = BLOCK_NUMBER.search(tensor)
    return tensor if number is None else tensor[: number.start()]


def _transposed_vote(tensors: Headers, tensor: str) -> bool | None:
    """Whether the bias shows the weight to be [in, out]; None where it cannot tell."""
    bias = tensors.get(tensor.removesuffix("weight") + "bias")
    rows, columns = tensors[tensor][0]
    if bias is None or len(bias[0]) != 1 or rows == columns or bias[0][0] not in (rows, columns):
        return None
    return bias[0][0] == columns


def _transposed_families(tensors: Headers) -> set[str]:
    """Stacks whose biases say [in, out] more often than not; they decide for square weights."""
    votes: Counter[str] = Counter()
    for name, (shape, _) in tensors.items():
        if name.endswith(".weight") and len(shape) == 2:
            vote = _transposed_vote(tensors, name)
            if vote is not None:
                votes[_family(name)] += 1 if vote else -1
    return {family for family, balance in votes.items() if balance > 0}
