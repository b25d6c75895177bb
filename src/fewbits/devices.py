"""Devices: which one was asked for, whether it is there, and how much memory it has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fewbits.errors import KernelError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1").

    Raises:
        KernelError: there is no such kind of device, or none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise KernelError(f"{name!r} is no device.", "use cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise KernelError(f"device {name} was asked for, but torch finds no CUDA device here.", "use cpu")
        if (device.index or 0) >= count:
            raise KernelError(f"device {name} was asked for; there are {count}.", f"use cuda:0 to cuda:{count - 1}")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on the device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    amounts = [amount for amount in (_system_free(), _group_free()) if amount is not None]
    return min(amounts, default=None)


def _system_free() -> int | None:
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _group_free() -> int | None:
    """What a container's limit leaves; pages of files that it counts are given back under pressure."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return int(limit) - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
