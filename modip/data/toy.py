"""The toy task's demonstrator: straight to the goal, with noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from modip.data import scripted
from modip.data.episodes import Episodes
from modip.data.sources import ToySource
from modip.envs.family import Array

DESCRIPTION = "Scripted walk to the goal at a random pace, with Gaussian action noise."


class ToyDemonstrator:
    """Walks at its own pace; noise level 1 adds noise as large as half the fastest step."""

    def __init__(self, noise: float, rng: np.random.Generator) -> None:
        self._noise, self._rng = 0.5 * noise, rng
        self._pace = 1.0 - 0.5 * min(noise, 1.0) * rng.uniform()

    def act(self, obs: Array) -> Array:
        """Towards the goal, both coordinates at once."""
        way = np.clip((obs[2:] - obs[:2]) / 0.1, -1.0, 1.0) * self._pace
        noisy = way + self._noise * self._rng.normal(size=2)
        action: Array = np.clip(noisy, -1.0, 1.0).astype(np.float32)
        return action


def collect(dataset: str, config: ToySource, advance: Callable[[], None]) -> Episodes:
    """Demonstrations of the toy task."""
    return scripted.collect(dataset, config, ToyDemonstrator, DESCRIPTION, advance)
