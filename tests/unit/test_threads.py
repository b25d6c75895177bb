"""What waits for whom: torch's threads are told to sleep while it can still be told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TOLD = """
import os
from fewbits.kernels.threads import rest_between_products
{before}
rest_between_products()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


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
