"""Recorded steps replayed: what agrees, what is flagged, and what cannot be said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modip import envs
from modip.data import episodes, fidelity
from modip.data.episodes import DatasetInfo, Recording, Rows
from modip.envs import BatchedEnv
from tests.helpers import episodes as toy_episodes

HOPPER = Path(__file__).parents[2] / "data" / "samples" / "hopper_surrogate_medium.parquet"


def replay(recording: Recording) -> dict[str, Any]:
    facts = episodes.statistics(recording)
    sample = fidelity.sample(recording, facts["steps"], facts["terminated"])
    return fidelity.one_step_error(recording.info.env_id, sample)


def hopper(change: Callable[[Rows], Rows] = lambda rows: rows) -> Recording:
    found = episodes.collected(episodes.stream(HOPPER)).recording
    return Recording(found.info, [change(rows) for rows in found.rows])


def played(env_id: str, steps: int) -> Recording:
    """What happens now: episodes under random actions of different strength."""
    env = BatchedEnv(env_id, 1)
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    seed = 0
    for step in range(steps):
        if not env.running[0]:
            env.reset([0], [seed])
            seed += 1
        size = 0.3 if seed % 2 else 1.0
        action = (size * rng.uniform(-1, 1, env.spec.action_dim)).astype(np.float32)
        obs = env.obs[0].numpy()
        result = env.step(torch.from_numpy(action)[None])
        ends = bool(result.terminated[0]), bool(result.truncated[0]) or step == steps - 1
        rows.append((obs, action, np.float32(result.reward[0]), *ends))
    env.close()
    info = DatasetInfo("d", env_id, "v", "s", "l", "h", "d")
    return Recording(info, [Rows(*map(np.array, zip(*rows, strict=True)))])


def test_the_hopper_sample_is_of_this_simulator() -> None:
    facts = replay(hopper())
    assert facts["fidelity_transitions"] > 180
    assert facts["fidelity_obs_error_median"] < 1e-4
    assert facts["fidelity_obs_error_p95"] < 1e-3
    assert facts["fidelity_reward_error_p95"] < 1e-4
    assert facts["fidelity_terminated_agree"] == 1.0
    assert "velocities are observed up to 10 only" in facts["fidelity_note"]
    assert fidelity.doubt(facts) is None
    assert "flags of termination agree in 100%" in fidelity.summary(facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows._replace(action=0.5 * rows.action),
        lambda rows: rows._replace(action=np.roll(rows.action, 1, axis=0)),
        lambda rows: rows._replace(action=-rows.action),
    ],
    ids=["half the scale", "one step late", "the other sign"],
)
def test_wrong_actions_are_flagged(change: Callable[[Rows], Rows]) -> None:
    facts = replay(hopper(change))
    assert facts["fidelity_obs_error_median"] > 0.5
    assert "another scale of its actions" in str(fidelity.doubt(facts))


@pytest.mark.parametrize("env_id", ["modip/Toy-v0", "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"])
def test_what_happens_here_is_faithful(env_id: str) -> None:
    facts = replay(played(env_id, 600))
    assert facts["fidelity_transitions"] > 100
    assert facts["fidelity_obs_error_p95"] < 1e-3
    assert facts["fidelity_reward_error_p95"] < 1e-4
    assert facts["fidelity_terminated_agree"] == 1.0
    assert fidelity.doubt(facts) is None


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_another_version_shows() -> None:
    """Gymnasium's v4 has the friction and the healthy reward of v2: steps on the right foot and falls differ."""
    old = played("Walker2d-v4", 1500)
    facts = replay(Recording(DatasetInfo("d", "Walker2d-v5", "v4", "", "", "", ""), old.rows))
    assert facts["fidelity_obs_error_median"] < 1e-3
    assert facts["fidelity_obs_error_p95"] > 0.1
    assert facts["fidelity_reward_error_p95"] == pytest.approx(1.0, abs=1e-3)  # at each fall
    assert "some recorded steps" in str(fidelity.doubt(facts))


@pytest.mark.parametrize("env_id", ["FetchPickAndPlace-v4", "gym_pusht/PushT-v0", "Pendulum-v1"])
def test_what_is_not_observed_is_not_replayed(env_id: str) -> None:
    facts = replay(played(env_id, 20))
    assert facts["fidelity_transitions"] == 0
    note, _ = facts.pop("fidelity_note"), facts.pop("fidelity_tolerance")
    assert note.startswith("20 of 20 left out: ")
    assert "observed" in note or "observation" in note
    assert set(facts.values()) == {0, None}
    assert note in fidelity.summary({**facts, "fidelity_note": note})
    assert fidelity.doubt({**facts, "fidelity_tolerance": 0.1}) is None


def test_episodes_of_one_step_have_no_next_observation() -> None:
    info = toy_episodes().info
    first = next(iter(toy_episodes().recording.rows))
    rows = Rows(*(part[:1] for part in first))._replace(truncated=np.array([True]))
    facts = replay(Recording(info, [rows]))
    assert facts["fidelity_transitions"] == 1
    assert facts["fidelity_reward_error_median"] < 1e-6
    assert facts["fidelity_obs_error_median"] is None
    assert "no step has a successor" in fidelity.summary(facts)
    assert fidelity.doubt(facts) is None


def test_a_sample_is_spread_over_the_file_with_its_ends_whatever_the_blocks() -> None:
    length, count = 25, 400

    def rows(block: int) -> Iterator[Rows]:
        index = np.arange(length * count)
        last = index % length == length - 1
        fall = last & (index // length % 2 == 0)
        obs = np.repeat(index[:, None], 4, axis=1).astype(np.float32)
        whole = Rows(obs, obs[:, :2], obs[:, 0], fall, last & ~fall)
        for start in range(0, len(index), block):
            yield Rows(*(part[start : start + block] for part in whole))

    info = toy_episodes().info
    for block in (length * count, 997, 101):
        found = fidelity.sample(Recording(info, rows(block)), length * count, count // 2)
        at = np.array([one.reward for one in found])
        assert (np.diff(at) > 0).all()
        assert 240 <= len(found) <= 250
        assert np.diff(at).max() < 3 * length * count / fidelity.STEPS
        assert sum(one.terminated for one in found) >= fidelity.ENDS
        for one in found:
            if one.next_obs is None:
                assert one.reward % length == length - 1
            else:
                assert one.next_obs[0] == one.obs[0] + 1


def test_states_may_come_from_elsewhere() -> None:
    """A converter that knows the simulator's states gives its own transitions."""
    env = envs.make("modip/Toy-v0")
    start = env.reset(seed=3)[0]
    action = np.array([0.5, -1.0], np.float32)
    after, reward, *_ = env.step(action)
    known = fidelity.Transition(
        lambda one: one.restore(start), start, action, reward, terminated=False, next_obs=after
    )
    refused = known._replace(restore=lambda _: "of another model")
    facts = fidelity.one_step_error("modip/Toy-v0", [known, refused])
    assert facts["fidelity_obs_error_median"] < 1e-6
    assert facts["fidelity_note"] == "1 of 2 left out: of another model"
