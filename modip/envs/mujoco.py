"""Gymnasium's MuJoCo locomotion: observations and rewards as they are, D4RL reference returns."""

from __future__ import annotations

import re

import gymnasium

from modip.envs.family import Adapter, Family

# Returns of D4RL's random and expert policies (d4rl/infos.py). They were measured on older
# simulators: a v5 return scored with them is indicative, not a D4RL result.
REFERENCE_RETURNS = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One locomotion environment."""
    env = gymnasium.make(env_id, disable_env_checker=True, render_mode=render_mode)
    shape = env.observation_space.shape
    assert shape is not None
    return Adapter(env, shape[0], has_success=False)


FAMILY = Family(
    matches=lambda env_id: (
        re.fullmatch(r"(HalfCheetah|Hopper|Walker2d|Ant|Swimmer)-v[45]", env_id) is not None
    ),
    make=make,
    packages=("gymnasium", "mujoco"),
    reward_note="the environment's own reward; no success",
    success_at_end=None,
    reference=lambda env_id: REFERENCE_RETURNS.get(env_id.partition("-")[0]),
)
