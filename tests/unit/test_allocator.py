"""Blocks are kept for what comes next, or go back to the system at once."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ONLY_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
MEASURES = """
import resource, torch
from fewbits.allocator import keep_blocks, returned_blocks

def resident():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

def freed():
    # 16 blocks of 12 MB, behind which another one lives on.
    blocks = [torch.ones(3 << 20) for _ in range(16)]
    last = torch.ones(3 << 20)
    before = resident()
    del blocks
    return before - resident()

def faults():
    # 16 MB of results, ten times.
    rows, columns = torch.randn(64, 128), torch.zeros(128, 1 << 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        (rows @ columns).softmax(-1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_blocks()
"""


def printed(script: str) -> list[int]:
    run = subprocess.run([sys.executable, "-c", MEASURES + script], check=True, capture_output=True, text=True)
    return [int(number) for number in run.stdout.split()]


@ONLY_GLIBC
def test_blocks_freed_below_one_that_lives_are_returned_where_asked() -> None:
    (returned_mib,) = printed(
        """
with returned_blocks():
    print(freed())
"""
    )
    (kept_mib,) = printed(
        """
with returned_blocks():
    pass
print(freed())
"""
    )
    assert returned_mib > 150
    assert kept_mib < 50


@ONLY_GLIBC
def test_kept_blocks_are_used_again() -> None:
    (kept,) = printed("faults(); print(faults())")
    (returned,) = printed(
        """
with returned_blocks():
    faults()
    print(faults())
"""
    )
    # Two results of 16 MB, ten times, in pages of 4 KB.
    assert returned > 10 * 2 * 16 * 256 / 2
    assert kept < returned / 4
