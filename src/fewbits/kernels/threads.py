"""Kernels on several threads: rows are cut into runs, and each free thread takes the next one.

The kernels themselves are compiled for one thread and release the interpreter. The threads are those of torch's OpenMP,
where it is loaded and has GNU's: others would find the processors taken by these, which wait for the next product on
them for milliseconds. Elsewhere plain threads do. A caller that has threads of its own calls the kernels straight.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

# Runs per thread: enough to even out what other processes take, few enough that starting one costs nothing.
RUNS = 8
# Waking a thread takes as long as rounding this many weights.
ALONE = 2**17
# Of a waiting OpenMP thread: some microseconds, longer than it takes torch to begin the next product.
SPINS = "2000"

# What OpenMP's threads call: a function of an address.
_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count() -> int:
    """As many threads as torch uses where it is loaded; else OMP_NUM_THREADS, or every processor."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() and int(named) > 0 else processors()


def rest_between_products() -> None:
    """Have torch's OpenMP threads sleep soon after each product, where torch is still to be loaded.

    By default they wait for the next one on their processors for milliseconds, and ours find none that is free.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def over_rows(rows: int, columns: int, work: Callable[[int, int], None], multiple: int = 1) -> None:
    """Call `work(start, stop)` for runs that make up all rows, on several threads.

    Args:
        columns: weights in a row, to judge what the work is worth.
        multiple: runs start at multiples of this.
    """
    threads = thread_count()
    if threads == 1 or rows * columns <= ALONE:
        return work(0, rows)
    step = max(1, -(-rows // (threads * RUNS * multiple))) * multiple
    starts = itertools.count(0, step)

    def take() -> None:
        while (start := next(starts)) < rows:
            work(start, min(start + step, rows))

    on_threads(take, threads)


def on_threads(work: Callable[[], None], threads: int) -> None:
    """Call `work` on several threads at once, this one among them; returns when all are done.

    They may be fewer: `work` takes what is left to do until nothing is.
    """
    if "torch" in sys.modules and (parallel := openmp(_MEMBER)) is not None:
        return _on_openmp(work, threads, parallel)
    helpers = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            helper.result()


def openmp(member: Any = ctypes.c_void_p) -> Any:
    """`GOMP_parallel` of the library that torch carries, or None. member: the ctypes type of what threads are to call.

    A function is given as one, not cast to an address: a cast keeps it, and all that it refers to, in a cycle. A forked
    child has none: it would wait for threads of its parent's for ever.
    """
    return None if _forked else _openmp(member)


@cache
def _openmp(member: Any) -> Any:
    import torch

    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        parallel = ctypes.CDLL(str(file)).GOMP_parallel
        parallel.argtypes = (member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return parallel
    return None


def _on_openmp(work: Callable[[], None], threads: int, parallel: Any) -> None:
    errors: list[BaseException] = []

    def member(_: int | None) -> None:
        # Nothing may be thrown through the library's own frames.
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    parallel(_MEMBER(member), None, threads, 0)
    if errors:
        raise errors[0]


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="fewbits-kernel")
    return _pools[threads]


def _begin_child() -> None:
    """A child has none of its parent's threads."""
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)
