"""Gymnasium's MuJoCo locomotion: observations and rewards as they are, D4RL reference returns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from modip.envs.family import Adapter, Array, Family, Outcome, Stepper, one_by_one

# Returns of D4RL's random and expert policies (d4rl/infos.py). They were measured on older
# simulators: a v5 return scored with them is indicative, not a D4RL result.
REFERENCE_RETURNS = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}

_SIMULATORS = "D4RL's recordings are of Gym's v2 environments and an older MuJoCo (mujoco-py)"
_ALIKE = "observations, actions, time step and the rule for a fall are the same"
_FALL = "v2 paid the healthy reward of 1 on the step of a fall too, v5 does not"
# As in the version history of gymnasium/envs/mujoco/*_v5.py. Steps of v4, which has v2's models and rewards, replayed
# in v5 on one MuJoCo show these differences and no others.
DATA_NOTES = {
    "HalfCheetah-v5": f"{_SIMULATORS}. Model, reward and the rest are v5's.",
    "Hopper-v5": f"{_SIMULATORS}: {_ALIKE}; {_FALL}.",
    "Walker2d-v5": (
        f"{_SIMULATORS}: {_ALIKE}; {_FALL}. The right foot's friction was 0.9, the left one's 1.9; in v5 both have 1.9, "
        "so steps on the right foot differ, and returns are not comparable."
    ),
}
"""What differs between D4RL's simulator and the one here."""


@dataclass(frozen=True)
class _Task:
    """The numbers of one environment (gymnasium/envs/mujoco/*_v5.py).

    `low` and `high` bound the positions and velocities after the first, the way run, of a healthy robot.
    """

    control_cost: float
    max_speed: float  # velocities are observed up to ± this
    healthy_reward: float
    low: tuple[float, ...]
    high: tuple[float, ...]


_TASKS = {
    "HalfCheetah-v5": _Task(0.1, np.inf, 0.0, (), ()),
    "Hopper-v5": _Task(1e-3, 10.0, 1.0, (0.7, -0.2, *9 * (-100.0,)), (np.inf, 0.2, *9 * (100.0,))),
    "Walker2d-v5": _Task(1e-3, 10.0, 1.0, (0.8, -1.0), (2.0, 1.0)),
}


class _RunnerAdapter(Adapter):
    """Observation: all positions but the way run, then all velocities."""

    def __init__(self, env: gymnasium.Env[Any, Any], obs_dim: int, task: _Task) -> None:
        super().__init__(env, obs_dim, has_success=False)
        self.task = task

    def restore(self, obs: Array) -> str | None:
        import mujoco

        raw: Any = self.unwrapped
        state = np.append(0.0, obs)  # the robot runs the same everywhere
        position, velocity = np.split(state, [raw.model.nq])
        if (np.abs(velocity) >= self.task.max_speed).any():
            return f"velocities are observed up to {self.task.max_speed:g} only"
        mujoco.mj_resetData(raw.model, raw.data)
        raw.set_state(position, velocity)
        return None


class _Runners:
    """Steps the simulators of Gymnasium's own environments without its wrappers, bit for bit as it does.

    The physics run row by row; observation, reward and end are computed for all rows at once, in Gymnasium's
    order of operations. `mj_rnePostConstraint`, which it calls after a step, is left out: the contact forces
    that it gives are used nowhere. `mujoco.rollout` would step all rows in one call, but costs as much, since
    physics is nearly all there is, and does not give back the solver's warm start (`qacc_warmstart`), without
    which the next step differs in its last bits.
    """

    def __init__(self, envs: Sequence[_RunnerAdapter]) -> None:
        import mujoco

        self._step, self._get_state = mujoco.mj_step, mujoco.mj_getState
        self._parts = int(mujoco.mjtState.mjSTATE_QPOS) | int(mujoco.mjtState.mjSTATE_QVEL)
        raw: list[Any] = [env.unwrapped for env in envs]
        self._simulators = [(one.model, one.data, one.data.qpos, one.data.ctrl) for one in raw]
        self._adapter, self._task = envs[0], envs[0].task
        self._frame_skip, self._dt = raw[0].frame_skip, raw[0].dt
        self._positions, self._width = raw[0].model.nq, raw[0].model.nq + raw[0].model.nv
        self._low, self._high = np.array(self._task.low), np.array(self._task.high)
        # Gymnasium's cost is a Python number times one float32, in NumPy 1 a float64.
        self._cost_type = np.result_type(self._task.control_cost, np.float32(0))

    def __call__(self, rows: NDArray[np.int64], action: Array) -> Outcome:
        task = self._task
        command = self._adapter.command(action.clip(-1.0, 1.0))
        before, state = np.empty(len(rows)), np.empty((len(rows), self._width))
        for i, row in enumerate(rows.tolist()):
            model, data, position, control = self._simulators[row]
            before[i] = position[0]
            control[:] = command[i]
            self._step(model, data, nstep=self._frame_skip)
            self._get_state(model, data, state[i], self._parts)
        bounded = state[:, 1 : 1 + len(self._low)]
        healthy = ((self._low < bounded) & (bounded < self._high)).all(1)
        effort = np.square(command).sum(1)
        cost = np.multiply(task.control_cost, effort, dtype=self._cost_type)
        forward = (state[:, 0] - before) / self._dt
        velocity = state[:, self._positions :]  # a view: health is told from all of it, above
        velocity.clip(-task.max_speed, task.max_speed, out=velocity)
        never = np.zeros(len(rows), np.bool_)
        return Outcome(
            obs=self._adapter.observe(state[:, 1:]),
            reward=forward + healthy * task.healthy_reward - cost,
            terminated=np.logical_not(healthy),
            truncated=never,
            success=never,
        )


def stepper(envs: Sequence[Adapter]) -> Stepper:
    """The fast way where there is one."""
    runners = [env for env in envs if isinstance(env, _RunnerAdapter)]
    return _Runners(runners) if runners else one_by_one(envs)


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One locomotion environment."""
    env = gymnasium.make(env_id, disable_env_checker=True, render_mode=render_mode)
    shape = env.observation_space.shape
    assert shape is not None
    if env_id in _TASKS:
        return _RunnerAdapter(env, shape[0], _TASKS[env_id])
    return Adapter(env, shape[0], has_success=False)


FAMILY = Family(
    matches=lambda env_id: (
        re.fullmatch(r"(HalfCheetah|Hopper|Walker2d|Ant|Swimmer)-v[45]", env_id) is not None
    ),
    make=make,
    packages=("gymnasium", "mujoco"),
    reward_note="the environment's own reward; no success",
    success_at_end=None,
    stepper=stepper,
    reference=lambda env_id: REFERENCE_RETURNS.get(env_id.partition("-")[0]),
)
