"""CPU time of callables that take turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Effort(NamedTuple):
    """How long to measure; the smallest is a smoke test."""

    rounds: int
    seconds: float  # per callable and round


class Row(NamedTuple):
    """One figure of the report over the rounds, and what it should be."""

    name: str
    values: list[float]
    unit: str
    wanted: str = ""

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "median": statistics.median(self.values),
            "min": min(self.values),
            "max": max(self.values),
            "unit": self.unit,
        }


def rounds(cases: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Seconds of process CPU time per call of each case, one number per round.

    The order rotates from round to round; ratios belong within a round.
    """
    repeats = {}
    for name, case in cases.items():
        case()  # warm: allocations, caches, kernels chosen on first use
        start = time.process_time()
        case()
        repeats[name] = max(1, round(effort.seconds / max(time.process_time() - start, 1e-6)))
    names = list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(effort.rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.process_time()
            for _ in range(repeats[name]):
                cases[name]()
            times[name].append((time.process_time() - start) / repeats[name])
    return times


def ratio(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def scaled(times: list[float], factor: float) -> list[float]:
    return [factor * t for t in times]
