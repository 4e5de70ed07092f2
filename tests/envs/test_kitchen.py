"""The kitchen: its two observations, its rewards and its score, and episodes played for real."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from modip import envs
from modip.data import fidelity
from modip.data.episodes import DatasetInfo, Recording, Rows
from modip.envs import BatchedEnv, fetch, kitchen

D4RL = "modip/KitchenD4RL-microwave-kettle-light-slide-v0"
MIXED = "modip/KitchenD4RL-microwave-kettle-bottom_burner-light-v0"
MINARI = "modip/Kitchen-microwave-kettle-light-slide-v1"
PLACES = {  # qpos of each object's joints and its goal: d4rl/kitchen/kitchen_envs.py
    "bottom burner": ([11, 12], [-0.88, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}
JOINTS = [
    "knob_Joint_1",
    "bottom_right_burner",
    "knob_Joint_2",
    "bottom_left_burner",
    "knob_Joint_3",
    "top_right_burner",
    "knob_Joint_4",
    "top_left_burner",
    "light_switch",
    "light_joint",
    "slide_cabinet",
    "left_hinge_cabinet",
    "right_hinge_cabinet",
    "microwave",
    "kettle",
]


def put(env: BatchedEnv, row: int, *tasks: str) -> None:
    """Moves the objects of these sub-tasks to their goals."""
    robot: Any = env._envs[row].unwrapped.robot_env  # type: ignore[attr-defined]
    qpos = robot.data.qpos.copy()
    for task in tasks:
        joints, goal = PLACES[task]
        qpos[joints] = goal
    robot.set_state(qpos, np.zeros_like(robot.data.qvel))


@pytest.mark.parametrize("env_id", kitchen.ENV_IDS)
def test_a_perfect_episode_scores_one_on_both(env_id: str) -> None:
    """Mean sub-tasks / 4 is 1 and all four are done, whether one by one or all at once."""
    tasks = kitchen.ENV_IDS[env_id]
    env = BatchedEnv(env_id, 2)
    env.reset([0, 1], [1, 2])
    still = torch.zeros(2, 9)
    total = torch.zeros(2)
    for task in tasks[:3]:
        put(env, 0, task)
        result = env.step(still)
        total += result.reward
        assert result.reward.tolist() == [1.0, 0.0]
        assert not result.success.any()
    assert total.tolist() == [3.0, 0.0]
    put(env, 0, tasks[3])
    put(env, 1, *tasks)
    result = env.step(still)
    total += result.reward
    assert total.tolist() == [4.0, 4.0]
    assert result.success.all()
    assert result.terminated.all()
    assert not env.running.any()
    assert envs.score(env_id, float(total.mean())) == 100.0
    assert envs.score(env_id, 1.0) == 25.0
    assert envs.success_at_end(env_id, 1.0, True) is True
    assert envs.success_at_end(env_id, 1.0, False) is False
    env.close()


def test_a_sub_task_counts_once() -> None:
    env = BatchedEnv(MINARI, 1)
    env.reset([0], [0])
    put(env, 0, "microwave")
    rewards = [float(env.step(torch.zeros(1, 9)).reward) for _ in range(3)]
    qpos = env._envs[0].unwrapped.robot_env.data.qpos.copy()  # type: ignore[attr-defined]
    qpos[22] = 0.0  # shut, and open again
    env._envs[0].unwrapped.robot_env.set_state(qpos, np.zeros(29))  # type: ignore[attr-defined]
    rewards += [float(env.step(torch.zeros(1, 9)).reward)]
    put(env, 0, "microwave")
    rewards += [float(env.step(torch.zeros(1, 9)).reward)]
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0]
    env.close()


def test_both_observations_show_the_simulators_state() -> None:
    for env_id, noise in ((D4RL, 0.1), (MINARI, 0.01)):
        env = BatchedEnv(env_id, 1)
        env.reset([0], [3])
        for _ in range(3):
            obs = env.step(torch.rand(1, 9) * 2 - 1).obs[0].numpy()
        robot: Any = env._envs[0].unwrapped.robot_env  # type: ignore[attr-defined]
        qpos, qvel = robot.data.qpos, robot.data.qvel
        start = 9 if env_id == D4RL else 18
        np.testing.assert_allclose(obs[:9], qpos[:9], atol=noise * 0.1 + 1e-6)
        assert not np.allclose(obs[:9], qpos[:9], atol=1e-7)
        np.testing.assert_allclose(obs[start : start + 21], qpos[9:], atol=0.0101)
        if env_id == D4RL:
            expected = np.zeros(30)
            for task in ("microwave", "kettle", "light switch", "slide cabinet"):
                joints, goal = PLACES[task]
                expected[joints] = goal
            np.testing.assert_allclose(obs[30:], expected, atol=1e-6)
        else:
            np.testing.assert_allclose(obs[9:18], qvel[:9], atol=0.0011)
            np.testing.assert_allclose(obs[39:], qvel[9:], atol=1e-3)
        model = robot.model
        names = [model.joint(i).name for i in range(model.njnt)]
        assert names[9:] == JOINTS  # the order that the docstring tells
        assert [int(model.joint(name).qposadr[0]) for name in JOINTS] == [*range(9, 24)]
        assert (env.spec.max_episode_steps, env.spec.action_dim) == (280, 9)
        env.close()


def test_the_59_are_the_simulators_own() -> None:
    fetch.register()
    raw = gymnasium.make("FrankaKitchen-v1", disable_env_checker=True)
    start = raw.reset(seed=4)[0]["observation"]
    env = BatchedEnv(MINARI, 1)
    env.reset([0], [4])
    np.testing.assert_array_equal(env.obs[0], start.astype(np.float32))
    move = np.linspace(-1, 1, 9).astype(np.float32)
    expected = raw.step(move)[0]["observation"]
    np.testing.assert_array_equal(
        env.step(torch.from_numpy(move)[None]).obs[0], expected.astype(np.float32)
    )
    env.close()


def test_episodes_repeat_and_resume() -> None:
    env = BatchedEnv(MIXED, 2)
    env.reset([0, 1], [5, 5])
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        move = 2 * torch.rand(1, 9, generator=generator).expand(2, 9) - 1
        result = env.step(move)
        assert torch.equal(result.obs[0], result.obs[1])
    again = BatchedEnv(MIXED, 2)
    again.load_state_dict(env.state_dict())
    assert torch.equal(again.obs, env.obs)
    assert all(torch.equal(a, b) for a, b in zip(env.step(move), again.step(move), strict=True))
    env.close()
    again.close()


def test_done_is_told_from_either_observation() -> None:
    for env_id in kitchen.ENV_IDS:
        tasks = kitchen.ENV_IDS[env_id]
        env = BatchedEnv(env_id, 1)
        env.reset([0], [1])
        assert not kitchen.done(env_id, env.obs.numpy()).any()
        put(env, 0, *tasks[1:3])
        obs = env.step(torch.zeros(1, 9)).obs.numpy()
        assert kitchen.done(env_id, obs).tolist() == [[False, True, True, False]]
        env.close()


def test_pictures_of_a_kitchen_need_opengl() -> None:
    assert envs._pictures(MINARI).need_gl


def test_recorded_steps_are_taken_again_as_far_as_noise_lets_them() -> None:
    """A rollout is this simulator's; with half the actions, or each a step late, it is not."""
    env = envs.make(MINARI)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=3)
    move, seen, moves, rewards = np.zeros(9), [], [], []
    for _ in range(60):
        move = np.clip(0.8 * move + 0.4 * rng.normal(size=9), -1, 1).astype(np.float32)
        seen.append(obs)
        moves.append(move)
        obs, reward, *_ = env.step(move)
        rewards.append(reward)
    env.close()
    ends = np.arange(60) == 59
    action, reward_row = np.array(moves), np.array(rewards, np.float32)
    told = DatasetInfo("kitchen", MINARI, "", "", "", "", "")

    def doubt(action: Any) -> str | None:
        rows = Rows(np.array(seen), action, reward_row, np.zeros(60, np.bool_), ends)
        found = fidelity.sample(Recording(told, [rows]), 60, 0)
        facts = fidelity.one_step_error(MINARI, found)
        assert facts["fidelity_transitions"] == 60
        return fidelity.doubt(facts)

    assert doubt(action) is None
    for wrong in (0.5 * action, np.roll(action, 1, 0)):
        assert "not this simulator's" in str(doubt(wrong))


@pytest.mark.parametrize("env_id", kitchen.ENV_IDS)
def test_what_is_known_without_a_simulator_is_true(env_id: str) -> None:
    env = BatchedEnv(env_id, 1)
    assert env.spec == envs.spec(env_id)
    for known, built in (("low", -1.0), ("high", 1.0)):
        np.testing.assert_array_equal(getattr(env.spec.bounds, known), built)
        np.testing.assert_array_equal(getattr(envs.spec(env_id).bounds, known), np.full(9, built))
    env.close()
