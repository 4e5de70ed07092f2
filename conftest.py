"""The order of the tests, and their settings, for every test file."""

from __future__ import annotations

import hypothesis
import pytest

# Time limits per example fail on a busy machine, and random examples fail on someone else's change.
hypothesis.settings.register_profile("modip", deadline=None, derandomize=True)
hypothesis.settings.load_profile("modip")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a plain mistake shows in seconds."""
    items.sort(
        key=lambda item: sum(mark.name in ("slow", "learn", "e2e") for mark in item.iter_markers())
    )
    for item in items:
        if item.get_closest_marker("e2e"):  # a file's share a clone and a server: in one worker
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
