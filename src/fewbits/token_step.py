"""Token step: one token through a model of the usual kind of blocks as one program of compiled steps.

transformers spends most of a small model's time between the linears. Here the parts of every block (token_parts) become
steps of one program (kernels.team), which the threads go through without coming back to Python; only a linear that no
compiled kernel multiplies is called in between. Nothing is taken on trust: on every prompt, each block, the embedding
and the head must give what the model itself just gave for the prompt's last token; else the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fewbits.kernels import one_token as between
from fewbits.kernels import one_token_attention as attending
from fewbits.kernels.compiling import Array
from fewbits.kernels.few_tokens_run import few_tokens_bf16
from fewbits.kernels.one_token import bits_of
from fewbits.kernels.spec import Compiled, Run
from fewbits.kernels.team import Program, Work
from fewbits.linear import QuantLinear
from fewbits.skeleton import find_blocks
from fewbits.stacked import stacked
from fewbits.token_parts import Norm, Parts, norm_of, parts_of, rotation

# bf16 keeps 8 bits, and a block rounds some ten times on the way; a wrong structure is off by tens of percent.
TOLERANCE = 0.06
# Where activations are rounded to 8 bits, inputs that differ in their last bit fall on other codes: a block is then as
# good as the model's if it differs from that by no more than twice what such inputs make of itself. How much that is
# differs from draw to draw, so the most of several counts, within this limit, past which a wrong structure could hide:
# of 100 prompts of Gemma 3 270M in int8, two are beyond it, by up to 0.18, and go the model's way.
JITTERS, JITTER_DRAWS, JITTER_LIMIT = 2.0, 8, 0.15
ULP = 2.0**-7
# Channels of a gate worth handing out.
GATE_PIECE = 256

# A block of a program, or a call that is not compiled.
Item = Array | Callable[[], object]


@dataclass
class Seen:
    """What the model itself computed for a prompt's last token: each block's input and output, and the logits."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass(frozen=True)
class Update:
    """What a block leaves to be added to the residual: bf16 [width], normed first if there is a norm."""

    values: torch.Tensor
    norm: Norm | None


class Cache:
    """Keys and values of one block, bf16 [heads, capacity, width]."""

    def __init__(self, parts: Parts, capacity: int) -> None:
        heads = parts.attended[1].out_features // parts.head_width  # type: ignore[operator]
        self.keys, self.values = torch.zeros((2, int(heads), capacity, parts.head_width), dtype=torch.bfloat16)


class TokenStep:
    """One token at a time through a model whose cache it holds.

    capacity: how many positions the cache has.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        prefix, found = find_blocks(model)
        self._decoder = model.get_submodule(prefix.rpartition(".")[0])
        self._blocks = [parts_of(block) for block in found]
        self._caches = [Cache(parts, capacity) for parts in self._blocks]
        self.capacity = capacity
        # Addresses of all these are in the program.
        self._kept: list[object] = [self._blocks]
        self._rotations: dict[str | None, tuple[Array, Array]] = {}
        width = self._blocks[0].before_attention.weight.size
        self._x = np.zeros(width, np.float32)
        self._position = np.zeros(1, np.int64)
        self._hidden = _row(width)
        self._update = _row(width)
        self._mixed = _row(max(_outputs(parts.attended[:1]) for parts in self._blocks))
        self._scratch = torch.zeros(
            max(
                _outputs(parts.attended[:1]) // parts.head_width * (capacity + parts.head_width)
                for parts in self._blocks
            )
        )
        self._heads = _row(max(_outputs(parts.attended) for parts in self._blocks))
        self._both = _row(max(_outputs(parts.gated) for parts in self._blocks))
        self._gated = _row(max(_outputs(parts.gated[:1]) for parts in self._blocks))
        self._logits = torch.zeros(1, model.lm_head.out_features)
        self._items = [self._block(parts, cache) for parts, cache in zip(self._blocks, self._caches, strict=True)]
        final = norm_of(self._decoder.norm)
        self._kept.append(final)
        head = self._product([model.lm_head], self._hidden, self._logits)
        self._head = [self._add_norm(None, final), *head]
        items: list[Item] = []
        update = None
        for parts, block in zip(self._blocks, self._items, strict=True):
            items += [self._add_norm(update, parts.before_attention), *block]
            update = Update(self._update, parts.after_mlp)
        self._all = _joined([*items, self._add_norm(update, final), *head])

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return int(self._position[0])

    @position.setter
    def position(self, value: int) -> None:
        self._position[0] = value

    def adopt(self, cache: Any, length: int) -> None:
        """Take over the first `length` positions of the cache that the model filled."""
        for own, layer in zip(self._caches, cache.layers, strict=True):
            own.keys[:, :length].copy_(layer.keys[0, :, :length])
            own.values[:, :length].copy_(layer.values[0, :, :length])
        self.position = length

    def differs(self, token: int, seen: Seen, logits: torch.Tensor) -> str | None:
        """Where the token at the current position comes out unlike the model's own computation; None if nowhere."""
        embedded = self._embedded(token)
        if _missed(embedded, seen.inputs[0][0], 0 * embedded) > TOLERANCE:
            return "the embedding"
        for index, parts in enumerate(self._blocks):
            given = seen.inputs[index].float().numpy().reshape(-1)
            update = Update(self._update, parts.after_mlp)
            program = _joined(
                [self._add_norm(None, parts.before_attention), *self._items[index], self._add_norm(update, None)]
            )
            found = self._ran(program, given)
            missed = _missed(found, seen.outputs[index], given)
            if missed > TOLERANCE and missed > self._jitter(program, given, found):
                return f"block {index}"
        self._x[:] = seen.outputs[-1].float().numpy().reshape(-1)
        _run(_joined(self._head))
        mean = float(logits.mean())
        return "the head" if _missed(self._logits[0].numpy(), logits, mean) > TOLERANCE else None

    def _ran(self, program: list[Program | Callable[[], object]], given: Array) -> Array:
        self._x[:] = given
        _run(program)
        return self._x.copy()

    def _jitter(self, program: list[Program | Callable[[], object]], given: Array, found: Array) -> float:
        """How far from the model's a block's update may be for rounding alone."""
        random, most = np.random.default_rng(0), 0.0
        for _ in range(JITTER_DRAWS):
            signs = random.integers(0, 2, given.size) * 2 - 1
            nudged = given * (1 + signs.astype(np.float32) * np.float32(ULP / 4))
            moved = (self._ran(program, nudged) - nudged) - (found - given)
            most = max(most, float(np.linalg.norm(moved) / np.linalg.norm(found - given)))
        return min(JITTERS * most, JITTER_LIMIT)

    def __call__(self, token: int) -> torch.Tensor:
        """Logits [vocabulary] after one more token; the next call writes over them."""
        self._x[:] = self._embedded(token)
        _run(self._all)
        self._position += 1
        return self._logits[0]

    def _embedded(self, token: int) -> Array:
        values: Array = self._decoder.embed_tokens(torch.tensor([token])).float().numpy()[0]
        return values

    def _block(self, parts: Parts, cache: Cache) -> list[Item]:
        """One block after its first norm, but for adding its last update, which is left to what comes next."""
        channels = _outputs(parts.gated[:1])
        both, gated = self._both[:, : 2 * channels], self._gated[:, :channels]
        gate = Work(between.between(parts.gate), {}, GATE_PIECE).step(channels, {
            between.GATE_AT: both.data_ptr(), between.UP_AT: both[:, channels:].data_ptr(),
            between.GATED_AT: gated.data_ptr(),
        })  # fmt: skip
        return [
            *self._attention(parts, cache),
            self._add_norm(Update(self._update, parts.after_attention), parts.before_mlp),
            *self._product(parts.gated, self._hidden, both),
            gate,
            *self._product([parts.down], gated, self._update),
        ]

    def _attention(self, parts: Parts, cache: Cache) -> list[Item]:
        """From the normed input to the update."""
        width, (queries, keys) = parts.head_width, (_outputs(parts.attended[:1]), _outputs(parts.attended[1:2]))
        heads, mixed = self._heads[:, : _outputs(parts.attended)], self._mixed[:, :queries]
        if parts.kind not in self._rotations:
            self._rotations[parts.kind] = rotation(self._decoder.rotary_emb, parts.kind, self.capacity)
        cosines, sines = self._rotations[parts.kind]
        shared = {
            between.HEAD_WIDTH: width, between.COSINES_AT: cosines.ctypes.data, between.SINES_AT: sines.ctypes.data,
            between.ROTATED: cosines.shape[1], between.KEYS_AT: cache.keys.data_ptr(),
            between.VALUES_AT: cache.values.data_ptr(), between.CAPACITY: self.capacity,
            between.POSITION_AT: self._position.ctypes.data,
        }  # fmt: skip
        remember = Work(between.between("remember"), shared).step(keys // width, {
            between.HEADS_AT: heads[:, queries:].data_ptr(),
            between.NEW_VALUES_AT: heads[:, queries + keys :].data_ptr(),
            **_norm(parts.key_norm, between.NORM_AT, between.NORM_EPS),
        })  # fmt: skip
        attend = Work(attending.attention(), shared).step(queries // width, {
            between.HEADS_AT: heads.data_ptr(), **_norm(parts.query_norm, between.NORM_AT, between.NORM_EPS),
            attending.SCALING: bits_of(parts.scaling), attending.SHARED: queries // keys,
            attending.WINDOW: parts.window or 0, attending.SCRATCH_AT: self._scratch.data_ptr(),
            attending.OUT_AT: mixed.data_ptr(),
        })  # fmt: skip
        return [
            *self._product(parts.attended, self._hidden, heads),
            remember,
            attend,
            *self._product([parts.mixing], mixed, self._update),
        ]

    def _add_norm(self, update: Update | None, norm: Norm | None) -> Array:
        """Add an update to the residual, and norm that for what comes next."""
        fields = {
            between.X_AT: self._x.ctypes.data, between.WIDTH: self._x.size,
            **_norm(norm, between.WEIGHT_AT, between.EPS),
            between.OUT_AT: 0 if norm is None else self._hidden.data_ptr(),
        }  # fmt: skip
        if update is not None:
            fields[between.UPDATE_AT] = update.values.data_ptr()
            fields |= _norm(update.norm, between.UPDATE_WEIGHT_AT, between.UPDATE_EPS)
        return Work(between.between("add_norm"), {}).step(1, fields)

    def _product(self, linears: Sequence[Any], x: torch.Tensor, out: torch.Tensor) -> list[Item]:
        """What makes the outputs, side by side, of linears that share their input: one product where they are alike."""
        run = _ready(linears)
        if run is None:
            edges = list(accumulate((linear.out_features for linear in linears), initial=0))
            spans = zip(linears, pairwise(edges), strict=True)
            return [item for linear, (start, stop) in spans for item in self._product([linear], x, out[:, start:stop])]
        if not isinstance(run, Compiled):
            return [lambda: out.copy_(run(x))]
        steps = run.steps(x, out)
        self._kept.append((run, x, out, steps))
        return list(steps.blocks)


def _ready(linears: Sequence[nn.Module]) -> Run | None:
    """A product of them all; None if there is none for several at once."""
    if all(isinstance(linear, QuantLinear) and linear.input_order is None for linear in linears):
        joined = stacked(linears, torch.bfloat16)
        if joined is not None:
            return joined
    if len(linears) > 1:
        return None
    linear: Any = linears[0]
    if isinstance(linear, nn.Linear) and linear.weight.dtype == torch.bfloat16:
        return few_tokens_bf16(linear.weight, linear.bias)
    forward: Run = linear.forward
    return forward


def _joined(items: Sequence[Item]) -> list[Program | Callable[[], object]]:
    """Neighbouring steps as one program."""
    joined: list[Program | Callable[[], object]] = []
    steps: list[Array] = []
    for item in items:
        if isinstance(item, np.ndarray):
            steps.append(item)
            continue
        joined += [Program(steps)] if steps else []
        joined.append(item)
        steps = []
    return [*joined, Program(steps)] if steps else joined


def _run(joined: Sequence[Program | Callable[[], object]]) -> None:
    threads = torch.get_num_threads()
    for part in joined:
        if isinstance(part, Program):
            part.run(threads)
        else:
            part()


def _row(size: int) -> torch.Tensor:
    return torch.zeros(1, size, dtype=torch.bfloat16)


def _outputs(linears: Sequence[Any]) -> int:
    return sum(int(linear.out_features) for linear in linears)


def _norm(norm: Norm | None, weight_at: int, eps: int) -> dict[int, int]:
    """A norm's fields."""
    return {} if norm is None else {weight_at: norm.weight.ctypes.data, eps: bits_of(norm.eps)}


def _missed(found: Array, expected: torch.Tensor, given: Array | float) -> float:
    """How much of what was added to `given` is not the same, apart from the rounding of sums to bf16."""
    wanted = expected.float().numpy().reshape(-1)
    beyond = np.maximum(np.abs(found - wanted) - ULP * np.abs(wanted), 0)
    return math.sqrt(float((beyond**2).sum())) / max(float(np.linalg.norm(wanted - given)), 1e-6)
