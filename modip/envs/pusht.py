"""PushT: push a T-shaped block to its pose; everything as the block sees it.

Observations and actions are in the block's frame, so that contact looks the same wherever the block lies. The
block is symmetric about its stem: the mirror image of an episode is an episode, in which some numbers change sign.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from modip.envs.family import Adapter, Array, Family

ENV_ID = "gym_pusht/PushT-v0"
KEYPOINTS_ID = "modip/PushTKeypoints-v0"
ARENA = 512.0
REACH = 85.0  # pixels from the agent to the target at action 1
OBS_DIM = 9
GOAL = np.array([256.0, 256.0, np.pi / 4])  # x, y, angle
MIRROR = (-1, 1, -1, 1, -1, 1, -1, 1, 1, -1, 1)
"""Sign of each number of an observation (9) and of an action (2) in the mirror image."""


@functools.cache
def _tee() -> Any:
    """The block's outline in its own frame, in pixels."""
    import shapely

    return shapely.union_all([shapely.box(-60, 0, 60, 30), shapely.box(-15, 30, 15, 120)])


def coverage(goal: NDArray[Any], angle: NDArray[Any]) -> NDArray[Any]:
    """Share of the goal (N,) that a block covers which sees it at `goal` (N, 2), turned by `angle` (N,)."""
    import shapely
    import shapely.affinity

    tee = _tee()
    goals = []
    for (x, y), turn in zip(goal, angle, strict=True):
        c, s = np.cos(turn), np.sin(turn)
        goals.append(shapely.affinity.affine_transform(tee, (c, -s, s, c, x, y)))
    area: NDArray[Any] = shapely.area(shapely.intersection(np.array(goals), tee)) / tee.area
    return area


def turned(vector: NDArray[Any], angle: NDArray[Any]) -> NDArray[Any]:
    """Vectors (N, 2) turned by angles (N,)."""
    sin, cos = np.sin(angle), np.cos(angle)
    x, y = vector.T
    return np.stack((cos * x - sin * y, sin * x + cos * y), axis=1)


def features(state: NDArray[Any], previous: NDArray[Any]) -> Array:
    """States (N, 5), agent xy, block xy (pixels) and block angle, to observations (N, 9).

    In the block's frame: agent and goal over 100 pixels, sine and cosine of the goal's angle, the agent's last
    move (from `previous` (N, 2)) over 10 pixels; then the coverage.
    """
    state = np.asarray(state, np.float64)
    agent, block, angle = state[:, :2], state[:, 2:4], state[:, 4]
    goal, turn = turned(GOAL[:2] - block, -angle), GOAL[2] - angle
    parts = (
        turned(agent - block, -angle) / 100,
        goal / 100,
        np.sin(turn)[:, None],
        np.cos(turn)[:, None],
        turned(agent - previous, -angle) / 10,
        coverage(goal, turn)[:, None],
    )
    joined: Array = np.concatenate(parts, axis=1).astype(np.float32)
    return joined


def relative_action(target_px: NDArray[Any], agent_px: NDArray[Any], angle: NDArray[Any]) -> Array:
    """Pixel targets (N, 2) to actions in [-1, 1], given the agent's position and the block's angle then."""
    way = np.asarray(target_px, np.float64) - np.asarray(agent_px, np.float64)
    clipped: Array = np.clip(turned(way, -angle) / REACH, -1.0, 1.0).astype(np.float32)
    return clipped


class _PushTAdapter(Adapter):
    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env, OBS_DIM, has_success=True)
        self._state: NDArray[Any] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        self._state = None
        return super().reset(seed=seed, options=options)

    def observe(self, raw: Any) -> Array:
        previous = raw if self._state is None else self._state
        self._state = raw
        return features(raw[None], previous[None, :2])[0]

    def command(self, action: Array) -> NDArray[Any]:
        assert self._state is not None
        way = turned(REACH * action[None].astype(np.float64), self._state[4:])[0]
        return np.clip(self._state[:2] + way, 0.0, ARENA)

    def restore(self, obs: Array) -> str | None:
        return "the agent's velocity is not observed"

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, reached(reward, terminated)


def reached(reward: float, terminated: bool) -> bool:
    """Whether the block reached its pose: the episode ends there."""
    return terminated


class _KeypointsAdapter(Adapter):
    """The environment's own numbers, as LeRobot's recordings have them: agent xy and 8 keypoints (18,), in pixels."""

    def observe(self, raw: Any) -> Array:
        return np.concatenate((raw["agent_pos"], raw["environment_state"])).astype(np.float32)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, reached(reward, terminated)


def make(env_id: str, render_mode: str | None) -> Adapter:
    """PushT with 300 steps, observed as the id says."""
    keypoints = env_id == KEYPOINTS_ID
    with warnings.catch_warnings():
        # pygame asks setuptools for something deprecated when it is first imported.
        warnings.filterwarnings("ignore", message=".*pkg_resources.*")
        import gym_pusht

        gymnasium.register_envs(gym_pusht)
        env = gymnasium.make(
            ENV_ID,
            disable_env_checker=True,
            render_mode=render_mode or "rgb_array",
            obs_type="environment_state_agent_pos" if keypoints else "state",
        )
    return _KeypointsAdapter(env, 18, has_success=True) if keypoints else _PushTAdapter(env)


FAMILY = Family(
    matches=lambda env_id: env_id == ENV_ID,
    make=make,
    packages=("gym-pusht", "pymunk"),
    reward_note="coverage of the goal / 0.95, ends at success; success: coverage above 0.95",
    success_at_end=reached,
    mirror=MIRROR,
)

KEYPOINTS_FAMILY = Family(
    matches=lambda env_id: env_id == KEYPOINTS_ID,
    make=make,
    packages=FAMILY.packages,
    reward_note=FAMILY.reward_note,
    success_at_end=reached,
)
