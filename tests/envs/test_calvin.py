"""CALVIN's adapter against a stand-in for calvin_env: a package of the same names, arguments and answers.

What the real package does is in mees/calvin_env: envs/play_table_env.py, envs/tasks.py, robot/robot.py,
scene/play_table_scene.py. The real simulator is not run here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from modip import envs
from modip.envs import BatchedEnv, calvin
from modip.errors import UserError

DRAWER = "calvin/D-open_drawer"

SIMULATOR = '''
import numpy as np

class Block:
    def __init__(self, name): self.name = name

class Scene:
    def __init__(self): self.movable_objects = [Block(n) for n in ("block_pink", "block_blue", "block_red")]

class Robot:
    gripper_action = 1

class PlayTableSimEnv:
    """A hand that moves; pulling it to x < 0 with the gripper closed opens the drawer."""
    def __init__(self, robot_cfg, seed, use_vr, bullet_time_step, cameras, show_gui, scene_cfg, use_scene_info,
                 use_egl, control_freq=30):
        assert not (show_gui or use_vr or use_egl) and use_scene_info
        self.cameras, self.scene_cfg = cameras, scene_cfg
        self.robot, self.scene, self.closed = Robot(), Scene(), False
    def reset(self, robot_obs=None, scene_obs=None):
        assert robot_obs.shape == (15,) and scene_obs.shape == (24,)
        self.robot_obs, self.scene_obs = robot_obs.copy(), scene_obs.copy()
        return self.get_obs()
    def get_obs(self):
        obs = {"rgb_obs": {}, "depth_obs": {}}
        self.robot_obs[14] = self.robot.gripper_action
        obs.update({"robot_obs": self.robot_obs.copy(), "scene_obs": self.scene_obs.copy()})
        return obs
    def get_info(self):
        return {"robot_info": {}, "scene_info": {"doors": {"base__drawer": {"current_state": self.scene_obs[1]},
            "base__slide": {"current_state": self.scene_obs[0]}}}}
    def step(self, action):
        assert action.shape == (7,) and action[6] in (-1, 1)
        action[:3] *= 0.02
        action[3:6] *= 0.05
        self.robot_obs[:6] += action[:6]
        self.robot.gripper_action = int(action[6])
        if action[6] == -1 and action[0] < 0:
            self.scene_obs[1] += 0.01
        return self.get_obs(), 0, False, self.get_info()
    def render(self, mode="human"):
        assert mode == "rgb_array" and "static" in self.cameras
        return np.full((200, 200, 3), 7, np.uint8)
    def close(self):
        self.closed = True
'''
TASKS = """
class Tasks:
    def __init__(self, tasks): self.tasks = tasks
    def get_task_info_for_set(self, start_info, end_info, task_filter):
        def state(info, door): return info["scene_info"]["doors"][door]["current_state"]
        return {name for name, (_, door, threshold) in self.tasks.items() if name in task_filter
                and 0 < threshold < state(end_info, door) - state(start_info, door)}
"""
HYDRA = """
import contextlib, importlib, pathlib
class Config(dict):
    __getattr__ = dict.__getitem__
@contextlib.contextmanager
def initialize_config_dir(config_dir, version_base):
    assert pathlib.Path(config_dir).is_dir() and pathlib.Path(config_dir).name == "conf"
    yield
def compose(config_name, overrides):
    assert config_name == "config_data_collection"
    chosen = dict(one.split("=") for one in overrides)
    cameras = {"no_cameras": {}, "static_and_gripper": {"static": 1, "gripper": 1}}[chosen["cameras"]]
    env = Config(_target_="calvin_env.envs.play_table_env.PlayTableSimEnv", robot_cfg={}, seed=0, use_vr=True,
                 bullet_time_step=240.0, cameras=cameras, show_gui=True, scene_cfg=chosen["scene"],
                 use_scene_info=True, use_egl=True, control_freq=30)
    tasks = Config(_target_="calvin_env.envs.tasks.Tasks",
                   tasks={"open_drawer": ["move_door_rel", "base__drawer", 0.12],
                          "move_slider_left": ["move_door_rel", "base__slide", 0.15]})
    return Config(env=env, tasks=tasks)
class utils:
    @staticmethod
    def instantiate(config, **changes):
        told = {**config, **changes}
        module, name = told.pop("_target_").rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(**told)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """calvin_env, hydra and pybullet's version, as if installed."""
    (tmp_path / "conf").mkdir()
    for name, text in {
        "calvin_env/__init__.py": "",
        "calvin_env/envs/__init__.py": "",
        "calvin_env/envs/play_table_env.py": SIMULATOR,
        "calvin_env/envs/tasks.py": TASKS,
        "hydra.py": HYDRA,
        "calvin_env-0.0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: calvin_env\nVersion: 0.0.1\n",
        "pybullet-3.2.7.dist-info/METADATA": "Metadata-Version: 2.1\nName: pybullet\nVersion: 3.2.7\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield
    forget()


def forget() -> None:
    envs.spec.cache_clear()
    envs._pictures.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("calvin_env", "hydra")]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_the_task_is_done_when_the_oracle_says_so() -> None:
    env = BatchedEnv(DRAWER, 2)
    assert (env.spec.obs_dim, env.spec.action_dim, env.spec.max_episode_steps) == (39, 7, 360)
    assert env.spec.version == "calvin_env 0.0.1, pybullet 3.2.7"
    env.reset([0, 1], [1, 2])
    pull = torch.tensor([[-1.0, 0, 0.5, 0, 0, 0, -0.2], [-1.0, 0, 0.5, 0, 0, 0, 0.0]])
    before = env.obs
    first = env.step(pull)
    np.testing.assert_allclose(first.obs[0, :3] - before[0, :3], [-0.02, 0, 0.01], atol=1e-6)
    assert first.obs[:, 14].tolist() == [-1.0, 1.0]  # -0.2 closes, 0 opens
    assert first.reward.tolist() == [0.0, 0.0]
    for _ in range(11):
        assert not env.step(pull).terminated.any()
    last = env.step(pull)  # 0.13 is more than the 0.12 that the task wants
    assert last.obs[0, 15 + 1] == pytest.approx(0.13)
    assert last.reward.tolist() == [1.0, 0.0]
    assert last.terminated.tolist() == last.success.tolist() == [True, False]
    assert envs.success_at_end(DRAWER, 1.0, True) is True
    assert envs.success_at_end(DRAWER, 0.0, False) is False
    while env.running[1]:
        last = env.step(pull)
    assert env.steps.tolist() == [13, 360]
    assert last.truncated.tolist() == [False, True]
    env.close()


@pytest.mark.usefixtures("package")
def test_the_seed_is_the_whole_start() -> None:
    env = BatchedEnv(DRAWER, 1)
    env.reset([0], [5])
    start = env.obs
    for _ in range(3):
        env.step(torch.tensor([[0.3, 0, 0, 0, 0, 0.1, -1.0]]))  # leaves the gripper closed
    env.reset([0], [5])
    assert torch.equal(env.obs, start)
    assert start[0, 14] == 1.0
    env.reset([0], [6])
    assert not torch.equal(env.obs, start)
    state = env.state_dict()
    again = BatchedEnv(DRAWER, 1)
    again.load_state_dict(state)
    assert torch.equal(again.obs, env.obs)


@pytest.mark.usefixtures("package")
def test_pictures_come_from_the_static_camera() -> None:
    assert envs.video_support(DRAWER) is None
    env = BatchedEnv(DRAWER, 1, render=True)
    env.reset([0], [1])
    assert env.frame(0).shape == (200, 200, 3)
    env.close()


@pytest.mark.parametrize("seed", range(20))
def test_tasks_start_where_they_can_be_done(seed: int) -> None:
    names = ["block_pink", "block_blue", "block_red"]

    def fixtures(task: str) -> list[float]:
        return calvin.start(task, names, np.random.default_rng(seed))[:6].tolist()

    assert fixtures("open_drawer") == fixtures("turn_on_led") == [0.0] * 6
    assert fixtures("close_drawer") == fixtures("push_into_drawer") == [0, 0.22, 0, 0, 0, 0]
    assert fixtures("move_slider_right") == [0.28, 0, 0, 0, 0, 0]
    assert fixtures("turn_off_lightbulb") == [0, 0, 0, 0.088, 1, 0]
    assert fixtures("turn_off_led") == [0, 0, 0, 0, 0, 1]
    for task in ("lift_red_block_table", "push_blue_block_left", "rotate_pink_block_right"):
        scene = calvin.start(task, names, np.random.default_rng(seed))
        blocks = scene[6:].reshape(3, 6)
        own = names.index(f"block_{task.split('_')[1]}")
        assert blocks[own, 1] < 0  # on the table, in front of the shelf
        assert (blocks[:, 1] > 0).sum() == 1
        assert len({tuple(b[:3]) for b in blocks}) == 3
        assert (np.abs(blocks[:, 5] - np.pi / 2) <= np.pi / 8).all()


def test_without_the_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calvin_env", None)
    with pytest.raises(UserError, match=r"env calvin/D-open_drawer: .*not installed.*git clone"):
        envs.make(DRAWER)
    with pytest.raises(UserError, match=r"no start state is known for task lift_red_block_drawer"):
        envs.make("calvin/D-lift_red_block_drawer")
    with pytest.raises(UserError, match="env calvin/E-open_drawer"):
        envs.make("calvin/E-open_drawer")
