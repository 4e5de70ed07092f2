"""CALVIN's table, through its own package calvin_env, for those who have it: one task in one scene.

The observation is robot_obs (15) and scene_obs (24); the action is the data's rel_actions: moves and turns of the hand
in [-1, 1], and the gripper, which opens at 0 and above and else closes. The package's task oracle says when the task is
done: reward 1, and the episode ends (as in DiWA). An episode has at most 360 steps, CALVIN's own limit for one task.

calvin_env (https://github.com/mees/calvin_env) is not on a package registry and does not work on all systems. Its
names used here: envs.play_table_env.PlayTableSimEnv (reset, step, get_info, render, close; robot.gripper_action;
scene.movable_objects), envs.tasks.Tasks.get_task_info_for_set, and its folder conf/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec as GymnasiumSpec
from numpy.typing import NDArray

from modip.envs.family import Adapter, Array, Family
from modip.errors import UserError

STEPS = 360
OBS_DIM, ACTION_DIM = 39, 7
PATTERN = r"calvin/([A-D])-([a-z_]+)"
INSTALL = (
    "`git clone --recursive https://github.com/mees/calvin_env`, then "
    "`pip install -e calvin_env/tacto -e calvin_env` (or use its data offline: converting needs no simulator)"
)

# The start of CALVIN's own evaluation (calvin_agent/evaluation/utils.py): numbers of the simulator, kept as they are.
_HAND = (0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963)
_JOINTS = (-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928)
_SPOTS = ((0.05, -0.12, 0.46), (0.23, -0.12, 0.46))  # on the table
_SHELF = (0.0703416330, 0.0924044687, 0.460990009)  # behind the closed slider
_TURN = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
SLIDER, DRAWER, BUTTON, SWITCH, BULB, LED, BLOCKS = range(7)
_FIXTURES: dict[str, dict[int, float]] = {
    "move_slider_left": {},
    "move_slider_right": {SLIDER: 0.28},
    "open_drawer": {},
    "close_drawer": {DRAWER: 0.22},
    "push_into_drawer": {DRAWER: 0.22},
    "turn_on_lightbulb": {},
    "turn_off_lightbulb": {SWITCH: 0.088, BULB: 1.0},
    "turn_on_led": {},
    "turn_off_led": {LED: 1.0},
    "stack_block": {},
}
"""Tasks that begin with an empty hand and blocks on the table; what is not 0 of the fixtures' state (6,) then."""
_COLOURED = re.compile(
    r"(?:rotate|push)_(red|blue|pink)_block_(?:left|right)|lift_(red|blue|pink)_block_table"
)


class CalvinEnv(gymnasium.Env[Array, Array]):
    """PlayTableSimEnv as a Gymnasium environment, with start states drawn from the seed of the reset."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def __init__(self, scene: str, task: str, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self._task = task
        self._sim, self._oracle = _simulator(scene, render_mode is not None)
        self._start: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        names = [block.name for block in self._sim.scene.movable_objects]
        scene = start(self._task, names, self.np_random)
        # reset() moves the robot but leaves the last gripper command of the episode before, which is observed.
        self._sim.robot.gripper_action = 1
        obs = self._sim.reset(robot_obs=np.array([*_HAND, *_JOINTS, 1.0]), scene_obs=scene)
        self._start = self._sim.get_info()
        return _flat(obs), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        command = np.array(action, np.float64)  # a copy: the simulator scales it in place
        command[-1] = 1.0 if command[-1] >= 0.0 else -1.0
        obs, _, _, info = self._sim.step(command)
        done = self._oracle.get_task_info_for_set(self._start, info, {self._task})
        success = self._task in done
        return _flat(obs), float(success), success, False, {}

    def render(self) -> NDArray[np.uint8]:
        """The static camera's picture, 200 x 200."""
        return np.asarray(self._sim.render(mode="rgb_array"), np.uint8)

    def close(self) -> None:
        self._sim.close()


def start(task: str, blocks: list[str], rng: np.random.Generator) -> NDArray[np.float64]:
    """A scene_obs (24,) for the task: fixtures, then position and angles of every block, in the scene's order.

    The block of the task, if it has one, and another lie on the table's two spots; the third on the shelf.
    """
    scene = np.zeros(BLOCKS + 6 * len(blocks))
    for index, value in _FIXTURES.get(task, {}).items():
        scene[index] = value
    colour = _colour(task)
    order = [str(name) for name in rng.permutation(blocks)]
    order.sort(key=lambda name: colour is None or not name.endswith(colour))
    spots = [*rng.permutation(_SPOTS), np.array(_SHELF)]
    for name, spot in zip(order, spots, strict=True):
        at = BLOCKS + 6 * blocks.index(name)
        scene[at : at + 3] = spot
        scene[at + 5] = rng.uniform(*_TURN)
    return scene


def _colour(task: str) -> str | None:
    """The block that a task names."""
    found = _COLOURED.fullmatch(task)
    return None if found is None else next(filter(None, found.groups()))


def _simulator(scene: str, pictures: bool) -> tuple[Any, Any]:
    """PlayTableSimEnv and the task oracle, as the package's own configuration has them."""
    import calvin_env
    import hydra

    folder = Path(calvin_env.__file__).resolve().parents[1] / "conf"
    overrides = [
        f"scene=calvin_scene_{scene}",
        f"cameras={'static_and_gripper' if pictures else 'no_cameras'}",
    ]
    with hydra.initialize_config_dir(config_dir=str(folder), version_base="1.1"):
        config = hydra.compose(config_name="config_data_collection", overrides=overrides)
    sim = hydra.utils.instantiate(
        config.env, show_gui=False, use_vr=False, use_egl=False, use_scene_info=True
    )
    return sim, hydra.utils.instantiate(config.tasks)


def _flat(obs: Any) -> Array:
    return np.concatenate((obs["robot_obs"], obs["scene_obs"])).astype(np.float32)


class _CalvinAdapter(Adapter):
    def outcome(self, reward: float, terminated: bool, info: dict[str, Any]) -> tuple[float, bool]:
        return reward, done(reward, terminated)


def done(reward: float, terminated: bool) -> bool:
    """Whether the task was done: the episode ends there."""
    return terminated


def make(env_id: str, render_mode: str | None) -> Adapter:
    """One task with its limit of 360 steps. Raises UserError without calvin_env, and for an unknown task."""
    match = re.fullmatch(PATTERN, env_id)
    assert match is not None
    scene, task = match.groups()
    if task not in _FIXTURES and _colour(task) is None:
        raise UserError(
            f"env {env_id}: no start state is known for task {task}; tasks are {', '.join(_FIXTURES)}, "
            "rotate_COLOUR_block_left, push_COLOUR_block_left (or right), lift_COLOUR_block_table"
        )
    spec = GymnasiumSpec(
        env_id,
        f"{__name__}:CalvinEnv",
        max_episode_steps=STEPS,
        kwargs={"scene": scene, "task": task},
    )
    try:
        env = gymnasium.make(spec, disable_env_checker=True, render_mode=render_mode)
    except ImportError as problem:
        raise UserError(
            f"env {env_id}: CALVIN's simulator is not installed ({problem}); {INSTALL}"
        ) from problem
    return _CalvinAdapter(env, OBS_DIM, has_success=True)


FAMILY = Family(
    matches=lambda env_id: re.fullmatch(PATTERN, env_id) is not None,
    make=make,
    packages=("calvin_env", "pybullet"),
    reward_note="1 when the task oracle says it is done, which ends the episode; success: that",
    success_at_end=done,
)
