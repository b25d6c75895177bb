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

map_large_blocks()
before = resident()
with kept_memory():
    torch.ones(8 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_are_used_again_and_handed_back_at_the_end() -> None:
    printed = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True).stdout
    faults, left_mib = map(int, printed.split())
    assert faults < 1000  # 32 MiB are 8192 pages
    assert left_mib < 40
