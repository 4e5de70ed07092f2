"""Where data come from: embedded samples, scripted demonstrators, a user's own file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from modip import envs
from modip.data import episodes, fetch, parquet, pusht, toy
from modip.data.episodes import DatasetInfo, Episodes
from modip.data.sources import FetchSource, ParquetSource, PushTSource, SourceConfig, ToySource
from modip.envs import pusht as pusht_env
from modip.errors import UserError

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
HUMAN = SAMPLES / "pusht_human_state.parquet"
HOPPER = SAMPLES / "hopper_surrogate_medium.parquet"


@pytest.mark.parametrize(
    "entry",
    [
        {"source": "fetch", "env": "FetchPickAndPlace-v4", "episodes": 0, "noise": 1.0, "seed": 7},
        {"source": "fetch", "env": "FetchPush-v4", "episodes": 9, "noise": 1.0, "seed": 7},
        {"source": "toy", "env": "modip/Toy-v0", "episodes": 9, "noise": -1.0, "seed": 7},
        {"source": "toy", "env": "modip/Toy-v0", "episodes": "9", "noise": 1.0, "seed": 7},
        {"source": "toy", "env": "modip/Toy-v0", "episodes": 9, "noise": 1.0},
        {"source": "parquet", "env": "Hopper-v5", "path": "x", "episodes": 3},
        {
            "source": "calvin",
            "env": "calvin/E-open_drawer",
            "path": "x",
            "split": "training",
            "take": "play",
        },
        {
            "source": "calvin",
            "env": "calvin/D-open_drawer",
            "path": "x",
            "split": "test",
            "take": "play",
        },
        {
            "source": "lerobot",
            "env": "Hopper-v5",
            "path": "x",
            "observation": [],
            "reward": "recorded",
        },
        {
            "source": "lerobot",
            "env": "Hopper-v5",
            "path": "x",
            "observation": ["a"],
            "reward": "none",
        },
        {"source": "d5rl", "env": "Hopper-v5", "path": "x"},
    ],
)
def test_impossible_sources_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SourceConfig).validate_python(entry)


def fetch_source(count: int, noise: float, seed: int = 7) -> FetchSource:
    return FetchSource(
        source="fetch", env="FetchPickAndPlace-v4", episodes=count, noise=noise, seed=seed
    )


def collect_fetch(count: int, noise: float, seed: int = 7) -> Episodes:
    return fetch.collect("f", fetch_source(count, noise, seed), lambda: None)


def test_the_fetch_demonstrator_is_as_good_as_its_noise_level_says() -> None:
    best = episodes.statistics(collect_fetch(12, 0.0).recording)
    assert best["success_rate"] == 1.0
    assert best["return_mean"] > 20
    worse = episodes.statistics(collect_fetch(30, 1.8).recording)
    assert 0.15 <= worse["success_rate"] <= 0.65
    assert worse["return_mean"] < 0.65 * best["return_mean"]


def test_fetch_demonstrations_repeat_and_extend() -> None:
    few, more, other = collect_fetch(2, 1.0), collect_fetch(3, 1.0), collect_fetch(2, 1.0, seed=8)
    rows = len(few.step)
    np.testing.assert_array_equal(few.observation, more.observation[:rows])
    np.testing.assert_array_equal(few.action, more.action[:rows])
    assert not np.array_equal(few.observation, other.observation)
    assert np.abs(few.action).max() <= 1.0
    assert few.observation.shape[1] == 31


def test_progress_is_told_once_an_episode(tmp_path: Path) -> None:
    calls: list[int] = []
    config = ToySource(source="toy", env="modip/Toy-v0", episodes=5, noise=1.0, seed=7)
    data = toy.collect("toy", config, lambda: calls.append(1))
    assert len(calls) == data.num_episodes == 5
    episodes.write(tmp_path / "toy.parquet", data.recording)  # and what it collects is a valid file


def test_without_noise_the_toy_demonstrator_is_optimal() -> None:
    config = ToySource(source="toy", env="modip/Toy-v0", episodes=10, noise=0.0, seed=7)
    data = toy.collect("toy", config, lambda: None)
    first = data.observation[data.starts[:-1]]
    best = [envs.toy.optimal_return(obs[:2], obs[2:]) for obs in first]
    np.testing.assert_allclose(data.returns, best, atol=1e-4)


def test_pusht_is_converted_as_the_environment_sees_it() -> None:
    config = PushTSource(source="pusht", env="gym_pusht/PushT-v0", path=str(HUMAN))
    raw = episodes.read(HUMAN)
    data = episodes.collected(pusht.convert("mine", config, HUMAN, "5ha"))
    assert (data.info.dataset, data.info.sha256) == ("mine", "5ha")
    assert data.observation.shape == (25_650, pusht_env.OBS_DIM)
    assert data.num_episodes == 206
    np.testing.assert_array_equal(data.reward, raw.reward)
    # the oracle: the environment's own command for the converted action is the recorded target
    agent, target = raw.observation[:, :2], raw.action
    near = (np.abs(target - agent) <= pusht_env.REACH).all(1)
    assert near.mean() > 0.99
    env = envs.make("gym_pusht/PushT-v0")
    for row in np.flatnonzero(near)[::997]:
        env.observe(raw.observation[row].astype(np.float64))
        np.testing.assert_allclose(env.command(data.action[row]), target[row], atol=1e-3)
    env.close()


def test_pusht_refuses_another_recording() -> None:
    config = PushTSource(source="pusht", env="gym_pusht/PushT-v0", path="my/file.parquet")
    with pytest.raises(UserError, match=r"my/file\.parquet: observation and action have 11 and 3"):
        episodes.collected(pusht.convert("mine", config, HOPPER, ""))


def test_the_hopper_sample_is_a_surrogate_of_the_stated_quality() -> None:
    config = ParquetSource(source="parquet", env="Hopper-v5", path=str(HOPPER))
    data = episodes.collected(parquet.convert("hopper-surrogate-medium", config, HOPPER, "5ha"))
    facts = episodes.statistics(data.recording)
    assert facts["episodes"] == 238
    assert facts["return_mean"] == pytest.approx(1535, abs=1)
    assert facts["score_mean"] == pytest.approx(47.8, abs=0.1)
    assert "surrogate" in facts["description"].lower()
    assert HOPPER.stat().st_size <= 5e6


def own_file(path: Path, count: int = 10, **change: Any) -> ParquetSource:
    """Pendulum: its torque is in [-2, 2]."""
    info = DatasetInfo("old name", "Pendulum-v1", "1", "here", "MIT", "", "swings")
    data = Episodes(
        info=info,
        observation=np.zeros((count, 3), np.float32),
        action=np.linspace(-2, 2, count, dtype=np.float32)[:, None],
        reward=np.zeros(count, np.float32),
        terminated=np.zeros(count, np.bool_),
        truncated=np.arange(count) == count - 1,
        episode_id=np.zeros(count, np.int32),
        step=np.arange(count, dtype=np.int32),
    )
    episodes.write(path, replace(data, **change).recording)
    return ParquetSource(source="parquet", env="Pendulum-v1", path=str(path))


def test_own_actions_are_normalised_by_the_environments_bounds(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    data = episodes.collected(parquet.convert("own", own_file(path), path, "5ha"))
    np.testing.assert_allclose(data.action[:, 0], np.linspace(-1, 1, 10), atol=1e-6)
    assert (data.info.dataset, data.info.licence, data.info.sha256) == ("own", "MIT", "5ha")


def test_an_own_file_needs_no_description(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    config = own_file(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    info = parquet.convert("own", config, path, "5ha").info
    assert (info.dataset, info.env_id, info.licence) == ("own", "Pendulum-v1", "not stated")


def test_own_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    config = own_file(path)
    with pytest.raises(UserError, match=r"recorded in Pendulum-v1.*data\.own\.env is Hopper-v5"):
        episodes.collected(
            parquet.convert("own", config.model_copy(update={"env": "Hopper-v5"}), path, "")
        )
    with pytest.raises(UserError, match=r"env Pendulm-v1.*did you mean Pendulum-v1"):
        episodes.collected(
            parquet.convert("own", config.model_copy(update={"env": "Pendulm-v1"}), path, "")
        )
    own_file(path, observation=np.zeros((10, 4), np.float32))
    with pytest.raises(UserError, match="observation has 4 numbers, but Pendulum-v1 has 3"):
        episodes.collected(parquet.convert("own", config, path, ""))
    own_file(path, action=np.full((10, 1), 2.5, np.float32))
    with pytest.raises(UserError, match=r"action\[0\] is 2.5 in row 0, outside the bounds"):
        episodes.collected(parquet.convert("own", config, path, ""))


def test_messages_name_the_users_file_not_its_copy(tmp_path: Path) -> None:
    path = tmp_path / "copy.parquet"
    config = own_file(path).model_copy(update={"path": "my/own.parquet"})
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"^my/own\.parquet: not a complete"):
        episodes.collected(parquet.convert("own", config, path, ""))
