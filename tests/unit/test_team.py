"""Programs of compiled steps: every row once, in order of the steps, whatever the number of threads."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from numba import carray

from fewbits.kernels.memory import pointer_to
from fewbits.kernels.team import (
    DONE,
    HEADER,
    LINE,
    MEMBERS,
    NEXT_STREAM,
    OWN,
    STREAM_AT,
    STREAM_BYTES,
    TAKEN,
    WORDS,
    Program,
    Work,
    _compiled_team,
    _stream_of,
    compiled_work,
)

FROM_AT, TO_AT = OWN, OWN + 1
ROWS = 37


def _difference(address: Any, start: Any, stop: Any) -> None:
    """to[i] = 3 · from[i] + from[ROWS − 1 − i]: needs what any thread may have written in the step before."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    source = carray(pointer_to(block[FROM_AT]), (ROWS,), np.int64)
    target = carray(pointer_to(block[TO_AT]), (ROWS,), np.int64)
    for i in range(start, stop):
        target[i] = 3 * source[i] + source[ROWS - 1 - i]


def _program(buffers: Any, steps: int) -> Program:
    compiled = compiled_work(_difference)
    blocks = []
    for step in range(steps):
        source, target = buffers[step % 2], buffers[(step + 1) % 2]
        fields = {FROM_AT: source.ctypes.data, TO_AT: target.ctypes.data}
        blocks.append(Work(compiled, {}, 1 + step % 3).step(ROWS, fields))
    return Program(blocks)


def _expected(first: Any, steps: int) -> Any:
    values = first.copy()
    for _ in range(steps):
        values = 3 * values + values[::-1]
    return values


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_step_sees_all_of_the_one_before(threads: int) -> None:
    for steps in (1, 2, 15):
        buffers = np.zeros((2, ROWS), np.int64)
        program = _program(buffers, steps)
        for start in (1, 5):
            buffers[0] = first = np.arange(start, start + ROWS)
            program.run(threads)
            assert np.array_equal(buffers[steps % 2], _expected(first, steps))


def test_rows_are_handed_out_once_and_steps_without_rows_are_passed() -> None:
    buffers = np.zeros((2, ROWS), np.int64)
    work = Work(compiled_work(_difference), {FROM_AT: buffers[0].ctypes.data, TO_AT: buffers[1].ctypes.data})
    buffers[0] = np.arange(ROWS)
    program = Program([work.step(0, {}), work.step(ROWS, {}), work.step(0, {})])
    program.run(3)
    blocks = program._words[HEADER:].reshape(3, WORDS)
    assert blocks[:, DONE].tolist() == [0, ROWS, 0]
    assert (blocks[:, TAKEN:DONE:LINE].sum(1) >= blocks[:, DONE]).all()
    assert np.array_equal(buffers[1], _expected(np.arange(ROWS), 1))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memory_that_is_asked_for_ahead_lies_within_what_the_next_weight_has(threads: int) -> None:
    """A part without rows and steps behind the last weight ask for nothing; results are those without."""
    buffers, weight = np.zeros((2, ROWS), np.int64), np.zeros((ROWS, 64), np.uint8)
    compiled = compiled_work(_difference)
    blocks = []
    for step in range(6):
        source, target = buffers[step % 2], buffers[(step + 1) % 2]
        fields = {FROM_AT: source.ctypes.data, TO_AT: target.ctypes.data}
        streamed = {STREAM_AT: weight.ctypes.data, STREAM_BYTES: 64} if step in (1, 4) else {}
        blocks.append(Work(compiled, fields, 1 + step % 3).step(ROWS, streamed))
    program = Program(blocks)
    for start in (1, 5):
        buffers[0] = first = np.arange(start, start + ROWS)
        program.run(threads)
        assert np.array_equal(buffers[0], _expected(first, 6))
    assert program._blocks[:, NEXT_STREAM].tolist() == [WORDS, 3 * WORDS, 2 * WORDS, WORDS, 0, 0]
    for step in range(6):
        for part in range(threads):
            begin, end = _stream_of(program._address + 8 * (HEADER + step * WORDS), part)
            assert (
                begin >= end if step > 3 else weight.ctypes.data <= begin <= end <= weight.ctypes.data + weight.nbytes
            )


def _members(address: Any, start: Any, stop: Any) -> None:
    """to[row] = how many pieces of this step were begun before this one."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    order, begun = (
        carray(pointer_to(block[TO_AT]), (ROWS,), np.int64),
        carray(pointer_to(block[FROM_AT]), (1,), np.int64),
    )
    order[start:stop] = begun[0]
    begun[0] += 1


@pytest.mark.parametrize("multiple", [1, 3])
def test_a_thread_alone_goes_through_its_part_before_those_of_others(multiple: int) -> None:
    order, begun = np.full(ROWS, -1), np.zeros(1, np.int64)
    fields = {TO_AT: order.ctypes.data, FROM_AT: begun.ctypes.data}
    program = Program([Work(compiled_work(_members), fields, multiple).step(ROWS, {})])
    program.begin(2)
    program._words[MEMBERS] = 1
    _compiled_team().ctypes(program._address)
    # The second of two, whom the first never joins: its own half comes first.
    assert order[-1] < order[0] and order[0] > 0
    half = int(np.flatnonzero(order == 0)[0])
    assert (np.diff(order[half:]) >= 0).all() and (np.diff(order[:half]) >= 0).all()
    assert ROWS // 2 <= half <= ROWS // 2 + 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can't be bound to a processor here")
def test_more_threads_than_processors_take_turns() -> None:
    """Four threads on one processor: each wait that spun for a whole time slice would take milliseconds."""
    buffers = np.zeros((2, ROWS), np.int64)
    program = _program(buffers, 200)
    program.run(1)
    seconds: list[float] = []

    def crowded() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        members = []
        for _ in range(3):
            other = np.zeros((2, ROWS), np.int64)
            members.append(threading.Thread(target=_program(other, 200).run, args=(1,)))
        started_s = time.perf_counter()
        for member in members:
            member.start()
        buffers[0] = np.arange(ROWS)
        program.run(4)
        for member in members:
            member.join()
        seconds.append(time.perf_counter() - started_s)

    thread = threading.Thread(target=crowded)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and len(seconds) == 1
    assert np.array_equal(buffers[0], _expected(np.arange(ROWS), 200))
