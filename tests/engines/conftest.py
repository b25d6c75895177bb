"""Engines take minutes and are installed elsewhere: these tests run when they are asked for, and say so when not."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `engine` unless `-m engine` asks for them."""
    if "engine" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("engine") is not None:
            item.add_marker(pytest.mark.skip(reason="engines run under `make test-engines`"))
