"""Following: what is kept of the original model's way through one block, and the drift that comes of it (`drift.py`).

Where a linear has fewer outputs than inputs, its outputs are kept, else its inputs. Outputs are held against W x + b
first: what a model makes of them inside its product is then left alone, and inputs serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fewbits.drift import Drift, DriftAccumulator
from fewbits.input_groups import InputGroup
from fewbits.originals import Originals
from fewbits.statistics import StatisticsAccumulator
from fewbits.suspended import MicroBatch
from fewbits.watching import Product, Slot

# Rows of a group's weights [rows, in] as stored, and which outputs of its slot they make; None for all, in order.
Rows = Callable[[InputGroup], tuple[torch.Tensor, torch.Tensor | None]]
# Tokens whose outputs are held against W x + b, and how far from it bf16 leaves them, by the norms of both.
TRIED, CLOSE = 8, 2.0**-6


class Following:
    """Input groups of one block that follow the original model."""

    def __init__(self, originals: Originals, groups: Iterable[InputGroup], rows: Rows) -> None:
        self._originals, self._rows = originals, rows
        self._groups = list(groups)
        self._by_slot = {group.slots[0]: group for group in self._groups}
        # Places behind those of inputs.
        first = 1 + max((group.input for group in self._groups), default=-1)
        self._places = {group: first + number for number, group in enumerate(self._groups)}
        self._by_outputs: dict[InputGroup, bool] = {}
        self._columns: dict[InputGroup, torch.Tensor | None] = {}
        self._sums: dict[InputGroup, DriftAccumulator] = {}
        self._settled: set[InputGroup] = set()

    def keep(self, slot: Slot, micro_batch: MicroBatch, inputs: torch.Tensor, product: Product) -> torch.Tensor:
        """Make a product of the original model, and keep of it what is needed."""
        output, group = product(), self._by_slot.get(slot)
        if group is None or inputs.numel() // inputs.shape[-1] != micro_batch.ids.numel():
            return output
        if group not in self._by_outputs:
            self._by_outputs[group] = self._are_plain(group, inputs, output, product.bias)
        if not self._by_outputs[group]:
            self._originals.keep(group.input, micro_batch, inputs)
            return output
        columns = self._columns[group]
        # A copy: the model may go on in the output's own memory.
        kept = output.clone() if product.bias is None else (output.float() - product.bias.float()).to(output.dtype)
        self._originals.keep(self._places[group], micro_batch, kept if columns is None else kept[..., columns])
        return output

    def takes(self, micro_batch: MicroBatch) -> bool:
        """Whether the original model goes through a micro-batch as well."""
        return self._originals.takes(micro_batch)

    def add(
        self, group: InputGroup, micro_batch: MicroBatch, inputs: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        """Add a micro-batch whose inputs have just gone into the group's statistic."""
        by_outputs = self._by_outputs.get(group)
        if by_outputs is None or group in self._settled:
            return
        original = self._originals.inputs(self._places[group] if by_outputs else group.input, micro_batch)
        if original is None or original.shape[:-1].numel() != inputs.shape[:-1].numel():
            return
        left = original.to(inputs.device)
        left = left if by_outputs else left - inputs.view_as(left)
        if group not in self._sums:
            self._sums[group] = DriftAccumulator(left.shape[-1], inputs.shape[-1], inputs.device)
        self._sums[group].add(left, inputs, weights)

    def settle(self, group: InputGroup, statistic: StatisticsAccumulator) -> None:
        """Take W H off outputs' sums, before the statistic is added to that was gathered of the same tokens."""
        if group in self._settled or not self._by_outputs.get(group):
            return
        self._settled.add(group)
        sums = self._sums.get(group)
        if sums is None or sums.tokens != statistic.tokens:
            self._sums.pop(group, None)
            return
        for columns, product in statistic.products(self._rows(group)[0]):
            sums.subtract(columns, product)

    def drift(self, group: InputGroup, statistic: StatisticsAccumulator) -> Drift | None:
        """The drift of all tokens of a group's statistic; None where none was measured."""
        self.settle(group, statistic)
        sums = self._sums.pop(group, None)
        matrix = None if sums is None else sums.finish(statistic.tokens)
        return None if matrix is None else Drift(matrix, self._by_outputs[group])

    def _are_plain(
        self, group: InputGroup, inputs: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
    ) -> bool:
        """Whether outputs are fewer than inputs, and just W x + b."""
        W, columns = self._rows(group)
        self._columns[group] = columns
        if len(group.slots) > 1 or len(W) >= W.shape[1]:
            return False
        x, y = (tensor.reshape(-1, tensor.shape[-1])[:TRIED].float() for tensor in (inputs, output))
        y = y if bias is None else y - bias.float()
        y = y if columns is None else y[:, columns]
        expected = x @ W.to(x.device).float().T
        return y.shape == expected.shape and bool((y - expected).norm() <= CLOSE * expected.norm())
