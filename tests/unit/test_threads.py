"""Work on several threads; and what waits for whom: torch's are told to sleep while it can still be told."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from fewbits.kernels.threads import over_rows

TOLD = """
import os
from fewbits.kernels.threads import rest_between_products
{before}
rest_between_products()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("before", "settings", "expected"),
    [
        ("", {}, "2000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import torch", {}, "None"),
    ],
)
def test_threads_are_told_only_where_it_helps(before: str, settings: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", TOLD.format(before=before)]
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_all_rows_are_done_once_on_more_than_one_thread() -> None:
    done, idents = [0] * 1000, set()
    both = threading.Barrier(2, timeout=30)

    def work(start: int, stop: int) -> None:
        if threading.get_ident() not in idents:
            idents.add(threading.get_ident())
            both.wait()
        for row in range(start, stop):
            done[row] += 1

    with threads_of_torch(2):
        over_rows(len(done), 2**20, work)
    assert done == [1] * len(done)
    assert len(idents) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_thread_raises_reaches_the_caller(error: type[BaseException]) -> None:
    def work(start: int, stop: int) -> None:
        if start <= 500 < stop:
            raise error("row 500")

    with threads_of_torch(2), pytest.raises(error, match="row 500"):
        over_rows(1000, 2**20, work)


def test_what_work_refers_to_goes_with_the_call() -> None:
    class Held:
        rows = 0

    held = Held()
    watched = weakref.ref(held)

    def work(start: int, stop: int, held: Held = held) -> None:
        held.rows += stop - start

    gc.disable()
    try:
        with threads_of_torch(2):
            over_rows(1000, 2**20, work)
        del work, held
        assert watched() is None
    finally:
        gc.enable()


FORKED = """
import os
import torch
from fewbits.kernels.threads import over_rows
from fewbits import Int4Asymmetric, QuantLinear
torch.set_num_threads(2)
layer, x = QuantLinear.from_linear(torch.nn.Linear(1024, 1024), Int4Asymmetric(128)), torch.ones(1, 1024)
def rows():
    done = []
    over_rows(1000, 2**20, lambda start, stop: done.append(stop - start))
    return sum(done)
with torch.no_grad():
    y = layer(x)
    assert rows() == 1000
    child = os.fork()
    if child == 0:
        os._exit(0 if rows() == 1000 and torch.equal(layer(x), y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


def test_callers_with_threads_of_their_own_do_not_wait_for_each_other() -> None:
    def caller(number: int) -> int:
        total = []
        over_rows(1000, 2**20, lambda start, stop: total.append(stop - start))
        return sum(total) + number

    with threads_of_torch(2), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(caller, range(40))) == [1000 + number for number in range(40)]
