"""Solve the consumers of one input together: codes of each, the weights to go on with, and what was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.kernels.rounding import rounded_values
from fewbits.layers import LinearLayer
from fewbits.layout import torch_dtype
from fewbits.methods import QuantMethod
from fewbits.notes import Note
from fewbits.plan import PlannedLayer
from fewbits.report import LayerRecord, layer_record
from fewbits.scale_limits import count_at_limit, note_at_limit
from fewbits.search import MINMAX, Search
from fewbits.solvers import gptq
from fewbits.solvers.gptq_options import DEFAULTS
from fewbits.solvers.rtn import quantize_rows
from fewbits.statistics import Statistics
from fewbits.tensors import QuantizedWeight, decode, seal
from fewbits.transforms import TRANSFORMS
from fewbits.transforms.problem import ScaleProblem
from fewbits.transforms.ties import Ties

# Fewer tokens than this many times the width leave H too loose to compensate errors with.
TOKENS_PER_CHANNEL = 4
# Times channels per effective token: the damping that GPTQ needs where this is more than the usual 1 %.
DAMPING_PER_CHANNEL_AND_TOKEN = 0.07
# The same for output Grams by coupled outputs per token: gradients are drawn once a token, and noisier than inputs.
DAMPING_PER_OUTPUT_AND_TOKEN = 3.0
# Narrow, since clipping further lowers the layer's error and raises the model's.
CLIP_SEARCH = Search(steps=31, narrowest=0.8, power=2)
# The output Grams of a layer, as `output_grams.split` gives them; None if there are none.
Coupling = Callable[[LinearLayer], Sequence[torch.Tensor] | None]


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's codes and its record. input_scales: what its input is divided by, fp32 [in]; None if it is not."""

    weight: QuantizedWeight
    record: LayerRecord
    input_scales: torch.Tensor | None = None

    @property
    def effective(self) -> torch.Tensor:
        """What multiplies the input as it was before any scaling [out, in]."""
        weight = self.weight.dequantize(torch.float32)
        return weight if self.input_scales is None else weight / self.input_scales


@dataclass(frozen=True)
class Scaling:
    """That input channels may be scaled.

    ties: which must share a scale. sample: some of the tokens. absorb: has scales taken up; returns what they became.
    """

    ties: Ties
    sample: torch.Tensor
    absorb: Callable[[torch.Tensor], torch.Tensor]


def solve_group(
    layers: Sequence[LinearLayer],
    weights: Sequence[torch.Tensor],
    statistics: Statistics | None,
    planned: Mapping[str, PlannedLayer],
    notes: list[Note],
    scaling: Scaling | None = None,
    coupling: Coupling | None = None,
) -> dict[str, SolvedLayer]:
    """Solve layers that share an input, by name. Those of one method are stacked: rows are independent given H.

    Args:
        layers, weights: the consumers and their weights [out, in] as stored.
        statistics: what was seen of their input; None if nothing was.
        planned: by name.
        notes: where fallbacks are noted.
        scaling: only where all layers have the same method, one with a transform.
        coupling: the output Grams of a layer; without them its rows are solved as independent.
    """
    solved: dict[str, SolvedLayer] = {}
    stacks: dict[object, list[int]] = {}
    for index, layer in enumerate(layers):
        method = planned[layer.name].method
        assert method is not None
        if method.needs_calibration and statistics is not None:
            stacks.setdefault((method, planned[layer.name].scale_dtype), []).append(index)
        else:
            solved[layer.name] = _rounded(planned[layer.name], weights[index])
    s = None
    if scaling is not None and statistics is not None:
        s = scaling.absorb(_found_scales(planned[layers[0].name], weights, statistics, scaling))
    for members in stacks.values():
        assert statistics is not None
        stack = [layers[i] for i in members], [weights[i] for i in members]
        if _method(planned, stack[0]).solver_name == "gptq":
            couplings, last = _couplings(stack[0], coupling), len(stacks) == 1
            seen = _of_members(statistics, weights, members)
            solved |= _solved_together(*stack, seen, planned, notes, s, couplings, keep_gram=not last)
        else:
            solved |= _rounded_together(*stack, statistics, planned, notes, s)
    for name, found in solved.items():
        bits, dtype = found.weight.scales.cpu(), planned[name].scale_dtype
        bits = bits.view({2: torch.uint16, 4: torch.uint32}[bits.element_size()])
        if count := count_at_limit(bits.numpy(), dtype):
            notes.append(note_at_limit(name, count, bits.numel(), dtype))
    return solved


def _of_members(statistics: Statistics, weights: Sequence[torch.Tensor], members: Sequence[int]) -> Statistics:
    """The statistic with the drift of some of the weights that it was gathered for."""
    if statistics.drift is None or len(members) == len(weights):
        return statistics
    rows = torch.split(torch.arange(sum(map(len, weights))), [len(weight) for weight in weights])
    return replace(statistics, drift=statistics.drift.of_rows(torch.cat([rows[member] for member in members])))


def _couplings(layers: Sequence[LinearLayer], coupling: Coupling | None) -> list[torch.Tensor]:
    """Output Grams of all rows of a stack; none if a layer has none."""
    found = [None if coupling is None else coupling(layer) for layer in layers]
    return [G for grams in found for G in grams or ()] if None not in found else []


def _method(planned: Mapping[str, PlannedLayer], layers: Sequence[LinearLayer]) -> QuantMethod:
    method = planned[layers[0].name].method
    assert method is not None
    return method


def _found_scales(
    planned: PlannedLayer, weights: Sequence[torch.Tensor], statistics: Statistics, scaling: Scaling
) -> torch.Tensor:
    method, scale_dtype = planned.method, torch_dtype(planned.scale_dtype)
    assert method is not None and method.transform is not None

    def rounding(search: Search) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def rounded(rows: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
            shares = None if search.steps == 1 else importance
            return rounded_values(rows, method.scheme, scale_dtype, search, shares)

        return rounded

    stacked = torch.cat([weight.float() for weight in weights])
    problem = ScaleProblem(
        stacked, statistics, scaling.ties, scaling.sample, method, rounding(MINMAX), rounding(CLIP_SEARCH)
    )
    return TRANSFORMS[method.transform](problem)


def _rounded(planned: PlannedLayer, weight: torch.Tensor) -> SolvedLayer:
    assert planned.method is not None
    tile = quantize_rows(weight, planned.method, scale_dtype=torch_dtype(planned.scale_dtype))
    return SolvedLayer(tile.weight, layer_record(planned, tile.squared_error, tile.squared_norm))


def _rounded_together(
    layers: Sequence[LinearLayer],
    weights: Sequence[torch.Tensor],
    statistics: Statistics,
    planned: Mapping[str, PlannedLayer],
    notes: list[Note],
    s: torch.Tensor | None,
) -> dict[str, SolvedLayer]:
    """Round each on its own, its scales searched for the inputs that were seen."""
    importance = statistics.gram.diagonal()
    if statistics.tokens < len(importance):
        what = f"scales searched on {statistics.tokens} tokens for {len(importance)} inputs"
        notes.append(Note(layers[0].name, what, "fewer than its width: give more text"))
    solved = {}
    for layer, weight in zip(layers, weights, strict=True):
        wide = weight.float()
        scaled, shares = (wide, importance) if s is None else (wide * s, importance / s.square())
        tile = quantize_rows(
            scaled,
            _method(planned, [layer]),
            search=CLIP_SEARCH,
            scale_dtype=torch_dtype(planned[layer.name].scale_dtype),
            importance=shares,
        )
        missed = wide - (decode(tile.weight) if s is None else decode(tile.weight) / s)
        norm = _output_square(wide, statistics.gram)
        record = layer_record(
            planned[layer.name], missed.square().sum(1).sum(dtype=torch.float64).item(),
            wide.square().sum(1).sum(dtype=torch.float64).item(),
            _output_square(missed, statistics.gram) / norm if norm > 0 else 0.0,
        )  # fmt: skip
        solved[layer.name] = SolvedLayer(tile.weight, record, s)
    return solved


def _output_square(rows: torch.Tensor, H: torch.Tensor) -> float:
    with fast_fp32():
        return float(((rows @ H) * rows).sum(1).sum(dtype=torch.float64))


def _damping(statistics: Statistics) -> float:
    """Share of the mean diagonal: H is the less certain the fewer tokens it has a channel."""
    channels_per_token = len(statistics.gram) / max(statistics.effective_tokens, 1.0)
    return max(DEFAULTS.damping, DAMPING_PER_CHANNEL_AND_TOKEN * channels_per_token)


def _coupling_damping(couplings: Sequence[torch.Tensor], statistics: Statistics) -> float:
    """Share of the mean diagonal, for the widest of the output Grams."""
    outputs_per_token = max((len(G) for G in couplings), default=0) / max(statistics.tokens, 1)
    return max(DEFAULTS.coupling_damping, DAMPING_PER_OUTPUT_AND_TOKEN * outputs_per_token)


def _solved_together(
    layers: Sequence[LinearLayer],
    weights: Sequence[torch.Tensor],
    statistics: Statistics,
    planned: Mapping[str, PlannedLayer],
    notes: list[Note],
    s: torch.Tensor | None,
    couplings: Sequence[torch.Tensor],
    *,
    keep_gram: bool,
) -> dict[str, SolvedLayer]:
    first = planned[layers[0].name]
    method = first.method
    assert method is not None
    if statistics.tokens < TOKENS_PER_CHANNEL * first.shape[1]:
        what = f"solved on {statistics.tokens} tokens for {first.shape[1]} inputs"
        notes.append(Note(layers[0].name, what, f"fewer than {TOKENS_PER_CHANNEL} times its width: give more text"))
    stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    H, scale_dtype = statistics.gram, torch_dtype(first.scale_dtype)
    options = replace(DEFAULTS, damping=_damping(statistics), coupling_damping=_coupling_damping(couplings, statistics))
    solution = (
        gptq.solve(stacked, method.scheme, scale_dtype, H, options, couplings, statistics.drift, keep_gram=keep_gram)
        if s is None
        else gptq.solve(
            stacked.float() * s, method.scheme, scale_dtype, H / s / s[:, None], options, couplings, keep_gram=False
        )
    )
    notes += [Note(layers[0].name, what, why) for what, why in solution.notes]
    decoded = None if s is None else solution.decoded / s
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
        squared_error, squared_norm = (
            solution.squared_error[rows].sum().item(),
            solution.squared_norm[rows].sum().item(),
        )
        if decoded is not None:
            wide = weight.float()
            squared_error = (wide - decoded[rows]).square().sum(1).sum(dtype=torch.float64).item()
            squared_norm = wide.square().sum(1).sum(dtype=torch.float64).item()
        record = layer_record(planned[layer.name], squared_error, squared_norm, output_error)
        solved[layer.name] = SolvedLayer(seal(solution.codes[rows], solution.scales[rows], zeros, method), record, s)
    return solved
