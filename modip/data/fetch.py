"""The pick-and-place demonstrator: a waypoint controller that is as bad as its noise level says.

It swings to one side (two modes), goes above the cube, down, closes the gripper, and goes to the
goal. With the noise level grow the Gaussian noise of its actions, the error of its aim at the
cube, and the chances that it closes the gripper early or stops short of the goal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from modip.data import scripted
from modip.data.episodes import Episodes
from modip.data.sources import FetchSource
from modip.envs.family import Array

DESCRIPTION = (
    "Scripted pick-and-place with two approach modes, noisy actions and aim, sometimes closing "
    "early or stopping short."
)
ABOVE = np.array([0.0, 0.0, 0.08])
ACTION_NOISE = 0.18  # at level 1, in units of the largest action
AIM_ERROR = 0.009  # metres at level 1
EARLY_CHANCE = 0.2  # of closing early, at level 1
SHORT_CHANCE = 0.2  # of stopping short, at level 1
GRIP_STEPS = 3


class FetchDemonstrator:
    """One episode's demonstrator. Observation (31,): gripper first, then cube; 25 to 27 cube to goal."""

    def __init__(self, noise: float, rng: np.random.Generator) -> None:
        self._rng = rng
        self._gain = rng.uniform(5.0, 10.0)
        self._swing = rng.choice([-1.0, 1.0]) * rng.uniform(0.04, 0.08)
        self._action_noise = ACTION_NOISE * noise
        self._aim = np.append(rng.normal(size=2) * AIM_ERROR * noise, 0.0)
        self._early = rng.uniform() < EARLY_CHANCE * noise
        self._short = rng.uniform(0.1, 0.5) if rng.uniform() < SHORT_CHANCE * noise else 0.0
        self._phase = "swing"
        self._held = 0
        self._stop = np.zeros(3)

    def act(self, obs: Array) -> Array:
        """The next action: three of motion, and the gripper (1 opens, -1 closes)."""
        gripper, cube, to_goal = obs[:3], obs[3:6], obs[25:28]
        target = self._target(gripper, cube, to_goal)
        move = self._gain * (target - gripper)
        grip = -1.0 if self._phase in ("close", "carry") else 1.0
        noisy = move + self._action_noise * self._rng.normal(size=3)
        action: Array = np.clip(np.append(noisy, grip), -1.0, 1.0).astype(np.float32)
        return action

    def _target(self, gripper: Array, cube: Array, to_goal: Array) -> Array:
        above = cube + self._aim + ABOVE
        sideways = above + np.array([0.0, self._swing, 0.02])
        at_cube = cube + self._aim
        if self._phase == "swing" and _near(gripper, sideways, 0.04):
            self._phase = "above"
        if self._phase == "above" and _near(gripper, above, 0.025):
            self._phase = "down"
        if self._phase == "down" and _near(gripper, at_cube, 0.045 if self._early else 0.012):
            self._phase = "close"
        if self._phase == "close":
            self._held += 1
            if self._held > GRIP_STEPS:
                self._phase = "carry"
                self._stop = gripper + (1.0 - self._short) * to_goal
        waypoints = {"swing": sideways, "above": above, "carry": self._stop}
        target: Array = waypoints.get(self._phase, at_cube)
        return target


def _near(position: Array, target: Array, distance: float) -> bool:
    return float(np.linalg.norm(position - target)) < distance


def collect(dataset: str, config: FetchSource, advance: Callable[[], None]) -> Episodes:
    """Demonstrations of pick-and-place."""
    return scripted.collect(dataset, config, FetchDemonstrator, DESCRIPTION, advance)
