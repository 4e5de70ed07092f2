"""The Adroit hand: open a door, hammer a nail, turn a pen, relocate a ball; dense rewards, 200 steps.

Success is info["success"] of Gymnasium-Robotics (door open beyond 1.35 rad; nail within 1 cm of its place; pen within
7.5 cm and turned to a cosine above 0.95; ball within 10 cm of its goal) at any step of the episode so far. D4RL counts
an episode only if its goal holds for more than 25 steps (20 for the pen): its rates are lower.

Returns are not quite D4RL's: Gymnasium-Robotics 1.4 adds 0.1 x the hand's distance from handle, hammer or ball where
D4RL subtracts it. That is a few points of thousands, so the scores stand, to be read beside the return. The pen has no
score: D4RL's is of 100 steps and ends when the pen is dropped, this one goes on for 200.
"""

from __future__ import annotations

import re
from typing import Any

import gymnasium

from modip.envs import fetch
from modip.envs.family import Adapter, Array, Family, RawEnv

# Returns of D4RL's random and expert policies: d4rl/infos.py, and d4rl/hand_manipulation_suite/__init__.py.
REFERENCE_RETURNS = {
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
}


class _AdroitAdapter(Adapter):
    def __init__(self, env: RawEnv) -> None:
        shape = env.observation_space.shape
        assert shape is not None
        super().__init__(env, shape[0], has_success=True)
        self._reached = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        self._reached = False
        return super().reset(seed=seed, options=options)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        self._reached = self._reached or bool(info["success"])
        return reward, self._reached


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One Adroit task of 200 steps."""
    fetch.register()
    return _AdroitAdapter(gymnasium.make(env_id, disable_env_checker=True, render_mode=render_mode))


FAMILY = Family(
    matches=lambda env_id: (
        re.fullmatch(r"AdroitHand(Door|Hammer|Pen|Relocate)-v1", env_id) is not None
    ),
    make=make,
    packages=("gymnasium-robotics", "mujoco"),
    reward_note="the environment's own dense reward; success: its goal reached at any step",
    success_at_end=None,
    reference=lambda env_id: REFERENCE_RETURNS.get(env_id.partition("-")[0]),
)
