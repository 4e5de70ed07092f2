"""What every family of environments gives: one flat, normalised Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from modip.errors import UserError

Array = NDArray[np.float32]
RawEnv = gymnasium.Env[Any, Any]


class Adapter(gymnasium.Wrapper[Array, Array, Any, Any]):
    """One environment with observation (Do,) float32 and action (Da,) in [-1, 1].

    A family overrides `observe`, `command`, `outcome` where its environment differs.
    """

    def __init__(self, env: RawEnv, obs_dim: int, has_success: bool) -> None:
        super().__init__(env)
        if env.spec is None or env.spec.max_episode_steps is None:
            name = env.spec.id if env.spec else type(env.unwrapped).__name__
            raise UserError(f"env {name}: it has no time limit; register it with max_episode_steps")
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UserError(
                f"env {env.spec.id}: its action space is {space}; modip needs a flat Box"
            )
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise UserError(f"env {env.spec.id}: its action bounds {low} to {high} are not finite")
        self.max_episode_steps: int = env.spec.max_episode_steps
        self.has_success = has_success
        self._scale, self._offset = (high - low) / 2, (high + low) / 2
        self._dtype = space.dtype
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, space.shape, np.float32)

    def observe(self, raw: Any) -> Array:
        """The flat observation (Do,) of what the environment answered."""
        return np.asarray(raw, np.float32)

    def command(self, action: Array) -> NDArray[Any]:
        """The environment's own action for a normalised one in [-1, 1]."""
        return (self._offset + self._scale * action).astype(self._dtype)

    def normalised(self, action: NDArray[Any]) -> Array:
        """The inverse of `command` for actions (..., Da) in the environment's units."""
        return ((action - self._offset) / self._scale).astype(np.float32)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        """Reward as this family defines it, and success so far."""
        return reward, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        raw, info = self.env.reset(seed=seed, options=options)
        return self.observe(raw), info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        raw, raw_reward, terminated, truncated, info = self.env.step(
            self.command(np.clip(action, -1.0, 1.0))
        )
        reward, success = self.outcome(float(raw_reward), bool(terminated), info)
        if self.has_success:
            info["is_success"] = success
        return self.observe(raw), reward, bool(terminated), bool(truncated), info


@dataclass(frozen=True)
class Family:
    """One family: how it is recognised and built, and what its numbers mean.

    `success_at_end` tells success from the last reward and terminated flag of a recorded
    episode; None where a recording does not show it. `mirror` has the sign of each number of an
    observation and of an action in the mirror image of an episode, where that is an episode too.
    `reference` gives D4RL's returns of a random and of an expert policy, where there are such.
    `keys` names the parts of a recorded Dict observation that make the flat one; None: all of them.
    `obs_note` says which recordings fit, where observations of a wrong width have a likely cause.
    """

    matches: Callable[[str], bool]
    make: Callable[[str, str | None], Adapter]
    packages: tuple[str, ...]
    reward_note: str
    success_at_end: Callable[[float, bool], bool] | None
    mirror: tuple[int, ...] | None = None
    reference: Callable[[str], tuple[float, float] | None] = lambda env_id: None
    keys: tuple[str, ...] | None = None
    obs_note: str = ""


def versions(packages: tuple[str, ...]) -> str:
    """Installed versions as one line: "gymnasium-robotics 1.4.2, mujoco 3.9.0"."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
