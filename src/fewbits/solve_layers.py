"""Solve the consumers of one input together: codes of each, the weights to go on with, and what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fewbits.layers import LinearLayer
from fewbits.layout import torch_dtype
from fewbits.notes import Note
from fewbits.packing import seal
from fewbits.plan import PlannedLayer
from fewbits.report import LayerRecord, layer_record
from fewbits.solvers import gptq
from fewbits.solvers.rtn import quantize_rows
from fewbits.statistics import Statistics
from fewbits.tensors import QuantizedWeight

# Fewer tokens than this many times the width leave H too loose to compensate errors with.
TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's codes and its record."""

    weight: QuantizedWeight
    record: LayerRecord


def solve_group(
    layers: Sequence[LinearLayer],
    weights: Sequence[torch.Tensor],
    statistics: Statistics | None,
    planned: Mapping[str, PlannedLayer],
    notes: list[Note],
) -> dict[str, SolvedLayer]:
    """Solve layers that share an input, by name. Those of one method are stacked: rows are independent given H.

    Args:
        layers, weights: the consumers and their weights [out, in] as stored.
        statistics: what was seen of their input; None if nothing was.
        planned: by name.
        notes: where fallbacks are noted.
    """
    solved: dict[str, SolvedLayer] = {}
    stacks: dict[object, list[int]] = {}
    for index, layer in enumerate(layers):
        method = planned[layer.name].method
        assert method is not None
        if method.solver_name == "gptq" and statistics is not None:
            stacks.setdefault((method, planned[layer.name].scale_dtype), []).append(index)
        else:
            solved[layer.name] = _rounded(planned[layer.name], weights[index])
    for members in stacks.values():
        assert statistics is not None
        solved |= _solved_together(
            [layers[i] for i in members], [weights[i] for i in members], statistics, planned, notes
        )
    return solved


def _rounded(planned: PlannedLayer, weight: torch.Tensor) -> SolvedLayer:
    assert planned.method is not None
    tile = quantize_rows(weight, planned.method, torch_dtype(planned.scale_dtype))
    return SolvedLayer(tile.weight, layer_record(planned, tile.squared_error, tile.squared_norm))


def _solved_together(
    layers: Sequence[LinearLayer],
    weights: Sequence[torch.Tensor],
    statistics: Statistics,
    planned: Mapping[str, PlannedLayer],
    notes: list[Note],
) -> dict[str, SolvedLayer]:
    first = planned[layers[0].name]
    method = first.method
    assert method is not None
    if statistics.tokens < TOKENS_PER_CHANNEL * first.shape[1]:
        what = f"solved on {statistics.tokens} tokens for {first.shape[1]} inputs"
        notes.append(Note(layers[0].name, what, f"fewer than {TOKENS_PER_CHANNEL} times its width: give more text"))
    stacked = torch.cat([weight.float() for weight in weights])
    solution = gptq.solve(stacked, method.scheme, torch_dtype(first.scale_dtype), statistics.gram)
    notes += [Note(layers[0].name, what, why) for what, why in solution.notes]
    solved = {}
    start = 0
    for layer, weight in zip(layers, weights, strict=True):
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        zeros = None if solution.zeros is None else solution.zeros[rows]
        output_error = None
        if solution.output_error is not None and solution.output_norm is not None:
            norm = solution.output_norm[rows].sum().item()
            output_error = solution.output_error[rows].sum().item() / norm if norm > 0 else 0.0
        record = layer_record(
            planned[layer.name],
            solution.squared_error[rows].sum().item(),
            solution.squared_norm[rows].sum().item(),
            output_error,
        )
        solved[layer.name] = SolvedLayer(seal(solution.codes[rows], solution.scales[rows], zeros, method), record)
    return solved
