"""Compiled work in steps, on the threads that torch has already.

A program is a row of blocks of integers, one a step: a compiled function, how many rows it has, and the addresses and
sizes that it works with. Every thread of the team goes through all steps; at each it takes pieces of the rows until
none is left, and goes on when all rows are done. So it does not matter how many threads come, or when: one that the
system holds back is waited for only while it has a piece in hand. Rows are in as many parts as there are threads; each
begins with one of them, and its pieces follow each other in memory. A thread that waits asks for what it will read of
the next weight: between two large steps there are small ones, and memory would stand idle.

A second pool of threads beside torch's would find its processors taken: OpenMP's threads spin for milliseconds after
each of torch's own operations. So a program is handed to the OpenMP library that torch carries; where it carries none,
to plain threads.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import Array, inlined
from fewbits.kernels.fetching import fetch_lines
from fewbits.kernels.memory import pointer_to
from fewbits.kernels.threads import on_threads, openmp

# A step's block. How many rows of each part were handed out, and how many rows are done in all, each have a cache line
# of their own: threads that take rows of one part don't slow others down, nor do those that wait.
TAKEN, PARTS, LINE = 0, 7, 8
DONE = LINE * PARTS
# Pieces are multiples of so many rows; PIECE rows are handed out at once, and PART_ROWS rows are a part.
FUNCTION, ROWS, MULTIPLE, PIECE, PART_ROWS = range(DONE + LINE, DONE + LINE + 5)
# What a step reads row by row from memory: the first row's address, and bytes of a row, 0 if it reads nothing so. And
# how many words behind this block that of the next such step lies, 0 if there is none.
STREAM_AT, STREAM_BYTES, NEXT_STREAM, OWN = range(PART_ROWS + 1, PART_ROWS + 5)
# Words of a block: the function's own fields begin at OWN.
WORDS = OWN + 24
# What a program begins with; MEMBERS is how many threads have come.
STEPS, THREADS, YIELD_AT, MEMBERS, HEADER = 0, 1, 2, 3, 8
# Pieces per thread: enough to even out what other processes take.
PIECES = 8
# OpenMP's threads wake in the time of this many products.
ALONE = 2**16
# Bytes of its part of the next weight that a thread asks for before a small step, between two looks while it waits, and
# at most: so much stays in its own cache.
FETCHED_BEFORE, FETCHED_AT_ONCE, FETCHED = 2**12, 2**9, 2**17
# Looks at the counter before the processor is offered to others: some 30 µs, more than an undisturbed piece takes.
LOOKS = 1000

# Words of a program by their numbers, and how far behind the start of some memory each is.
Places = list[tuple[int, int]]
# void(address of the block, first row, last row + 1)
_WORK = types.void(types.int64, types.int64, types.int64)
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_ARCHITECTURE = llvm.get_process_triple().partition("-")[0]


@intrinsic  # type: ignore[untyped-decorator]
def _fetch_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, for all threads at once; returns what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _look(typing_context: Any, address: Any) -> Any:
    """The int64 at an address, with everything that was written before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pause(typing_context: Any) -> Any:
    """A hint to the processor not to hurry."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, operands = {
            "x86_64": ("llvm.x86.sse2.pause", []),
            "aarch64": ("llvm.aarch64.hint", [ir.Constant(_I32, 1)]),
        }.get(_ARCHITECTURE, ("llvm.donothing", []))
        hint = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(builder.module.declare_intrinsic(name, fnty=hint), operands)
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call_work(typing_context: Any, function: Any, block: Any, start: Any, stop: Any) -> Any:
    """Call the work at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call_yield(typing_context: Any, function: Any) -> Any:
    """Call the C function without arguments at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_I32, [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@inlined
def _part_of(block: Any, part: Any) -> Any:
    """The first row of a part, and the first behind it."""
    begin = part * block[PART_ROWS]
    return begin, min(begin + block[PART_ROWS], block[ROWS])


@inlined
def _stream_of(at: Any, part: Any) -> Any:
    """Where a part's memory of the next step that reads any begins and ends, as far as is asked for."""
    behind = carray(pointer_to(at), (WORDS,), np.int64)[NEXT_STREAM]
    if behind == 0:
        return np.int64(0), np.int64(0)
    block = carray(pointer_to(at + 8 * behind), (WORDS,), np.int64)
    begin, end = _part_of(block, part)
    first = block[STREAM_AT] + begin * block[STREAM_BYTES]
    return first, first + min(FETCHED, (end - begin) * block[STREAM_BYTES])


def _team(pointer: Any) -> None:
    """All steps of a program; any number of threads may do this at once."""
    header = carray(pointer, (HEADER,), np.int64)
    first = np.int64(header.ctypes.data)
    parts = min(header[THREADS], PARTS)
    member = _fetch_add(first + 8 * MEMBERS, 1)
    at = first + 8 * HEADER
    fetched, until = np.int64(0), np.int64(0)
    for _ in range(header[STEPS]):
        block = carray(pointer_to(at), (WORDS,), np.int64)
        rows, piece = block[ROWS], block[PIECE]
        # The next step's block: of a small layer, waiting for it had taken a thirtieth of the time.
        fetch_lines(at + 8 * WORDS, at + 16 * WORDS)
        done = 0
        if block[STREAM_BYTES] == 0 and fetched < until:
            # Memory would stand idle while this thread does what reads none.
            fetch_lines(fetched, min(fetched + FETCHED_BEFORE, until))
            fetched += FETCHED_BEFORE
        for turn in range(parts):
            part = (member + turn) % parts
            begin, end = _part_of(block, part)
            while begin + _look(at + 8 * (TAKEN + LINE * part)) < end:
                start = begin + _fetch_add(at + 8 * (TAKEN + LINE * part), piece)
                if start >= end:
                    break
                stop = min(start + piece, end)
                _call_work(block[FUNCTION], at, start, stop)
                done += stop - start
        if done:
            _fetch_add(at + 8 * DONE, done)
        if block[STREAM_BYTES] != 0 or fetched == 0:
            fetched, until = _stream_of(at, member % parts)
        looks = 0
        while _look(at + 8 * DONE) < rows:
            if fetched < until:
                fetch_lines(fetched, min(fetched + FETCHED_AT_ONCE, until))
                fetched += FETCHED_AT_ONCE
                continue
            _pause()
            looks += 1
            if looks > LOOKS and header[YIELD_AT] != 0:
                _call_yield(header[YIELD_AT])
        at += 8 * WORDS


@cache
def _compiled_team() -> Any:
    return cfunc(types.void(types.voidptr), nopython=True, cache=True, error_model="numpy")(_team)


@cache
def _yield_address() -> int:
    """The C function that offers the processor to other threads, or 0."""
    library, name = ("kernel32", "SwitchToThread") if sys.platform == "win32" else (None, "sched_yield")
    function = getattr(ctypes.CDLL(library), name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def compiled_work(function: Callable[[Any, Any, Any], None]) -> Any:
    """A function of (address of a block, first row, last row + 1), compiled for `Work`."""
    return cfunc(_WORK, nopython=True, cache=True, error_model="numpy")(function)


class Work:
    """A compiled function, and those of its fields that stay from call to call.

    Args:
        multiple: pieces are multiples of so many rows.
    """

    def __init__(self, compiled: Any, fixed: Mapping[int, int], multiple: int = 1) -> None:
        self._kept = compiled
        self._block = np.zeros(WORDS, np.int64)
        self._block[FUNCTION], self._block[MULTIPLE] = compiled.address, multiple
        for field, value in fixed.items():
            self._block[field] = value

    def step(self, rows: int, fields: Mapping[int, int]) -> Array:
        """A block of its own for this much work: several threads may call the same layer."""
        block = self._block.copy()
        block[ROWS] = rows
        for field, value in fields.items():
            block[field] = value
        return block


class Program:
    """Steps one after the other; one caller at a time."""

    def __init__(self, steps: Sequence[Array]) -> None:
        words = HEADER + WORDS * len(steps)
        buffer = np.empty(words + 7, np.int64)
        at: int = buffer.__array_interface__["data"][0]
        first = -(at // 8) % 8
        self._words, self._address = buffer[first : first + words], at + 8 * first
        self._words[STEPS], self._words[THREADS], self._words[YIELD_AT] = len(steps), 0, _yield_address()
        np.concatenate(steps, out=self._words[HEADER:])
        self._blocks = self._words[HEADER:].reshape(len(steps), WORDS)
        self._counters = self._blocks[:, : DONE + 1 : LINE]

    def places(self, start: int, size: int) -> Places:
        """Where addresses of so many bytes of memory are among the words of all steps, and how far behind its start."""
        found = np.flatnonzero((self._words >= start) & (self._words < start + size))
        return [(place, int(self._words[place]) - start) for place in found.tolist()]

    def put(self, places: Places, start: int) -> None:
        """Have steps use other memory in place of that which `places` was asked for."""
        for place, behind in places:
            self._words[place] = start + behind

    def begin(self, threads: int) -> None:
        """Have all rows yet to be done, by so many threads."""
        self._counters[:] = 0
        self._words[MEMBERS] = 0
        if threads != self._words[THREADS]:
            self._words[THREADS] = threads
            self._divide(threads)

    def _divide(self, threads: int) -> None:
        """Divide the rows of all steps among so many threads."""
        behind = 0
        for block in self._blocks[::-1]:
            rows, multiple = block[ROWS : MULTIPLE + 1].tolist()
            piece = max(1, -(-rows // (threads * PIECES * multiple))) * multiple
            pieces = -(-rows // piece)
            block[PIECE : PART_ROWS + 1] = piece, -(-pieces // min(threads, PARTS)) * piece
            block[NEXT_STREAM] = behind
            if block[STREAM_BYTES] != 0:
                behind = WORDS
            elif behind != 0:
                behind += WORDS

    def run(self, threads: int) -> None:
        """Go through all steps once; returns when everything is done."""
        self.begin(threads)
        team, parallel = _compiled_team(), openmp()
        if threads == 1:
            team.ctypes(self._address)
        elif parallel is not None:
            parallel(team.address, self._address, threads, 0)
        else:
            on_threads(lambda: team.ctypes(self._address), threads)


def team_size(products: int) -> int:
    """Threads worth waking for this many products."""
    return torch.get_num_threads() if products > ALONE else 1
