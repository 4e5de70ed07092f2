"""FrankaKitchen: four sub-tasks in 280 steps, in two observations that are never interchangeable.

The simulator is Gymnasium-Robotics' FrankaKitchen-v1 for both, one id for each set of sub-tasks and observation:

modip/KitchenD4RL-...-v0, for D4RL's kitchen-*-v0 files: 60 numbers, positions only
  0..8    robot joints 1 to 7, two gripper fingers
  9..29   objects, as they lie in qpos[9:30]: knob 1, bottom right burner, knob 2, bottom left burner, knob 3, top right
          burner, knob 4, top left burner (9..16); light switch, light (17, 18); slide cabinet (19); left and right
          hinge cabinet (20, 21); microwave (22); kettle's place and quaternion (23..29)
  30..59  the goal: in the places of the sub-tasks' joints (30 + index in 0..29) their goal positions, elsewhere 0
  (d4rl/kitchen/adept_envs/franka/kitchen_multitask_v0.py, _get_obs; d4rl/kitchen/kitchen_envs.py, _get_task_goal)
modip/Kitchen-...-v1, for Minari's D4RL/kitchen/*-v2: the 59 numbers under Gymnasium-Robotics' key `observation`
  0..8    robot positions, 9..17 its velocities, 18..38 the 21 object positions in the order above, 39..58 object
          velocities (20: the kettle turns with 3); the goals are not in it

A sub-task is done once the norm from its joints to OBS_ELEMENT_GOALS is below 0.3; each counts once, at the step that
does it, and the episode ends when all four are done: the return is the number of sub-tasks done.
D4RL's environment observes ten times the noise on the robot (ratio 0.1; the arm's control starts from it) and more on
the objects, which is set here for its ids; it judges sub-tasks by the noisy positions, the simulator used here does not.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec as GymnasiumSpec
from numpy.typing import NDArray

from modip.envs import fetch
from modip.envs.family import Adapter, Array, Facts, Family, RawEnv

TASKS = {
    "microwave-kettle-light-slide": ("microwave", "kettle", "light switch", "slide cabinet"),
    "microwave-kettle-bottom_burner-light": (
        "microwave",
        "kettle",
        "bottom burner",
        "light switch",
    ),
}
"""Sub-tasks by their name in an id: of D4RL's complete and partial, and of its mixed."""
D4RL_IDS = {f"modip/KitchenD4RL-{name}-v0": tasks for name, tasks in TASKS.items()}
MINARI_IDS = {f"modip/Kitchen-{name}-v1": tasks for name, tasks in TASKS.items()}
ENV_IDS = {**D4RL_IDS, **MINARI_IDS}
"""The sub-tasks of every id."""
STEPS = 280
D4RL_NOISE = 0.1
ROBOT, OBJECTS = slice(0, 9), slice(18, 39)
"""Where the simulator's observation of 59 holds positions."""
NOTE = (
    "60 numbers, D4RL's positions and goal, and 59, Minari's positions and velocities, are not interchangeable: "
    "`source: d4rl` goes with modip/KitchenD4RL-...-v0, `source: minari` with modip/Kitchen-...-v1"
)


def goal(env_id: str) -> NDArray[np.float64]:
    """D4RL's goal (30,) of an id: goal positions of its sub-tasks' joints, 0 elsewhere."""
    indices, goals, _ = _simulator()
    whole = np.zeros(30)
    for task in ENV_IDS[env_id]:
        whole[indices[task]] = goals[task]
    return whole


def done(env_id: str, observation: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of the four sub-tasks are done in observations (N, 59 or 60): (N, 4)."""
    indices, goals, threshold = _simulator()
    start = 9 if env_id in D4RL_IDS else OBJECTS.start
    distances = [
        np.linalg.norm(observation[:, indices[task] - 9 + start] - goals[task], axis=1)
        for task in ENV_IDS[env_id]
    ]
    return np.stack(distances, axis=1) < threshold


def _simulator() -> tuple[Any, Any, float]:
    """Joints and goals of every sub-task, and how near is done, from the simulator itself."""
    fetch.register()
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    return (
        kitchen_env.OBS_ELEMENT_INDICES,
        kitchen_env.OBS_ELEMENT_GOALS,
        kitchen_env.BONUS_THRESH,
    )


class _KitchenAdapter(Adapter):
    """The simulator's observation of 59, or D4RL's, with its goal (30,)."""

    compared = ROBOT  # the rest is mostly noise, step by step
    tolerance = 0.5

    def __init__(self, env: RawEnv, env_id: str) -> None:
        self._env_id = env_id
        self._goal = goal(env_id) if env_id in D4RL_IDS else None
        super().__init__(env, 59 if self._goal is None else 60, has_success=True)

    def observe(self, raw: Any) -> Array:
        seen = raw["observation"]
        if self._goal is not None:
            seen = np.concatenate((seen[ROBOT], seen[OBJECTS], self._goal))
        return np.asarray(seen, np.float32)

    def restore(self, obs: Array) -> str | None:
        """As far as the noise of an observation lets it; the sub-tasks done in it count as done before."""
        if self._goal is not None:
            return "velocities are not observed"
        kitchen: Any = self.unwrapped
        robot, seen = kitchen.robot_env, obs.astype(np.float64)
        position = np.concatenate((seen[ROBOT], seen[OBJECTS]))
        velocity = np.concatenate((seen[9:18], seen[39:]))
        robot.set_state(position, velocity)
        robot._last_robot_qpos = seen[ROBOT]  # the arm's control starts from it
        achieved = done(self._env_id, obs[None])[0]
        tasks = ENV_IDS[self._env_id]
        kitchen.episode_task_completions = [t for t, d in zip(tasks, achieved, strict=True) if d]
        kitchen.tasks_to_complete = set(tasks) - set(kitchen.episode_task_completions)
        return None

    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, all_done(reward, terminated)


def all_done(reward: float, terminated: bool) -> bool:
    """Whether all four sub-tasks are done: the episode ends there."""
    return terminated


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One kitchen of 280 steps."""
    fetch.register()
    kwargs: dict[str, Any] = {"tasks_to_complete": list(ENV_IDS[env_id])}
    if env_id in D4RL_IDS:
        kwargs |= {"robot_noise_ratio": D4RL_NOISE, "object_noise_ratio": D4RL_NOISE}
    spec = GymnasiumSpec(
        env_id,
        "gymnasium_robotics.envs.franka_kitchen:KitchenEnv",
        max_episode_steps=STEPS,
        kwargs=kwargs,
    )
    env = gymnasium.make(spec, disable_env_checker=True, render_mode=render_mode)
    return _KitchenAdapter(env, env_id)


FAMILY = Family(
    matches=lambda env_id: env_id in ENV_IDS,
    make=make,
    packages=("gymnasium-robotics", "mujoco"),
    reward_note=(
        "1 for each sub-task when it is first done, so that return / 4 is the share of sub-tasks done (the "
        "normalised score / 100); ends when all four are; success: all four done"
    ),
    success_at_end=all_done,
    reference=lambda env_id: (0.0, 4.0),
    keys=("observation",),
    obs_note=NOTE,
    facts=lambda env_id: Facts(60 if env_id in D4RL_IDS else 59, 9, STEPS, has_success=True),
)
