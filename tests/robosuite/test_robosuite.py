"""robosuite's tasks for real: seeds, ends, and that recorded steps are taken again as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from modip import envs
from modip.data import episodes, robomimic
from modip.data.sources import RobomimicSource
from modip.envs import BatchedEnv, robosuite
from modip.envs.family import Adapter
from modip.errors import UserError

SPARSE = [env_id for env_id, task in robosuite.TASKS.items() if not task.dense]


def moves(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(count, width, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("env_id", SPARSE)
def test_the_same_seed_is_the_same_episode(env_id: str) -> None:
    env = BatchedEnv(env_id, 2)
    assert env.spec.obs_dim == robosuite.TASKS[env_id].obs_dim
    assert env.spec.version.startswith("robosuite 1.5.")
    np.random.seed(1)  # must have no part in it
    env.reset([0, 1], [3, 3])
    first = env.obs
    assert torch.equal(first[0], first[1])
    played = [env.step(move.expand(2, -1)).obs for move in moves(4, env.spec.action_dim)]
    assert all(torch.equal(obs[0], obs[1]) for obs in played)
    np.random.seed(2)
    env.reset([0, 1], [3, 4])  # a used environment repeats it, another seed does not
    assert torch.equal(env.obs[0], first[0])
    assert not torch.equal(env.obs[0], env.obs[1])
    for move, before in zip(moves(4, env.spec.action_dim), played, strict=True):
        assert torch.equal(env.step(move.expand(2, -1)).obs[0], before[0])
    env.close()


def test_resume_in_the_middle_is_exact() -> None:
    env, again = BatchedEnv("robosuite/Lift", 2), BatchedEnv("robosuite/Lift", 2)
    env.reset([0], [5])
    for move in moves(6, 7):
        env.step(move.expand(2, -1))
    again.load_state_dict(env.state_dict())
    for move in moves(3, 7, seed=1):
        one, two = env.step(move.expand(2, -1)), again.step(move.expand(2, -1))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    env.close()
    again.close()


def lifted(env: Adapter) -> None:
    """Sets the cube in the air: for the next step it is above its goal height."""
    env.reset(seed=0)
    inner: Any = env.unwrapped
    simulator = inner._simulation.sim
    state = simulator.get_state().flatten()
    state[1 + simulator.model.get_joint_qpos_addr("cube_joint0")[0] + 2] += 0.3
    robosuite.place(env, simulator.model.get_xml(), state, state, np.zeros((0, 7)))


def test_success_ends_the_sparse_form_only() -> None:
    for env_id in ("robosuite/Lift", "robosuite/Lift-dense"):
        env = envs.make(env_id)
        env.reset(seed=0)
        _, reward, terminated, truncated, info = env.step(np.zeros(7, np.float32))
        assert (reward < 0.6, terminated, truncated, info["is_success"]) == (True, False, False, False)  # fmt: skip
        lifted(env)
        _, reward, terminated, truncated, info = env.step(np.zeros(7, np.float32))
        assert reward == pytest.approx(1.0)
        assert terminated == (env_id == "robosuite/Lift")
        assert not truncated
        assert info["is_success"]
        for _ in range(8):  # the cube falls: reached at any step stays
            _, reward, _, _, info = env.step(np.zeros(7, np.float32))
        assert reward < 0.6
        assert info["is_success"]
        env.reset(seed=1)
        assert not env.step(np.zeros(7, np.float32))[4]["is_success"]
        env.close()


def test_episodes_end_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(robosuite.TASKS["robosuite/Lift"], max_episode_steps=3)
    monkeypatch.setitem(robosuite.TASKS, "robosuite/Lift", short)
    env = BatchedEnv("robosuite/Lift", 1)
    for seed in (0, 1):
        env.reset([0], [seed])
        ends = [bool(env.step(move[None]).truncated[0]) for move in moves(3, 7)]
        assert ends == [False, False, True]
    env.close()


def test_no_videos_and_no_opengl() -> None:
    with pytest.raises(UserError, match="no videos of robosuite/Lift"):
        BatchedEnv("robosuite/Lift", 1, render=True)
    program = "import os\nfrom modip import envs\nenvs.make('robosuite/Lift')\nprint('MUJOCO_GL' in os.environ)"
    surroundings = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    surroundings["PYTHONPATH"] = str(Path(envs.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100,
        env=surroundings,
    )  # fmt: skip
    assert done.stdout == "False\n"
    assert done.stderr == ""


def record(path: Path, env_id: str, episodes_: int, steps: int) -> None:
    """Random episodes in RoboMimic's layout, observed as its makers do: each state set, then read."""
    task = robosuite.TASKS[env_id]
    env = envs.make(env_id)
    inner: Any = env.unwrapped
    simulation = inner._simulation
    kwargs = {
        "controller_configs": {"type": "BASIC", "body_parts": {"right": robosuite.CONTROLLER}},
        "control_freq": 20,
        "reward_shaping": False,
    }
    told = {"env_name": task.name, "env_version": "1.5.2", "type": 1, "env_kwargs": kwargs}
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"], data.attrs["env_args"] = episodes_ * steps, json.dumps(told)
        for number in range(episodes_):
            demo = data.create_group(f"demo_{number}")
            env.reset(seed=number)
            demo.attrs["num_samples"] = steps
            demo.attrs["model_file"] = simulation.sim.model.get_xml()
            states, actions, rewards = [], [], []
            drift = rng.uniform(-1, 1, task.action_dim)
            for _ in range(steps):
                action = np.clip(drift + rng.normal(size=task.action_dim), -1, 1)
                states.append(simulation.sim.get_state().flatten())
                actions.append(action)
                simulation.step(action)
                rewards.append(simulation.reward())
            observed: dict[str, list[Any]] = {}
            for state in states:
                simulation.sim.set_state_from_flattened(state)
                simulation.sim.forward()
                for key, value in simulation._get_observations(force_update=True).items():
                    observed.setdefault(key.replace("object-state", "object"), []).append(value)
            demo["states"], demo["actions"], demo["rewards"] = states, actions, rewards
            for key, values in observed.items():
                demo[f"obs/{key}"] = np.array(values)
    env.close()


@pytest.fixture(params=SPARSE)
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> RobomimicSource:
    env_id = str(request.param)
    path = tmp_path / "low_dim.hdf5"
    record(path, env_id, 2, 12)
    return RobomimicSource(source="robomimic", env=env_id, path=str(path), filter_key="")


def test_recorded_steps_are_taken_again_as_they_were(recorded: RobomimicSource) -> None:
    path = Path(recorded.path)
    data = episodes.collected(robomimic.convert("mine", recorded, path, ""))
    assert data.lengths.tolist() == [12, 12]
    env = envs.make(recorded.env)
    count = 0
    for sample in robomimic.samples(recorded, path, 12):
        assert sample.restore(env) is None
        found, reward, terminated, *_ = env.step(sample.action)
        assert (reward, terminated) == (sample.reward, sample.terminated)
        assert sample.next_obs is not None
        np.testing.assert_allclose(found, sample.next_obs, atol=2e-4)
        wrong = env.step(-sample.action)[0]  # and the tolerance can tell another action
        assert np.abs(wrong - sample.next_obs).max() > 2e-3
        count += 1
    assert count == 12
    # The whole episode from its seed alone: what is recorded is what the environment gives.
    env.reset(seed=1)
    for action, wanted in zip(data.action[12:23], data.observation[13:], strict=True):
        np.testing.assert_allclose(env.step(action)[0], wanted, atol=1e-5)
    env.close()
