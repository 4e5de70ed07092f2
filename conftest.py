"""The order of the tests, which of them share a worker, and their settings, for every test file."""

from __future__ import annotations

from pathlib import PurePath

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Time limits per example fail on a busy machine, and random examples fail on someone else's change.
hypothesis.settings.register_profile("modip", deadline=None, derandomize=True)
hypothesis.settings.load_profile("modip")

WHOLE = ("test_end_to_end", "test_flow", "test_liveness", "test_machines", "test_stages")
"""Files whose tests share what takes minutes to make, a server or a clone that has run: one worker takes a whole file."""
RANKS = {"slow": 1, "learn": 1, "e2e": 2}


def _rank(item: pytest.Item) -> tuple[int, bool]:
    if item.path.stem in WHOLE:
        return RANKS["e2e"], False
    rank = max((RANKS.get(mark.name, 0) for mark in item.iter_markers()), default=0)
    return rank, True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a plain mistake shows in seconds; of the others those first that take a worker longest."""
    items.sort(key=_rank)


class Scheduling(LoadScopeScheduling):
    """Test by test to whoever is free, but whole files where that saves much.

    Not by groups: pytest-xdist 3.8 writes a test's group into its name, in a way that pytest 9.2 no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return path if PurePath(path).stem in WHOLE else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return Scheduling(config, log)
