"""Importance: how much the loss cares about each linear's output at each token, and which outputs it feels alike.

One forward and one backward of the original model, streamed block by block. Labels are drawn from the model's own
predictions, so the mean square of the gradient at a linear's output estimates the Fisher information there: a small
error e of the output costs about wₜ‖e‖² of KL divergence, wₜ the mean square of the gradient at token t.
Source: GuidedQuant, arXiv 2505.07004. Differs from it: one group of outputs, sampled labels.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from fewbits.allocator import return_free_memory
from fewbits.block_inputs import BlockInputs
from fewbits.drawn_head import DrawnHead
from fewbits.errors import CalibrationError
from fewbits.layers import LinearLayer
from fewbits.matrix_products import KeptWeight
from fewbits.norms import row_lengths
from fewbits.output_grams import OutputGram, is_taken
from fewbits.pass_memory import MEMORY_LIMIT
from fewbits.skeleton import Part, Skeleton
from fewbits.suspended import MicroBatch, SuspendedForward, hidden_of, with_hidden
from fewbits.watching import Product, Slot, watch

# Tokens that go through the head together: of its rows each is prepared once for all of them.
HEAD_TOKENS = 8192

# Called with a stage's name and how many of how many blocks are done.
Watcher = Callable[[str, int, int], None]
# Called with a block's number and the output Grams of its layers.
GramKeeper = Callable[[int, dict[str, torch.Tensor]], None]


@dataclass(frozen=True)
class Importance:
    """One number per linear and token: the mean square of the loss's gradient at its output.

    weights: by layer name, fp32 [tokens], sample after sample; experts, which see a choice of the tokens, have none.
    loss: mean negative log-probability of the drawn labels, an entropy estimate. elapsed_s: seconds by stage.
    """

    weights: dict[str, torch.Tensor]
    loss: float
    elapsed_s: dict[str, float] = field(default_factory=dict)


def measure_importance(
    skeleton: Skeleton,
    ids: torch.Tensor,
    layers: Sequence[LinearLayer],
    *,
    micro_batch: int,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    folder: Path | None = None,
    watcher: Watcher | None = None,
    coupled: Collection[str] = (),
    keep_grams: GramKeeper = lambda block, grams: None,
) -> Importance:
    """Measure the importance of every token to the given linears.

    Args:
        ids: token ids [samples, length]. micro_batch: samples run together.
        seed: of the labels that are drawn.
        memory_limit: bytes of hidden states in memory; past them they go to a file in `folder`, and where the disk is
            too small for all, the inputs of some blocks are computed again.
        coupled: names of the layers whose output Grams are wanted.
        keep_grams: is given those of each block, by name, as `output_grams.split` takes them; the last block first.
    """
    with torch.no_grad():
        run = _Run(skeleton, ids, layers, micro_batch, seed, watcher or (lambda stage, done, total: None), coupled)
        nbytes = ids.numel() * skeleton.hidden_bytes
        free = shutil.disk_usage(folder or tempfile.gettempdir()).free
        with BlockInputs(len(skeleton.blocks), nbytes, memory_limit, free // 2, folder) as inputs:
            return run.run(inputs, keep_grams)


class _Run:
    def __init__(
        self,
        skeleton: Skeleton,
        ids: torch.Tensor,
        layers: Sequence[LinearLayer],
        micro_batch: int,
        seed: int,
        watcher: Watcher,
        coupled: Collection[str],
    ) -> None:
        self._skeleton, self._watcher, self._coupled = skeleton, watcher, frozenset(coupled)
        self._forward = SuspendedForward(skeleton, ids, micro_batch, after_last_block=self._begin_tail)
        self._layers = {layer.tensor: layer for layer in layers}
        self._head = DrawnHead(skeleton, seed)
        self._tails: dict[int, torch.Tensor] = {}
        self._arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._gradients: list[torch.Tensor] = []
        self._weights = {layer.name: torch.zeros(ids.numel()) for layer in layers}
        self._tokens = ids.numel()

    def run(self, inputs: BlockInputs, keep_grams: GramKeeper) -> Importance:
        began = time.perf_counter()
        with self._forward:
            self._run_forward(inputs)
        forwarded = time.perf_counter()
        self._run_backward(inputs, keep_grams)
        measured = {name: weights for name, weights in self._weights.items() if bool((weights > 0).any())}
        elapsed_s = {"forward": forwarded - began - self._head_s, "head": self._head_s}
        elapsed_s["backward"] = time.perf_counter() - forwarded
        return Importance(measured, self._head.loss / self._tokens, elapsed_s)

    def _run_forward(self, inputs: BlockInputs) -> None:
        self._skeleton.materialize_rest()
        self._forward.start()
        self._skeleton.release_embeddings()
        last = len(self._skeleton.blocks) - 1
        for index in range(last):
            with self._skeleton.materialized(index) as block:
                watch(block, _KeptWeights())
                for micro_batch in self._forward.micro_batches:
                    self._note_entry(inputs, index, micro_batch)
                    self._forward.resume(micro_batch)
            self._watcher("forward", index + 1, last + 1)
        self._head_s = 0.0
        # What the blocks' micro-batches took turns in makes room for the head.
        return_free_memory()
        self._skeleton.materialize_rest(head=True)
        with self._skeleton.materialized(last) as block:
            watch(block, _KeptWeights())
            for together in self._together():
                for micro_batch in together:
                    self._note_entry(inputs, last, micro_batch)
                    # What requires no gradient leaves no graph, so only the tail behind the last block does.
                    with torch.enable_grad():
                        self._forward.resume(micro_batch)
                before = time.perf_counter()
                self._gradients += self._through_head(together)
                self._head_s += time.perf_counter() - before
        self._skeleton.release_rest()
        return_free_memory()
        self._watcher("forward", last + 1, last + 1)

    def _note_entry(self, inputs: BlockInputs, index: int, micro_batch: MicroBatch) -> None:
        self._forward.check_waiting(micro_batch, index)
        self._arguments[index, micro_batch.index] = _with_first_tensor(micro_batch.arguments, None)
        if inputs.wants(index):
            inputs.keep(index, micro_batch.index, micro_batch.hidden)

    def _begin_tail(self, micro_batch: MicroBatch, output: Any) -> Any:
        """Cut the graph behind the last block: what follows (a norm, as a rule) is differentiated down to here."""
        tail = hidden_of(output).detach().requires_grad_()
        self._tails[micro_batch.index] = tail
        return with_hidden(output, tail)

    def _together(self) -> Iterator[list[MicroBatch]]:
        """Micro-batches that go through the head together."""
        some = list(self._forward.micro_batches)
        count = max(1, HEAD_TOKENS // max(1, some[0].ids.numel()))
        for start in range(0, len(some), count):
            yield some[start : start + count]

    def _through_head(self, micro_batches: Sequence[MicroBatch]) -> Iterator[torch.Tensor]:
        """The loss's gradients behind the last block, one after the other."""
        results = [cast(torch.Tensor, micro_batch.result) for micro_batch in micro_batches]
        rows = torch.cat([result.detach().flatten(0, -2) for result in results])
        first = micro_batches[0]
        gradients = self._head.gradient(rows, first.first_token, first.result_type)
        parts = torch.split(gradients, [result.shape[:-1].numel() for result in results])
        for micro_batch, result, gradient in zip(micro_batches, results, parts, strict=True):
            micro_batch.result = None
            (behind,) = torch.autograd.grad(result, self._tails.pop(micro_batch.index), gradient.view_as(result))
            yield behind

    def _run_backward(self, inputs: BlockInputs, keep_grams: GramKeeper) -> None:
        count = len(self._skeleton.blocks)
        for index in reversed(range(count)):
            if not inputs.has(index):
                self._compute_again(inputs, index)
            with self._skeleton.materialized(index) as block:
                seen = _Gradients(self._parts(index), self._weights, self._coupled)
                for micro_batch in self._forward.micro_batches:
                    hidden = inputs.take(index, micro_batch.index).to(self._skeleton.device)
                    arguments = self._arguments.pop((index, micro_batch.index))
                    watch(block, seen.recorder(micro_batch))
                    with torch.enable_grad():
                        hidden = hidden.requires_grad_()
                        args, kwargs = _with_first_tensor(arguments, hidden, placeholder=True)
                        output = hidden_of(block(*args, **kwargs))
                    number = micro_batch.index
                    (self._gradients[number],) = torch.autograd.grad(output, hidden, self._gradients[number])
                    self._check_finite(index, self._gradients[number])
            keep_grams(index, {name: gram.finish() for name, gram in seen.output_grams.items()})
            self._watcher("backward", count - index, count)
        # Gradients came and went with the graphs of micro-batches, and left holes in the heap.
        self._gradients.clear()
        return_free_memory()

    def _compute_again(self, inputs: BlockInputs, index: int) -> None:
        """Run forward from the nearest kept block, keeping what enters the blocks up to `index`."""
        start = next(block for block in range(index, -1, -1) if inputs.has(block))
        for block_index in range(start, index):
            with self._skeleton.materialized(block_index) as block:
                watch(block, _KeptWeights())
                for micro_batch in self._forward.micro_batches:
                    hidden = inputs.look(block_index, micro_batch.index).to(self._skeleton.device)
                    arguments = self._arguments[block_index, micro_batch.index]
                    args, kwargs = _with_first_tensor(arguments, hidden, placeholder=True)
                    inputs.keep(block_index + 1, micro_batch.index, hidden_of(block(*args, **kwargs)))

    def _parts(self, index: int) -> dict[str, list[tuple[Part, str]]]:
        """The wanted linears of a block by parameter; slices of experts aside."""
        found: dict[str, list[tuple[Part, str]]] = {}
        for parameter, parts in self._skeleton.parts(index).items():
            for part in parts:
                if part.tensor in self._layers and part.expert is None:
                    found.setdefault(parameter, []).append((part, self._layers[part.tensor].name))
        return found

    def _check_finite(self, index: int, gradient: torch.Tensor) -> None:
        if not bool(torch.isfinite(row_lengths(gradient.reshape(-1, gradient.shape[-1]))).all()):
            raise CalibrationError(
                f"The loss's gradient in front of {self._skeleton.block_names[index]} has NaN or infinite values.",
                "calibrate without it: --importance none",
            )


class _KeptWeights:
    """A watcher that makes products, in the way that gives the same bits on any number of threads, with weights that
    are arranged for it once for all micro-batches: those of one block."""

    def __init__(self) -> None:
        self._kept: dict[Slot, KeptWeight] = {}

    def __call__(self, slot: Slot, inputs: torch.Tensor, product: Product) -> torch.Tensor:
        if slot not in self._kept:
            self._kept[slot] = KeptWeight(product.rows, product.bias)
        return product(self._kept[slot])


class _Gradients:
    """What is kept of the gradients at the outputs of one block's linears.

    weights: each token's mean square by layer, added to in place. output_grams: of those layers that are coupled.
    """

    def __init__(
        self, parts: Mapping[str, list[tuple[Part, str]]], weights: dict[str, torch.Tensor], coupled: frozenset[str]
    ) -> None:
        self._parts, self._weights, self._coupled = parts, weights, coupled
        self.output_grams: dict[str, OutputGram] = {}
        self._kept = _KeptWeights()

    def recorder(self, micro_batch: MicroBatch) -> Callable[[Slot, torch.Tensor, Product], torch.Tensor]:
        """A watcher that adds what comes back to each linear's output."""

        def recorded(slot: Slot, inputs: torch.Tensor, product: Product) -> torch.Tensor:
            output = self._kept(slot, inputs, product)
            wanted = self._parts.get(slot.parameter, [])
            rows = output.numel() // output.shape[-1]
            if wanted and slot.expert is None and output.requires_grad and rows == micro_batch.ids.numel():

                def record(gradient: torch.Tensor) -> None:
                    flat = gradient.reshape(rows, -1)
                    for part, name in wanted:
                        self._add(name, flat if slot.transposed else flat[:, part.start : part.stop], micro_batch)

                cast(Any, output).register_hook(record)
            return output

        return recorded

    def _add(self, name: str, gradient: torch.Tensor, micro_batch: MicroBatch) -> None:
        outputs = gradient.shape[1]
        norm = row_lengths(gradient)
        self._weights[name][micro_batch.tokens] += (norm.square() / outputs).cpu()
        if name in self._coupled and is_taken(micro_batch.index, len(self._weights[name])):
            if name not in self.output_grams:
                self.output_grams[name] = OutputGram(outputs, gradient.device)
            self.output_grams[name].add(gradient, norm)


def _with_first_tensor(
    arguments: tuple[tuple[Any, ...], dict[str, Any]], hidden: torch.Tensor | None, *, placeholder: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the hidden states taken out, or put back where they were taken out."""
    args, kwargs = list(arguments[0]), dict(arguments[1])
    for place, value in enumerate(args):
        if value is _TAKEN_OUT if placeholder else isinstance(value, torch.Tensor):
            args[place] = _TAKEN_OUT if hidden is None else hidden
            return tuple(args), kwargs
    for name, value in kwargs.items():
        if value is _TAKEN_OUT if placeholder else isinstance(value, torch.Tensor):
            kwargs[name] = _TAKEN_OUT if hidden is None else hidden
            return tuple(args), kwargs
    raise CalibrationError("A block is called without hidden states.")


_TAKEN_OUT = object()
