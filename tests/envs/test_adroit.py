"""The Adroit hand, played for real: its numbers, its success, its scores."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from modip import envs
from modip.envs import BatchedEnv, fetch

SIZES = {
    "AdroitHandDoor-v1": (39, 28),
    "AdroitHandHammer-v1": (46, 26),
    "AdroitHandPen-v1": (45, 24),
    "AdroitHandRelocate-v1": (39, 30),
}


@pytest.mark.parametrize("env_id", SIZES)
def test_episodes_are_the_environments_own(env_id: str) -> None:
    fetch.register()
    raw = gymnasium.make(env_id)
    env = BatchedEnv(env_id, 2)
    assert (env.spec.obs_dim, env.spec.action_dim) == SIZES[env_id]
    assert env.spec.max_episode_steps == 200
    env.reset([0, 1], [3, 4])
    np.testing.assert_array_equal(env.obs[0], raw.reset(seed=3)[0].astype(np.float32))
    first = env.obs
    generator = torch.Generator().manual_seed(0)
    reached = False
    for _ in range(12):
        move = 2 * torch.rand(2, env.spec.action_dim, generator=generator) - 1
        result = env.step(move)
        obs, reward, _, _, info = raw.step(move[0].numpy())
        np.testing.assert_allclose(result.obs[0], obs, rtol=1e-6, atol=1e-6)
        assert result.reward[0] == pytest.approx(float(reward), rel=1e-6)
        reached = reached or bool(info["success"])
        assert bool(result.success[0]) == reached
    env.reset([0, 1], [3, 4])
    assert torch.equal(env.obs, first)
    env.close()


def test_success_stays_once_reached() -> None:
    env = BatchedEnv("AdroitHandDoor-v1", 1)
    env.reset([0], [0])
    raw: Any = env._envs[0].unwrapped
    still = torch.zeros(1, 28)
    assert not env.step(still).success[0]
    for angle, expected in ((1.5, True), (0.0, True)):
        qpos = raw.data.qpos.copy()
        qpos[raw.door_hinge_addrs] = angle
        raw.set_state(qpos, np.zeros_like(raw.data.qvel))
        assert bool(env.step(still).success[0]) == expected
    env.reset([0], [0])
    assert not env.step(still).success[0]
    assert envs.success_at_end("AdroitHandDoor-v1", 20.0, False) is None
    env.close()


def test_scores_are_d4rls() -> None:
    for env_id, low, high in (
        ("AdroitHandDoor-v1", -56.512833, 2880.5693087298737),
        ("AdroitHandHammer-v1", -274.856578, 12794.134825156867),
        ("AdroitHandRelocate-v1", -6.425911, 4233.877797728884),
    ):
        assert envs.score(env_id, low) == pytest.approx(0.0)
        assert envs.score(env_id, high) == pytest.approx(100.0)
    assert envs.score("AdroitHandPen-v1", 100.0) is None  # 200 steps here, 100 in D4RL
    assert envs.score("AdroitHandDoorSparse-v1", 100.0) is None
