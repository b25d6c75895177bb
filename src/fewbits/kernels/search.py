"""The compiled scale search: for each group of weights, the grid of least weighted error among shrunken ranges.

Groups are independent, so 64 of them are turned into columns and searched side by side: each step is the same for all,
no sum crosses a vector, and the order of additions (eight weights of a group, then the next eight) is the same on
every processor and in `numerics.best_grid`, to the bit. Bound by arithmetic: seven operations a weight and candidate.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fewbits.kernels.compiling import ROUNDING, Array, as_float, entry, inlined, inner, stored_scale
from fewbits.schemes import Scheme
from fewbits.search import SUMMED, Search

LANES = 64
COUNT = np.uint64(LANES)
# What is known of each group, one row of LANES numbers each; offsets in one array, which the compiler can tell apart.
LOWEST, HIGHEST, WIDE, NARROW, BACK, SCALE, ZERO, INVERSE, LOW, HIGH, LOSS, BEST, BEST_SCALE, BEST_ZERO = (
    np.uint64(row * LANES) for row in range(14)
)
LANE_ROWS = 14
ZERO_POINT = np.float32(0.0)
ONE = np.float32(1.0)


@inlined
def covering(low: Any, high: Any, symmetric: Any, top_code: Any) -> Any:
    """Scales whose grids just cover a range: with all levels, and symmetric with a positive scale."""
    middle = (top_code + ONE) / np.float32(2.0)
    extreme = high if high > -low else -low
    wide = extreme / middle if symmetric else (high - low) / top_code
    return wide, extreme / (middle - ONE) if middle > ONE else wide


@inlined
def asymmetric_grid(lowest: Any, wide: Any, top_code: Any, dropped: Any, smallest: Any, largest: Any) -> Any:
    """Scale and zero point of a range that begins at `lowest`, `wide` a step."""
    scale = stored_scale(wide, dropped, smallest, largest)
    zero = np.rint(-lowest * (ONE / scale))
    zero = ZERO_POINT if zero < ZERO_POINT else zero
    return scale, top_code if zero > top_code else zero


@inlined
def symmetric_grid(
    low: Any, high: Any, step: Any, extreme_first: Any, dropped: Any, smallest: Any, largest: Any
) -> Any:
    """The scale of a step: with whatever sign takes the range's extreme to code 0, or else positive."""
    scale = stored_scale(step, dropped, smallest, largest)
    return -scale if extreme_first and high > -low else scale


@inner
def _fill(tile: Any, words: Any, pairs: Any, first: Any, count: Any, size: Any) -> None:
    """Weights of groups first, first + 1 … as columns of `tile`; two bf16 come in one word."""
    width = size // 2 if pairs else size
    stage = tile[(size - width) * LANES :].view(np.uint32)
    for top in range(0, width - width % SUMMED, SUMMED):
        for lane in range(count):
            start = (first + lane) * width + top
            for k in range(SUMMED):
                stage[(top + k) * LANES + lane] = words[start + k]
    for k in range(width - width % SUMMED, width):
        for lane in range(count):
            stage[k * LANES + lane] = words[(first + lane) * width + k]
    for k in range(width if pairs else 0):
        pair = stage[k * LANES : (k + 1) * LANES]
        even = tile[2 * k * LANES : (2 * k + 1) * LANES]
        odd = tile[(2 * k + 1) * LANES : (2 * k + 2) * LANES]
        for lane in range(COUNT):
            word = pair[lane]
            even[lane] = as_float(np.uint32(word << np.uint32(16)))
            odd[lane] = as_float(np.uint32(word & np.uint32(0xFFFF0000)))


@inner
def _ranges(tile: Any, lanes: Any, symmetric: Any, top_code: Any, dropped: Any, smallest: Any, largest: Any) -> None:
    """Least and largest weight of each group, zero included, and the scales that just cover them."""
    for lane in range(COUNT):
        lanes[LOWEST + lane] = ZERO_POINT
        lanes[HIGHEST + lane] = ZERO_POINT
    for top in range(0, tile.size, SUMMED * LANES):
        block = tile[top : top + SUMMED * LANES]
        for lane in range(LANES):
            low, high = lanes[LOWEST + lane], lanes[HIGHEST + lane]
            for k in range(SUMMED):
                x = block[k * LANES + lane]
                low = x if x < low else low
                high = x if x > high else high
            lanes[LOWEST + lane] = low
            lanes[HIGHEST + lane] = high
    for lane in range(COUNT):
        wide, narrow = covering(lanes[LOWEST + lane], lanes[HIGHEST + lane], symmetric, top_code)
        lanes[WIDE + lane] = wide
        lanes[NARROW + lane] = narrow
        lanes[BACK + lane] = ONE / stored_scale(wide, dropped, smallest, largest)


@inner
def _asymmetric(lanes: Any, factor: Any, top_code: Any, dropped: Any, smallest: Any, largest: Any) -> None:
    for lane in range(COUNT):
        lowest, wide = lanes[LOWEST + lane] * factor, lanes[WIDE + lane] * factor
        scale, zero = asymmetric_grid(lowest, wide, top_code, dropped, smallest, largest)
        lanes[SCALE + lane] = scale
        lanes[ZERO + lane] = zero
        lanes[INVERSE + lane] = ONE / scale
        lanes[LOW + lane] = -zero
        lanes[HIGH + lane] = top_code - zero


@inner
def _symmetric(
    lanes: Any, extreme_first: Any, factor: Any, top_code: Any, dropped: Any, smallest: Any, largest: Any
) -> None:
    """The extreme goes to code 0, with whatever sign that asks for; or else the scale is positive and narrower."""
    middle = (top_code + ONE) / np.float32(2.0)
    for lane in range(COUNT):
        step = (lanes[WIDE + lane] if extreme_first else lanes[NARROW + lane]) * factor
        low, high = lanes[LOWEST + lane], lanes[HIGHEST + lane]
        scale = symmetric_grid(low, high, step, extreme_first, dropped, smallest, largest)
        lanes[SCALE + lane] = scale
        lanes[ZERO + lane] = middle
        lanes[INVERSE + lane] = ONE / scale
        lanes[LOW + lane] = -middle
        lanes[HIGH + lane] = top_code - middle


@inner
def _losses(tile: Any, power: Any, weights: Any, weighted: Any, lanes: Any) -> None:
    """Σ weightₖ |x/s − code|^power of each group, in units of its scale."""
    for lane in range(COUNT):
        lanes[LOSS + lane] = ZERO_POINT
    for top in range(0, tile.size, SUMMED * LANES):
        block = tile[top : top + SUMMED * LANES]
        shares = weights[top : top + SUMMED * LANES]
        for lane in range(LANES):
            loss = ZERO_POINT
            for k in range(SUMMED):
                u = block[k * LANES + lane] * lanes[INVERSE + lane]
                code = np.rint(u)
                code = lanes[LOW + lane] if code < lanes[LOW + lane] else code
                code = lanes[HIGH + lane] if code > lanes[HIGH + lane] else code
                miss = (u - code) * (u - code)
                if power == 4:
                    miss = miss * miss
                if weighted:
                    miss = miss * shares[k * LANES + lane]
                loss += miss
            lanes[LOSS + lane] += loss


@inner
def _keep_better(lanes: Any, power: Any, is_first: Any) -> None:
    for lane in range(COUNT):
        best, best_scale, best_zero = lanes[BEST + lane], lanes[BEST_SCALE + lane], lanes[BEST_ZERO + lane]
        scale, zero = lanes[SCALE + lane], lanes[ZERO + lane]
        relative = scale * lanes[BACK + lane]
        relative = relative * relative
        relative = relative * relative if power == 4 else relative
        loss = lanes[LOSS + lane] * relative
        better = is_first or loss < best
        lanes[BEST + lane] = loss if better else best
        lanes[BEST_SCALE + lane] = scale if better else best_scale
        lanes[BEST_ZERO + lane] = zero if better else best_zero


@entry
def _search(
    words: Any, pairs: Any, size: Any, symmetric: Any, top_code: Any, factors: Any, power: Any, weights: Any,
    scales: Any, zeros: Any, dropped: Any, smallest: Any, largest: Any,
) -> None:  # fmt: skip
    padded = (size + SUMMED - 1) // SUMMED * SUMMED
    for item in range((scales.size + LANES - 1) // LANES):
        first = item * LANES
        count = min(LANES, scales.size - first)
        tile = np.empty(padded * LANES, np.float32)
        if count < LANES or padded > size:
            tile[:] = ZERO_POINT
        _fill(tile, words, pairs, first, count, size)
        shares = tile
        if weights.size > 0:
            shares = np.zeros(padded * LANES, np.float32)
            for lane in range(count):
                start = (first + lane) * size % weights.size
                for k in range(size):
                    shares[k * LANES + lane] = weights[start + k]
        lanes = np.zeros(LANE_ROWS * LANES, np.float32)
        _ranges(tile, lanes, symmetric, top_code, dropped, smallest, largest)
        for step in range(factors.size):
            if symmetric:
                _symmetric(lanes, True, factors[step], top_code, dropped, smallest, largest)
            else:
                _asymmetric(lanes, factors[step], top_code, dropped, smallest, largest)
            _losses(tile, power, shares, weights.size > 0, lanes)
            _keep_better(lanes, power, step == 0)
            if symmetric and top_code > ONE:
                _symmetric(lanes, False, factors[step], top_code, dropped, smallest, largest)
                _losses(tile, power, shares, weights.size > 0, lanes)
                _keep_better(lanes, power, False)
        for lane in range(count):
            scales[first + lane] = lanes[BEST_SCALE + np.uint64(lane)]
            zeros[first + lane] = np.uint8(np.int32(lanes[BEST_ZERO + np.uint64(lane)]))


def best_grid_of_rows(
    weight: Array, dtype: str, scheme: Scheme, search: Search, scales: Array, zeros: Array, importance: Array
) -> None:
    """Search the grids of rows (as the kernels take them) with one thread.

    Args:
        dtype: safetensors name of what scales are stored in.
        scales, zeros: where the grids go, fp32 and uint8 [R, G].
        importance: fp32 [K]; empty if all weights count alike.
    """
    size = scheme.group_size or weight.shape[1]
    pairs = weight.dtype == np.uint16 and size % 2 == 0 and weight.ctypes.data % 4 == 0
    if not pairs and weight.dtype == np.uint16:
        weight = (weight.astype(np.uint32) << 16).view(np.float32)
    _search(
        weight.reshape(-1).view(np.uint32), pairs, size, scheme.symmetric, np.float32(scheme.largest_code),
        np.array(search.factors(), np.float32), search.power, importance, scales.reshape(-1), zeros.reshape(-1),
        *ROUNDING[dtype],
    )  # fmt: skip


def rows_of_lanes(groups: int) -> int:
    """The least number of rows whose groups fill all lanes."""
    return LANES // math.gcd(LANES, groups)
