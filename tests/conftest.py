"""Fixtures that all tests share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "src" / "fewbits" / "kernels"


def pytest_configure() -> None:
    """Forget compiled kernels that are older than any kernel's source: Numba looks at the file of each alone."""
    newest = max(file.stat().st_mtime for file in KERNELS.glob("*.py"))
    for file in (KERNELS / "__pycache__").glob("*.nb[ic]"):
        if file.stat().st_mtime < newest:
            file.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where the system lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
