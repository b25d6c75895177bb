"""Large blocks go back to the system at once, or behind a loop that wants them kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED = """
import torch
from fewbits.allocator import map_large_blocks

def resident():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

assert map_large_blocks()
# The first free of a block this large would make glibc keep later ones.
torch.ones(3 << 20)
blocks = [torch.ones(3 << 20) for _ in range(16)]
last = torch.ones(3 << 20)
before = resident()
del blocks
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_freed_below_one_that_lives_are_not_kept() -> None:
    freed_mib = int(subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, text=True).stdout)
    assert freed_mib > 150


KEPT = """
import resource, torch
from fewbits.allocator import kept_memory, map_large_blocks

def resident():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rows = torch.randn(64, 128)
    for _ in range(10):
        (rows @ rows.new_zeros(128, 1 << 16)).softmax(-1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

map_large_blocks()
mapped = faults()
before = resident()
with kept_memory():
    kept = faults()
print(mapped, kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_are_used_again_and_handed_back_at_the_end() -> None:
    printed = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True).stdout
    mapped, kept, left_mib = map(int, printed.split())
    assert kept < mapped / 2
    assert left_mib < 40
