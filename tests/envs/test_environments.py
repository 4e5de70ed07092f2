"""What every environment keeps, over all families; then each family's own numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from modip import envs
from modip.envs import BatchedEnv, StepResult, pusht, toy
from modip.errors import UserError

IDS = [
    "modip/Toy-v0",
    "FetchPickAndPlace-v4",
    "Hopper-v5",
    "gym_pusht/PushT-v0",
    "modip/PushTKeypoints-v0",
    "Pendulum-v1",  # custom: Box observations, actions in [-2, 2]
    "FetchReachDense-v4",  # custom: Dict observations
]


@pytest.fixture(params=IDS)
def env_id(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def env(env_id: str) -> Iterator[BatchedEnv]:
    one = BatchedEnv(env_id, 3)
    yield one
    one.close()


def actions(env: BatchedEnv, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, env.num_envs, env.spec.action_dim, generator=generator) - 1


def play(env: BatchedEnv, moves: Tensor) -> list[StepResult]:
    return [env.step(move) for move in moves]


def same(a: StepResult, b: StepResult) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_shapes_and_types(env: BatchedEnv) -> None:
    env.reset(range(3), [1, 2, 3])
    result = env.step(actions(env, 1)[0])
    assert result.obs.shape == (3, env.spec.obs_dim)
    assert result.obs.dtype == result.reward.dtype == torch.float32
    assert result.reward.shape == result.success.shape == (3,)
    assert result.terminated.dtype == result.truncated.dtype == result.success.dtype == torch.bool
    assert env.spec.max_episode_steps > 0
    assert any(c.isdigit() for c in env.spec.version)
    assert envs.spec(env.spec.env_id) == env.spec
    assert torch.equal(result.obs, env.obs)


def test_the_same_seed_is_the_same_episode(env: BatchedEnv) -> None:
    moves = actions(env, 15)
    env.reset(range(3), [5, 6, 5])
    moves[:, 2] = moves[:, 0]
    first = play(env, moves)
    for result in first:  # rows 0 and 2: two environments, one seed
        assert torch.equal(result.obs[0], result.obs[2])
    env.reset(range(3), [5, 6, 5])  # used environments repeat it too
    assert all(same(a, b) for a, b in zip(first, play(env, moves), strict=True))
    env.reset([0], [7])
    assert not torch.equal(env.obs[0], first[0].obs[0])


def test_results_do_not_change_afterwards(env: BatchedEnv) -> None:
    env.reset(range(3), [1, 2, 3])
    moves = actions(env, 2)
    result, obs = env.step(moves[0]), env.obs
    kept = [x.clone() for x in result]
    env.step(moves[1])
    assert all(torch.equal(a, b) for a, b in zip(result, kept, strict=True))
    assert torch.equal(obs, kept[0])


def test_rows_not_asked_for_stay(env: BatchedEnv) -> None:
    env.reset([0, 2], [1, 2])  # row 1 has no episode
    before = env.obs
    assert env.running.tolist() == [True, False, True]
    result = env.step(actions(env, 1)[0], torch.tensor([1, 2]))
    assert torch.equal(result.obs[:2], before[:2])
    assert not torch.equal(result.obs[2], before[2])
    assert result.reward[:2].tolist() == [0.0, 0.0]


def test_finished_rows_rest(env_id: str) -> None:
    env = BatchedEnv(env_id, 2)
    env.reset([0], [1])
    steps = 0
    while env.running[0]:
        result = env.step(actions(env, 1, steps)[0])
        steps += 1
    assert steps <= env.spec.max_episode_steps
    assert (
        bool(result.truncated[0]) == (steps == env.spec.max_episode_steps) or result.terminated[0]
    )
    after = env.step(actions(env, 1)[0])
    assert after.reward[0] == 0
    assert torch.equal(after.obs, result.obs)
    assert (after.terminated[0], after.truncated[0], after.success[0]) == (
        result.terminated[0],
        result.truncated[0],
        result.success[0],
    )
    env.reset([0], [1])
    assert env.running[0]
    env.close()


def test_resume_in_the_middle_is_exact(env: BatchedEnv, env_id: str) -> None:
    moves = actions(env, 20)
    env.reset([0, 1], [11, 12])
    play(env, moves[:6])
    env.reset([1], [13])  # row 1 is in its second episode, row 2 has none
    play(env, moves[6:10])
    state = env.state_dict()
    assert [len(a) for a in state["actions"]] == [10, 4, 0]
    assert state["seeds"] == [11, 13, None]
    rest = play(env, moves[10:])
    again = BatchedEnv(env_id, 3)
    again.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(rest, play(again, moves[10:]), strict=True))
    again.load_state_dict(state)  # over running episodes as well
    assert all(same(a, b) for a, b in zip(rest, play(again, moves[10:]), strict=True))
    again.close()


def test_actions_outside_are_clipped_and_others_refused(env: BatchedEnv) -> None:
    ones = torch.ones(3, env.spec.action_dim)
    env.reset([0], [1])
    edge = env.step(ones)
    env.reset([0], [1])
    assert same(edge, env.step(5 * ones))
    with pytest.raises(ValueError, match="non-finite action"):
        env.step(torch.nan * ones)


def test_success_only_where_the_family_has_it(env: BatchedEnv, env_id: str) -> None:
    assert env.spec.has_success == (env_id not in ("Hopper-v5", "Pendulum-v1"))


def test_normalised_actions_are_the_environments_bounds() -> None:
    env = envs.make("Pendulum-v1")
    np.testing.assert_allclose(env.command(np.array([-1, 0.5], np.float32)), [-2, 1])
    np.testing.assert_allclose(env.bounds.normalised(np.array([-2.0, 1.0])), [-1, 0.5])
    raw = gymnasium.make("Pendulum-v1")
    start = raw.reset(seed=3)[0]
    np.testing.assert_array_equal(env.reset(seed=3)[0], start)
    np.testing.assert_allclose(
        env.step(np.array([0.25], np.float32))[0], raw.step([0.5])[0], rtol=1e-6
    )


def test_unknown_ids_name_the_nearest() -> None:
    for wrong, right in (
        ("Hoper-v5", "Hopper-v5"),
        ("FetchPickPlace-v4", "FetchPickAndPlace-v4"),
        ("modip/Toy-v1", "modip/Toy-v0"),
        ("gym_pusht/PushT-v1", "gym_pusht/PushT-v0"),
    ):
        with pytest.raises(UserError, match=f"env {wrong}.*{right}"):
            BatchedEnv(wrong, 1)
    with pytest.raises(UserError, match="no_such_module:Mine-v0"):
        BatchedEnv("no_such_module:Mine-v0", 1)


class _Bad(gymnasium.Env):  # type: ignore[type-arg]
    def __init__(self, kind: str) -> None:
        grid = spaces.Box(0, 1, (3, 3), np.float32)
        flat = spaces.Box(0, 1, (3,), np.float32)
        self.observation_space = grid if kind == "picture" else flat
        self.action_space = {
            "discrete": spaces.Discrete(3),
            "unbounded": spaces.Box(-np.inf, np.inf, (1,), np.float32),
        }.get(kind, flat)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(3, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("kind", "limit", "message"),
    [
        ("picture", 9, "observation space"),
        ("discrete", 9, "action space"),
        ("unbounded", 9, "not finite"),
        ("endless", None, "max_episode_steps"),
    ],
)
def test_environments_that_do_not_fit_say_why(kind: str, limit: int | None, message: str) -> None:
    gymnasium.register("Bad-v0", _Bad, max_episode_steps=limit, kwargs={"kind": kind})
    try:
        with pytest.raises(UserError, match=f"env Bad-v0.*{message}"):
            envs.make("Bad-v0")
    finally:
        del gymnasium.registry["Bad-v0"]


def test_an_environment_that_draws_nothing_says_so() -> None:
    gymnasium.register("Plain-v0", _Bad, max_episode_steps=9, kwargs={"kind": "plain"})
    try:
        assert envs.make("Plain-v0").observation_space.shape == (3,)
        assert (
            envs.video_support("Plain-v0")
            == "no videos of Plain-v0: it has no render mode rgb_array"
        )
        with pytest.raises(UserError, match="no videos of Plain-v0"):
            BatchedEnv("Plain-v0", 1, render=True)
    finally:
        del gymnasium.registry["Plain-v0"]


# -- toy ---------------------------------------------------------------------------------------


def test_nothing_beats_the_toys_optimum() -> None:
    env = BatchedEnv("modip/Toy-v0", 64)
    env.reset(range(64), range(64))
    start = env.obs.numpy()
    best = np.array([toy.optimal_return(s[:2], s[2:]) for s in start])
    for style in ("optimal", "straight", "random"):
        env.reset(range(64), range(64))
        total = torch.zeros(64)
        for move in actions(env, toy.STEPS):
            way = (env.obs[:, 2:] - env.obs[:, :2]) / toy.SPEED
            if style == "optimal":
                move = way.clamp(-1, 1)
            elif style == "straight":
                move = way / way.abs().amax(1, keepdim=True).clamp_min(1)
            result = env.step(move)
            total += result.reward
        assert result.truncated.all()
        if style == "optimal":
            np.testing.assert_allclose(total.numpy(), best, atol=1e-3)
            assert result.success.all()
        else:
            assert (total.numpy() <= best + 1e-3).all()
            assert total.mean() < best.mean() - 0.1 * (style == "random")


def test_toy_success_is_at_the_last_step() -> None:
    env = BatchedEnv("modip/Toy-v0", 1)
    env.reset([0], [0])
    for _ in range(10):
        way = (env.obs[:, 2:] - env.obs[:, :2]) / toy.SPEED
        env.step(way.clamp(-1, 1))
    while env.running[0]:  # and away again
        result = env.step(-torch.sign(env.obs[:, 2:]))
    assert not result.success[0]


# -- fetch -------------------------------------------------------------------------------------


def test_fetch_observation_reward_and_success() -> None:
    env = BatchedEnv("FetchPickAndPlace-v4", 1)  # which makes the id known to Gymnasium
    env.reset([0], [4])
    raw = gymnasium.make("FetchPickAndPlace-v4")
    parts = raw.reset(seed=4)[0]
    assert env.spec.obs_dim == 31

    def check(obs: Tensor, parts: Any) -> None:
        state, turn = parts["observation"], 4 * parts["observation"][11:14]
        np.testing.assert_allclose(obs[:11], state[:11], rtol=1e-6)
        np.testing.assert_allclose(obs[11:14], np.sin(turn), atol=1e-6)
        np.testing.assert_allclose(obs[14:25], state[14:], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(
            obs[25:28], parts["desired_goal"] - parts["achieved_goal"], atol=1e-6
        )
        np.testing.assert_allclose(obs[28:], np.cos(turn), atol=1e-6)

    check(env.obs[0], parts)
    for move in actions(env, 5):
        result = env.step(move)
        parts, reward, *_, info = raw.step(move[0].numpy())
        check(result.obs[0], parts)
        assert result.reward[0] == reward + 1
        assert bool(result.success[0]) == bool(info["is_success"])
    assert envs.success_at_end("FetchPickAndPlace-v4", 1.0, False) is True
    assert envs.success_at_end("FetchPickAndPlace-v4", 0.0, False) is False


# -- locomotion --------------------------------------------------------------------------------


def test_scores_are_d4rls() -> None:
    assert envs.score("Hopper-v5", 3234.3) == pytest.approx(100)
    assert envs.score("Hopper-v5", -20.272305) == pytest.approx(0)
    assert envs.score("HalfCheetah-v5", 12135.0) == pytest.approx(100)
    assert envs.score("Walker2d-v5", 4592.3) == pytest.approx(100)
    assert envs.score("Hopper-v5", 1535.0) == pytest.approx(47.8, abs=0.1)
    for other in ("Ant-v5", "FetchPickAndPlace-v4", "modip/Toy-v0", "Hopper-Mine-v0"):
        assert envs.score(other, 1.0) is None
        assert envs.data_note(other) is None
    assert "friction" in str(envs.data_note("Walker2d-v5"))
    assert "friction" not in str(envs.data_note("Hopper-v5"))


# -- PushT -------------------------------------------------------------------------------------


def test_pusht_features_in_numbers() -> None:
    # A block turned by 90 degrees with its origin 100 px right of the agent, which has just moved 5 px to the right.
    state = np.array([[256.0, 128.0, 356.0, 128.0, np.pi / 2]])
    found = pusht.features(state, np.array([[251.0, 128.0]]))[0]
    # Seen from there, the agent is 100 px along the block's y axis; the goal, 128 px further down, along its x axis too.
    turn = np.pi / 4 - np.pi / 2
    expected = [0.0, 1.0, 1.28, 1.0, np.sin(turn), np.cos(turn), 0.0, -0.5]
    np.testing.assert_allclose(found[:8], expected, atol=1e-6)
    assert 0.0 <= found[8] < 1.0


def test_pusht_coverage_is_the_environments() -> None:
    env = BatchedEnv("gym_pusht/PushT-v0", 1)
    raw = gymnasium.make("gym_pusht/PushT-v0").unwrapped
    pose = np.array([100.0, 100.0, 256.0, 256.0, np.pi / 4])
    assert pusht.coverage(np.zeros((1, 2)), np.zeros(1))[0] == pytest.approx(1.0)
    for shift in (0.0, 20.0, 60.0):
        state = raw.reset(seed=0, options={"reset_to_state": pose + np.array([0, 0, shift, 0, 0])})[
            0
        ]
        found = pusht.features(state[None], state[None, :2])[0, 8]
        assert found == pytest.approx(raw._get_coverage(), abs=1e-3)
    env.close()


def test_pusht_features_follow_the_blocks_frame() -> None:
    rng = np.random.default_rng(0)
    block, angle = rng.uniform(100, 400, (50, 2)), rng.uniform(-9, 9, 50)
    seen = rng.uniform(-80, 80, (50, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    agent = block + np.einsum("ijn,nj->ni", turn, seen)
    state = np.concatenate([agent, block, angle[:, None]], axis=1)
    found = pusht.features(state, agent)
    np.testing.assert_allclose(found[:, :2] * 100, seen, atol=1e-4)
    np.testing.assert_array_equal(found[:, 6:8], 0.0)
    state[:, 4] += 2 * np.pi
    np.testing.assert_allclose(pusht.features(state, agent), found, atol=1e-5)


def test_pusht_mirror_image_is_an_episode() -> None:
    """Reflected at the goal's stem, (x, y) -> (512 - y, 512 - x), features and actions only change sign."""
    rng = np.random.default_rng(0)
    state = rng.uniform(50, 450, (20, 5))
    agent, target = rng.uniform(50, 450, (2, 20, 2))

    def reflected(point: Any) -> Any:
        return 512.0 - point[:, ::-1]

    image = np.concatenate(
        [reflected(state[:, :2]), reflected(state[:, 2:4]), (np.pi / 2 - state[:, 4:])], axis=1
    )
    signs = np.array(pusht.MIRROR)
    np.testing.assert_allclose(
        pusht.features(image, reflected(agent)), signs[:9] * pusht.features(state, agent), atol=1e-4
    )
    np.testing.assert_allclose(
        pusht.relative_action(reflected(target), image[:, :2], image[:, 4]),
        signs[9:] * pusht.relative_action(target, state[:, :2], state[:, 4]),
        atol=1e-5,
    )


def test_pusht_actions_are_relative_to_the_agent_of_that_step() -> None:
    env = BatchedEnv("gym_pusht/PushT-v0", 1)
    raw = gymnasium.make("gym_pusht/PushT-v0")
    env.reset([0], [2])
    state = raw.reset(seed=2)[0]
    for move in actions(env, 8) * 0.4:
        sin, cos = np.sin(state[4]), np.cos(state[4])
        x, y = 85 * move[0].numpy().astype(np.float64)
        target = np.clip(state[:2] + np.array([cos * x - sin * y, sin * x + cos * y]), 0, 512)
        inverse = pusht.relative_action(target[None], state[None, :2], state[4:])
        if ((target > 0) & (target < 512)).all():
            np.testing.assert_allclose(inverse[0], move[0], atol=1e-6)
        before = state[:2]
        state, reward, *_ = raw.step(target)
        result = env.step(move)
        expected = pusht.features(state[None], before[None])[0]
        np.testing.assert_allclose(result.obs[0], expected, atol=1e-5)
        assert result.reward[0] == pytest.approx(reward, abs=1e-6)
    assert envs.success_at_end("gym_pusht/PushT-v0", 1.0, True) is True
    assert envs.success_at_end("gym_pusht/PushT-v0", 1.0, False) is False


# -- pictures ----------------------------------------------------------------------------------

NO_GL = """
import ctypes, ctypes.util
find, Library = ctypes.util.find_library, ctypes.CDLL
ctypes.util.find_library = lambda name: None if name in ("EGL", "OSMesa", "GL") else find(name)
class Missing(Library):
    def __init__(self, name, *args, **kwargs):
        if name and any(part in str(name) for part in ("EGL", "OSMesa", "libGL")):
            raise OSError(f"{name}: cannot open shared object file")
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = Missing
ctypes.cdll = ctypes.LibraryLoader(Missing)
"""
WITHOUT_GL = """
from modip import envs
from modip.errors import UserError
print(envs.video_support("Hopper-v5"))
print(envs.video_support("gym_pusht/PushT-v0"), envs.video_support("modip/Toy-v0"))
env = envs.BatchedEnv("Hopper-v5", 1)
env.reset([0], [0])
print(tuple(env.obs.shape))
try:
    envs.BatchedEnv("Hopper-v5", 1, render=True)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("chosen", ["egl", ""])
def test_without_opengl_all_but_videos_works(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_GL)
    root = Path(envs.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if chosen:
        monkeypatch.setenv("MUJOCO_GL", chosen)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GL], capture_output=True, text=True, check=True, timeout=100
    )
    hopper, others, shape, refusal = done.stdout.splitlines()
    assert "libegl1" in hopper
    assert "Hopper-v5" in hopper
    assert others == "None None"
    assert shape == "(1, 11)"
    assert refusal == hopper


@pytest.mark.parametrize("env_id", ["modip/Toy-v0", "gym_pusht/PushT-v0", "Hopper-v5"])
def test_frames_show_what_happens(env_id: str) -> None:
    missing = envs.video_support(env_id)
    if missing is not None:
        with pytest.raises(UserError, match="libegl1"):
            BatchedEnv(env_id, 1, render=True)
        return
    env = BatchedEnv(env_id, 2, render=True)
    env.reset([0, 1], [0, 1])
    before = env.frame(0)
    assert before.dtype == np.uint8
    assert before.ndim == 3
    assert before.std() > 1
    assert not np.array_equal(before, env.frame(1))
    for move in actions(env, 5):
        env.step(move)
    assert not np.array_equal(before, env.frame(0))
    env.close()
