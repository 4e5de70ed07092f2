"""FetchPickAndPlace and its sisters: a robot arm, a cube, a goal; the reward is time at the goal."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import gymnasium
import numpy as np

from modip.envs.family import Adapter, Array, Family

CUBE_ANGLES = slice(11, 14)
"""Where an observation of 25 holds the cube's Euler angles; FetchReach (10) has no cube."""


class _FetchAdapter(Adapter):
    """Observation: the robot's and the cube's state, the way from the cube to the goal, the cube's turn.

    A cube looks the same after a quarter turn, but its angles then jump by 1.57, far from all data, and whatever
    was learned of the place is lost. So each angle enters as sin and cos of four times itself: the sines in the
    angles' place, the cosines last.
    """

    def observe(self, raw: Any) -> Array:
        state, way = raw["observation"], raw["desired_goal"] - raw["achieved_goal"]
        if len(state) < CUBE_ANGLES.stop:
            return np.concatenate((state, way)).astype(np.float32)
        turn = 4.0 * state[CUBE_ANGLES]
        obs = np.concatenate((state, way, np.cos(turn)))
        obs[CUBE_ANGLES] = np.sin(turn)
        return obs.astype(np.float32)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        # The environment's -1 away from the goal and 0 at it, moved by one: the return
        # counts the steps at the goal.
        return reward + 1.0, at_goal(reward + 1.0, terminated)


def at_goal(reward: float, terminated: bool) -> bool:
    """Whether the cube is at its goal, told from the step's reward (1 there, 0 elsewhere)."""
    return reward > 0.5


def register() -> None:
    """Makes the ids of gymnasium-robotics known to Gymnasium."""
    with contextlib.redirect_stderr(io.StringIO()):
        # Its import prints news about the Adroit environments to stderr.
        import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One Fetch environment of 50 steps."""
    register()
    env = gymnasium.make(env_id, disable_env_checker=True, render_mode=render_mode)
    space = env.observation_space
    assert isinstance(space, gymnasium.spaces.Dict)
    state, way = ((space[part].shape or (0,))[0] for part in ("observation", "desired_goal"))
    cosines = 3 if state >= CUBE_ANGLES.stop else 0
    return _FetchAdapter(env, state + way + cosines, has_success=True)


FAMILY = Family(
    # The sparse forms only: in the dense ones the return does not count steps at the goal.
    matches=lambda env_id: (
        re.fullmatch(r"Fetch(PickAndPlace|Push|Slide|Reach)-v4", env_id) is not None
    ),
    make=make,
    packages=("gymnasium-robotics", "mujoco"),
    reward_note="1 for each of 50 steps at the goal; success: at the goal at the last step",
    success_at_end=at_goal,
)
