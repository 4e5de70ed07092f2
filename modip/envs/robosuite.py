"""robosuite's manipulation tasks as RoboMimic uses them: Panda arms, low-dimensional state, 20 Hz.

What decides an episode is what `env_args` of RoboMimic's v1.5 files say: OSC_POSE commands as
differences in the world frame, full physics at every sub-step, observations in the order end effector
position (3), quaternion (4), gripper (2) of each arm, then the objects. The time limits are those of
RoboMimic's rollouts on proficient-human data.

Success counts when it is reached at any step. An episode ends there, with reward 1, as in RoboMimic's
rollouts (`terminate_on_success`). The ids in -dense have robosuite's shaped reward instead, and go on
to the time limit: ending them at success would make it cost reward.

One deviation: robosuite answers a step with positions from one physics sub-step (2 ms) before its end.
Here observation and reward are those of the state that was reached, as in the files, whose makers set
each state before they read it. Also as there, where an object stands relative to a gripper (Can, Square,
ToolHang) is told from the object's place one step before: robosuite computes it first.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec as GymnasiumSpec
from numpy.typing import NDArray

from modip.envs.family import Adapter, Array, Family
from modip.errors import UserError

PREFIX = "robosuite/"
RELEASE = "1.5"
"""The release of robosuite that the ids mean: data of another do not fit."""
UNSEEDED = ("1.5.0", "1.5.1")
"""Versions whose placement of objects no seed of the environment reaches."""
CONTROL_HZ = 20
REACHED = 1.0 - 1e-4
"""From this reward on a task is solved: at most 0.7 is paid before, in the dense forms too."""


@dataclass(frozen=True)
class Task:
    """One id: robosuite's name of the task, and its numbers."""

    name: str
    arms: int
    object_dim: int
    max_episode_steps: int
    dense: bool = False

    @property
    def obs_dim(self) -> int:
        """Do."""
        return 9 * self.arms + self.object_dim

    @property
    def action_dim(self) -> int:
        """Da: per arm three of motion, three of rotation, and the gripper (1 closes, -1 opens)."""
        return 7 * self.arms

    def obs_keys(self, objects: str) -> tuple[str, ...]:
        """Parts of an observation in order; robosuite and RoboMimic name the last one differently."""
        robot = ("eef_pos", "eef_quat", "gripper_qpos")
        return *(f"robot{arm}_{part}" for arm in range(self.arms) for part in robot), objects


TASKS = {
    "robosuite/Lift": Task("Lift", 1, 10, 400),
    "robosuite/Lift-dense": Task("Lift", 1, 10, 400, dense=True),
    "robosuite/PickPlaceCan": Task("PickPlaceCan", 1, 14, 400),
    "robosuite/PickPlaceCan-dense": Task("PickPlaceCan", 1, 14, 400, dense=True),
    "robosuite/NutAssemblySquare": Task("NutAssemblySquare", 1, 14, 400),
    "robosuite/TwoArmTransport": Task("TwoArmTransport", 2, 41, 700),
    "robosuite/ToolHang": Task("ToolHang", 1, 44, 700),
}

CONTROLLER: dict[str, Any] = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_ref_frame": "world",
    "interpolation": None,
    "ramp_ratio": 0.2,
    "gripper": {"type": "GRIP"},
}
"""RoboMimic's controller of an arm, in the words of robosuite 1.5."""


def task(env_id: str) -> Task:
    """The task of an id. Raises UserError for one that there is not."""
    if env_id not in TASKS:
        raise UserError(f"env {env_id}: no such robosuite task; there are {', '.join(TASKS)}")
    return TASKS[env_id]


def installed() -> str | None:
    """The version of robosuite that is installed, if one is."""
    try:
        return metadata.version("robosuite")
    except metadata.PackageNotFoundError:
        return None


def of_release(version: str) -> bool:
    """Whether a version of robosuite is one of the release that the ids mean."""
    return version.split(".")[:2] == RELEASE.split(".")


def reached(reward: NDArray[Any] | float) -> Any:
    """Where a task is solved, told from rewards of any shape, sparse or dense."""
    return np.asarray(reward) >= REACHED


def _import() -> Any:
    """The package, without its advice on the terminal and its choice of MUJOCO_GL for the process."""
    logging.getLogger("robosuite_logs").addFilter(_only_errors)
    chosen = os.environ.get("MUJOCO_GL")
    try:
        import robosuite
    finally:
        if chosen is None:
            os.environ.pop("MUJOCO_GL", None)
        else:
            os.environ["MUJOCO_GL"] = chosen
    return robosuite


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class RobosuiteEnv(gymnasium.Env[dict[str, Any], Array]):
    """A robosuite task behind Gymnasium's interface; observations are robosuite's dictionaries."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, env_id: str) -> None:
        self._task = task(env_id)
        self.spec = GymnasiumSpec(
            env_id,
            f"{__name__}:RobosuiteEnv",
            max_episode_steps=self._task.max_episode_steps,
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self._task.action_dim,), np.float32)
        self._simulation = _import().make(
            self._task.name,
            robots=["Panda"] * self._task.arms,
            controller_configs={"type": "BASIC", "body_parts": {"right": CONTROLLER}},
            control_freq=CONTROL_HZ,
            lite_physics=False,
            reward_shaping=self._task.dense,
            use_object_obs=True,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            ignore_done=True,  # the time limit is counted here
        )
        for name in self._simulation.observation_names:
            # Observed once a step, by `_observation`, and never in between.
            self._simulation.modify_observable(name, "sampling_rate", 1e-9)
        self._steps = 0
        self._model = ""  # the recorded scene that is loaded, if one is

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            # Samplers keep the generator they were first given: set its state, do not replace it.
            wanted = np.random.default_rng(seed).bit_generator.state
            self._simulation.rng.bit_generator.state = wanted
        self._steps, self._model = 0, ""
        return self._simulation.reset(), {}

    def place(
        self, model: str, before: NDArray[Any], state: NDArray[Any], past: NDArray[Any]
    ) -> None:
        """Sets a recorded scene (its `model` as XML) and flattened simulator state.

        `before` is the state one step earlier, of which an observation has a part, and `past`
        (n, Da) all actions so far: a gripper's command is the sum of its past ones.
        """
        if model != self._model:
            self._simulation.reset_from_xml_string(model)
            self._model = model
        for one in (before, state):
            self._simulation.sim.set_state_from_flattened(one)
            self._simulation.sim.forward()
            self._observation()  # what the next one has of the state before
        for arm, robot in enumerate(self._simulation.robots):
            robot.part_controllers["right"].update(force=True)  # else it acts on the last state
            gripper = robot.gripper["right"]
            gripper.current_action = np.zeros(gripper.dof)
            for action in past[:, 7 * arm + 6, None]:
                gripper.format_action(action)
        self._steps = 0

    def step(self, action: Array) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._simulation.step(action)
        self._simulation.sim.forward()
        self._steps += 1
        reward = float(self._simulation.reward(action))
        terminated = not self._task.dense and bool(reached(reward))
        truncated = self._steps >= self._task.max_episode_steps
        return self._observation(), reward, terminated, truncated, {}

    def _observation(self) -> dict[str, Any]:
        observation: dict[str, Any] = self._simulation._get_observations(force_update=True)
        return observation

    def close(self) -> None:
        """Frees the simulator."""
        self._simulation.close()


class _RobosuiteAdapter(Adapter):
    def __init__(self, env: RobosuiteEnv, what: Task) -> None:
        super().__init__(env, what.obs_dim, has_success=True)
        self._keys = what.obs_keys("object-state")
        self._reached = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        self._reached = False
        return super().reset(seed=seed, options=options)

    def observe(self, raw: Any) -> Array:
        return np.concatenate([raw[key] for key in self._keys]).astype(np.float32)

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        self._reached = self._reached or bool(reached(reward))
        return reward, self._reached


def place(
    env: Adapter, model: str, before: NDArray[Any], state: NDArray[Any], past: NDArray[Any]
) -> None:
    """Sets an environment of this family to a recorded state, as `Adapter.restore` does.

    `model` is the scene as XML, `before` and `state` the flattened simulator states of the step before
    and of the one to set, `past` (n, Da) the actions up to it. `env.step` goes on from there.
    """
    inner = env.unwrapped
    assert isinstance(inner, RobosuiteEnv)
    inner.place(model, before, state, past)


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One robosuite task. Raises UserError where robosuite is missing, or of another release."""
    what, version = task(env_id), installed()
    if version is None or not of_release(version) or version in UNSEEDED:
        raise UserError(
            f"env {env_id}: it needs robosuite {RELEASE}, from {RELEASE}.2 on, and "
            f"{'none' if version is None else version} is installed; `make robosuite` gives an "
            "environment with it (it is not in the default one, for it needs NumPy below 2)"
        )
    return _RobosuiteAdapter(RobosuiteEnv(env_id), what)


FAMILY = Family(
    matches=lambda env_id: env_id.startswith(PREFIX) and not env_id.endswith("-dense"),
    make=make,
    packages=("robosuite", "mujoco"),
    reward_note="1 at success, which ends the episode, else 0; success: reached at any step",
    success_at_end=lambda last_reward, terminated: terminated,
)
DENSE_FAMILY = replace(
    FAMILY,
    matches=lambda env_id: env_id.startswith(PREFIX) and env_id.endswith("-dense"),
    reward_note="robosuite's shaped reward up to the time limit; success: reached at any step",
    success_at_end=None,
)
