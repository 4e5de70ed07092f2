"""The toy task: a point walks to a goal; its best return is known in closed form."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec as GymnasiumSpec
from numpy.typing import NDArray

from modip.envs.family import Adapter, Array, Family

ENV_ID = "modip/Toy-v0"
STEPS = 20
SPEED = 0.1
AT_GOAL = 0.1


class ToyEnv(gymnasium.Env[Array, Array]):
    """Observation (position, goal) in [-1, 1]^2 each; the action is a velocity.

    position <- clip(position + 0.1 * action); reward = 1 - |position - goal| after the move.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self._state = np.zeros(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = self.np_random.uniform(-1.0, 1.0, 4)
        return self._state.astype(np.float32), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self._state[:2] = np.clip(self._state[:2] + SPEED * action, -1.0, 1.0)
        reward = 1.0 - float(np.linalg.norm(self._state[:2] - self._state[2:]))
        return self._state.astype(np.float32), reward, False, False, {}

    def place(self, obs: Array) -> None:
        """Sets point and goal as observed (4,)."""
        self._state = obs.astype(np.float64)

    def render(self) -> NDArray[np.uint8]:
        """A 128 x 128 picture: the goal green, the point blue."""
        frame = np.full((128, 128, 3), 255, np.uint8)
        for (x, y), colour in (
            (self._state[2:], (120, 200, 120)),
            (self._state[:2], (60, 80, 200)),
        ):
            column, row = int(64 + 60 * x), int(64 - 60 * y)
            frame[max(row - 4, 0) : row + 4, max(column - 4, 0) : column + 4] = colour
        return frame


class _ToyAdapter(Adapter):
    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, at_goal(reward, terminated)

    def restore(self, obs: Array) -> str | None:
        raw: Any = self.unwrapped
        raw.place(obs)
        return None


def at_goal(reward: float, terminated: bool) -> bool:
    """Whether the point is within 0.1 of the goal, told from the step's reward."""
    return reward > 1.0 - AT_GOAL


def optimal_return(position: NDArray[Any], goal: NDArray[Any]) -> float:
    """The best return of one episode from `position` (2,) to `goal` (2,).

    Each coordinate moves at most 0.1 a step, both at once, and nothing is gained by waiting:
    taking each coordinate's full step towards the goal is best at every step.
    """
    gap = np.abs(np.asarray(goal, np.float64) - np.asarray(position, np.float64))
    left = np.maximum(gap - SPEED * np.arange(1, STEPS + 1)[:, None], 0.0)
    return float((1.0 - np.linalg.norm(left, axis=1)).sum())


def make(env_id: str, render_mode: str | None) -> Adapter:
    """The toy environment with its limit of 20 steps."""
    spec = GymnasiumSpec(env_id, f"{__name__}:ToyEnv", max_episode_steps=STEPS)
    env = gymnasium.make(spec, disable_env_checker=True, render_mode=render_mode)
    return _ToyAdapter(env, obs_dim=4, has_success=True)


FAMILY = Family(
    matches=lambda env_id: env_id == ENV_ID,
    make=make,
    packages=("gymnasium",),
    reward_note="1 - distance to the goal, 20 steps; success: within 0.1 at the last step",
    success_at_end=at_goal,
)
