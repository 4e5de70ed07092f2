"""PushT: push a T-shaped block to its pose; features of the state, actions relative to the agent."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from modip.envs.family import Adapter, Array, Family

ENV_ID = "gym_pusht/PushT-v0"
ARENA = 512.0
REACH = 170.0  # pixels from the agent to the target at action 1
OBS_DIM = 8


def features(state: NDArray[Any]) -> Array:
    """States (N, 5) of agent xy, block xy (pixels) and block angle to observations (N, 8).

    Agent and block over half the arena, in [-1, 1]; sine and cosine of the angle; the agent
    as the block sees it, in its own frame, over 100 pixels.
    """
    state = np.asarray(state, np.float64)
    agent, block, angle = state[:, :2], state[:, 2:4], state[:, 4]
    sin, cos = np.sin(angle), np.cos(angle)
    dx, dy = (agent - block).T
    seen = np.stack((cos * dx + sin * dy, cos * dy - sin * dx), axis=1) / 100.0
    half = ARENA / 2
    parts = (agent / half - 1, block / half - 1, sin[:, None], cos[:, None], seen)
    joined: Array = np.concatenate(parts, axis=1).astype(np.float32)
    return joined


def relative_action(target_px: NDArray[Any], agent_px: NDArray[Any]) -> Array:
    """Absolute pixel targets (N, 2) to actions in [-1, 1], given the agent's position then."""
    way = (np.asarray(target_px, np.float64) - np.asarray(agent_px, np.float64)) / REACH
    clipped: Array = np.clip(way, -1.0, 1.0).astype(np.float32)
    return clipped


class _PushTAdapter(Adapter):
    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env, OBS_DIM, has_success=True)
        self._agent = np.zeros(2)

    def observe(self, raw: Any) -> Array:
        self._agent = raw[:2]
        return features(raw[None])[0]

    def command(self, action: Array) -> NDArray[Any]:
        return np.clip(self._agent + REACH * action.astype(np.float64), 0.0, ARENA)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, reached(reward, terminated)


def reached(reward: float, terminated: bool) -> bool:
    """Whether the block reached its pose: the episode ends there."""
    return terminated


def make(env_id: str, render_mode: str | None) -> Adapter:
    """PushT with its state observation and 300 steps."""
    with warnings.catch_warnings():
        # pygame asks setuptools for something deprecated when it is first imported.
        warnings.filterwarnings("ignore", message=".*pkg_resources.*")
        import gym_pusht

        gymnasium.register_envs(gym_pusht)
        env = gymnasium.make(
            env_id, disable_env_checker=True, render_mode=render_mode or "rgb_array"
        )
    return _PushTAdapter(env)


FAMILY = Family(
    matches=lambda env_id: env_id == ENV_ID,
    make=make,
    packages=("gym-pusht", "pymunk"),
    reward_note="coverage of the goal / 0.95, ends at success; success: coverage above 0.95",
    success_at_end=reached,
)
