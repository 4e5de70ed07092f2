"""Any other registered Gymnasium environment with flat observations and bounded actions."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from modip.envs import fetch
from modip.envs.family import Adapter, Array, Family, RawEnv
from modip.errors import UserError


class _CustomAdapter(Adapter):
    """Flat observations: a Box as it is, a Dict of Boxes in Gymnasium's (sorted) key order."""

    def __init__(self, env: RawEnv) -> None:
        space = env.observation_space
        boxes = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
        if not all(isinstance(box, spaces.Box) and len(box.shape) == 1 for box in boxes):
            name = env.spec.id if env.spec else "?"
            raise UserError(
                f"env {name}: its observation space is {space}; modip needs a flat Box or a "
                "Dict of flat Boxes (wrap the environment and register it under its own id)"
            )
        self._raw_space = space
        super().__init__(env, spaces.flatdim(space), has_success=False)
        # Only a step tells whether the environment reports success.
        env.reset(seed=0)
        self.has_success = (
            "is_success" in env.step(self.command(np.zeros(self.bounds.low.shape, np.float32)))[4]
        )

    def observe(self, raw: Any) -> Array:
        return np.asarray(spaces.flatten(self._raw_space, raw), np.float32)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, bool(info["is_success"]) if self.has_success else False


def make(env_id: str, render_mode: str | None) -> Adapter:
    """The environment registered under `env_id`; an id may begin with "module:"."""
    if env_id not in gymnasium.registry:
        fetch.register()  # the rest of gymnasium-robotics: kitchen, hands, mazes
    # An environment that draws nothing may not know the argument at all.
    wanted: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    return _CustomAdapter(gymnasium.make(env_id, disable_env_checker=True, **wanted))


FAMILY = Family(
    matches=lambda env_id: True,
    make=make,
    packages=("gymnasium",),
    reward_note="the environment's own reward; success: its info['is_success'], where it has one",
    success_at_end=None,
)
