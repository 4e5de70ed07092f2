"""What every family of environments gives: one flat, normalised Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from modip.errors import UserError

Array = NDArray[np.float32]
RawEnv = gymnasium.Env[Any, Any]


@dataclass(frozen=True)
class Bounds:
    """The range of an environment's actions (Da,), to bring them into [-1, 1] and back."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def scale(self) -> NDArray[np.float64]:
        """Units per 1."""
        return (self.high - self.low) / 2

    @property
    def offset(self) -> NDArray[np.float64]:
        """Where 0 is."""
        return (self.high + self.low) / 2

    def normalised(self, action: NDArray[Any]) -> Array:
        """Actions (..., Da) in the environment's units to [-1, 1]."""
        return ((action - self.offset) / self.scale).astype(np.float32)


class Adapter(gymnasium.Wrapper[Array, Array, Any, Any]):
    """One environment with observation (Do,) float32 and action (Da,) in [-1, 1].

    A family overrides `observe`, `command`, `outcome` where its environment differs.
    """

    compared = slice(None)
    """The numbers of an observation that tell whether a recorded step is this simulator's."""
    tolerance = 0.1
    """How far a step may be from a recorded one without doubt, in standard deviations of a step's change."""

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
        self.bounds = Bounds(low, high)
        self._scale, self._offset = self.bounds.scale, self.bounds.offset
        self._dtype = space.dtype
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, space.shape, np.float32)

    def observe(self, raw: Any) -> Array:
        """The flat observation (Do,) of what the environment answered."""
        return np.asarray(raw, np.float32)

    def command(self, action: Array) -> NDArray[Any]:
        """The environment's own action for a normalised one in [-1, 1]."""
        return (self._offset + self._scale * action).astype(self._dtype)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        """Reward as this family defines it, and success so far."""
        return reward, False

    def restore(self, obs: Array) -> str | None:
        """Puts the simulator, whatever it did before, into the state that an observation (Do,) shows.

        The place of what is not observed and has no effect (how far a robot has run) is free. Gives None, or
        why it cannot be done.
        """
        return "the observation does not determine the simulator's state"

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


class Facts(NamedTuple):
    """What a family knows of an environment without building it; its actions are in [-1, 1]."""

    obs_dim: int
    action_dim: int
    max_episode_steps: int
    has_success: bool


class Outcome(NamedTuple):
    """What n environments answered to one step each."""

    obs: Array  # (n, Do)
    reward: NDArray[np.float64]  # (n,)
    terminated: NDArray[np.bool_]  # (n,)
    truncated: NDArray[np.bool_]  # (n,) by more than the time limit
    success: NDArray[np.bool_]  # (n,) of the episode so far


Stepper = Callable[[NDArray[np.int64], Array], Outcome]
"""Steps the environments `rows` (n,), n > 0, with actions (n, Da), clipped to [-1, 1]."""


def one_by_one(envs: Sequence[Adapter]) -> Stepper:
    """Steps environments in turn."""

    def step(rows: NDArray[np.int64], action: Array) -> Outcome:
        answers = [envs[row].step(command) for row, command in zip(rows, action, strict=True)]
        obs, reward, terminated, truncated, info = zip(*answers, strict=True)
        return Outcome(
            np.stack(obs),
            np.array(reward, np.float64),
            np.array(terminated),
            np.array(truncated),
            np.array([one.get("is_success", False) for one in info]),
        )

    return step


@dataclass(frozen=True)
class Family:
    """One family: how it is recognised and built, and what its numbers mean.

    `success_at_end` tells success from the last reward and terminated flag of a recorded
    episode; None where a recording does not show it. `mirror` has the sign of each number of an
    observation and of an action in the mirror image of an episode, where that is an episode too.
    `stepper` gives what steps several of its environments.
    `reference` gives D4RL's returns of a random and of an expert policy, where there are such.
    `keys` names the parts of a recorded Dict observation that make the flat one; None: all of them.
    `facts` spares the building of a simulator that takes hundreds of megabytes, where only its shapes are asked for.
    `obs_note` says which recordings fit, where observations of a wrong width have a likely cause.
    """

    matches: Callable[[str], bool]
    make: Callable[[str, str | None], Adapter]
    packages: tuple[str, ...]
    reward_note: str
    success_at_end: Callable[[float, bool], bool] | None
    mirror: tuple[int, ...] | None = None
    stepper: Callable[[Sequence[Adapter]], Stepper] = one_by_one
    reference: Callable[[str], tuple[float, float] | None] = lambda env_id: None
    keys: tuple[str, ...] | None = None
    obs_note: str = ""
    facts: Callable[[str], Facts] | None = None


def versions(packages: tuple[str, ...]) -> str:
    """Installed versions as one line: "gymnasium-robotics 1.4.2, mujoco 3.9.0"."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
