"""Locomotion stepped without Gymnasium's wrappers gives what Gymnasium gives, bit for bit."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from modip import envs
from modip.envs import BatchedEnv, mujoco

IDS = ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"]
ROWS = 6


def simulator(env: gymnasium.Env[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """All that decides the future: positions, velocities, the solver's warm start; and the time."""
    data = env.unwrapped.data  # type: ignore[attr-defined]
    return [data.qpos, data.qvel, data.qacc_warmstart, np.array(data.time)]


def identical(ours: gymnasium.Env[Any, Any], theirs: gymnasium.Env[Any, Any]) -> bool:
    return all(
        np.array_equal(a, b) for a, b in zip(simulator(ours), simulator(theirs), strict=True)
    )


@pytest.mark.parametrize("env_id", IDS)
def test_episodes_are_gymnasiums_step_by_step(env_id: str) -> None:
    batch = BatchedEnv(env_id, ROWS)
    theirs = [gymnasium.make(env_id) for _ in range(ROWS)]
    rng = np.random.default_rng(1)
    running: set[int] = set()
    seeds = iter(range(10_000))
    terminations = truncations = 0
    for step in range(1100):
        ended = [row for row in range(ROWS) if row not in running]
        if ended:
            fresh = [next(seeds) for _ in ended]
            batch.reset(ended, fresh)
            for row, seed in zip(ended, fresh, strict=True):
                obs, _ = theirs[row].reset(seed=seed)
                np.testing.assert_array_equal(batch.obs[row], obs.astype(np.float32))
                assert identical(batch._envs[row], theirs[row])
            running |= set(ended)
        # Row 0 does little and lives long; the others move more and more.
        size = np.linspace(0.0, 1.3, ROWS)[:, None]
        action = (size * rng.uniform(-1, 1, (ROWS, batch.spec.action_dim))).astype(np.float32)
        rows = sorted(running) if step % 3 else [0, *sorted(running - {0})[::2]]
        result = batch.step(torch.from_numpy(action), torch.tensor(rows))
        for row in rows:
            obs, reward, terminated, truncated, _ = theirs[row].step(action[row].clip(-1, 1))
            assert identical(batch._envs[row], theirs[row]), (step, row)
            np.testing.assert_array_equal(result.obs[row], obs.astype(np.float32))
            assert result.reward[row] == np.float32(reward)
            assert (bool(result.terminated[row]), bool(result.truncated[row])) == (
                terminated,
                truncated,
            )
            terminations += terminated
            truncations += truncated
            if terminated or truncated:
                running.remove(row)
    assert truncations >= (env_id == "HalfCheetah-v5")
    assert terminations >= (0 if env_id == "HalfCheetah-v5" else 50)
    for env in (batch, *theirs):
        env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_rewards_are_gymnasiums_in_double_precision(env_id: str) -> None:
    ours, theirs = envs.make(env_id), gymnasium.make(env_id)
    step = mujoco.stepper([ours])
    rng = np.random.default_rng(2)
    for seed in range(5):
        ours.reset(seed=seed)
        theirs.reset(seed=seed)
        for action in rng.uniform(-1, 1, (20, 1, *ours.action_space.shape)).astype(np.float32):  # type: ignore[misc]
            reward = theirs.step(action[0])[1]
            assert step(np.array([0]), action).reward[0] == reward
