"""D4RL files in their true layout: every row, both flags, the kitchen's own rewards and ends, and every refusal."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from modip import envs
from modip.data import columns, d4rl, episodes
from modip.data.episodes import Episodes
from modip.data.sources import D4RLSource
from modip.envs import kitchen
from modip.errors import UserError

Arrays = dict[str, Any]
FULL = "modip/KitchenD4RL-microwave-kettle-light-slide-v0"
MIXED = "modip/KitchenD4RL-microwave-kettle-bottom_burner-light-v0"


def arrays(count: int, obs_dim: int = 11, action_dim: int = 3, seed: int = 0) -> Arrays:
    """A file of the v2 kind, without any end yet."""
    rng = np.random.default_rng(seed)
    return {
        "actions": np.tanh(2 * rng.normal(size=(count, action_dim))).astype(np.float32),
        "observations": rng.normal(size=(count, obs_dim)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "terminals": np.zeros(count, np.bool_),
        "timeouts": np.zeros(count, np.bool_),
        "infos/qpos": rng.normal(size=(count, 6)),
        "infos/action_log_probs": rng.normal(size=count).astype(np.float32),
    }


def write(path: Path, data: Arrays, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file.create_dataset(key, data=values, **options)
        file["metadata/algorithm"] = np.bytes_("SAC")


def convert(path: Path, env: str = "Hopper-v5") -> Episodes:
    config = D4RLSource(source="d4rl", env=env, path="u/hopper.hdf5")
    recording = d4rl.convert("d4rl/hopper", config, path, "5ha")
    assert recording.info.licence == "CC BY 4.0"
    out = path.with_name("out.parquet")
    episodes.write(out, recording, Path(config.path))
    return episodes.read(out)


def oracle_lengths(data: Arrays, limit: int) -> list[int]:
    """As D4RL's sequence_dataset cuts, step by step."""
    lengths, steps = [], 0
    for row in range(len(data["rewards"])):
        steps += 1
        cut = data["timeouts"][row] if "timeouts" in data else steps == limit
        if data["terminals"][row] or cut:
            lengths.append(steps)
            steps = 0
    return lengths + ([steps] if steps else [])


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_rows_are_as_recorded(options: Arrays, dtype: Any, tmp_path: Path) -> None:
    data = arrays(500)
    data["terminals"][[9, 10, 200]] = True  # an episode of length 1 among them
    data["timeouts"][[100, 200, 499]] = True  # row 200 has both
    for key in ("actions", "observations", "rewards"):
        data[key] = data[key].astype(dtype)
    write(tmp_path / "a.hdf5", data, **options)
    made = convert(tmp_path / "a.hdf5")
    np.testing.assert_array_equal(made.observation, data["observations"].astype(np.float32))
    np.testing.assert_allclose(made.action, data["actions"].astype(np.float32), atol=1e-7)
    np.testing.assert_array_equal(made.reward, data["rewards"].astype(np.float32))
    np.testing.assert_array_equal(made.terminated, data["terminals"])
    np.testing.assert_array_equal(made.truncated, data["timeouts"])
    assert made.lengths.tolist() == oracle_lengths(data, 1000) == [10, 1, 90, 100, 299]
    assert (made.info.env_id, made.info.sha256) == ("Hopper-v5", "5ha")


@pytest.mark.parametrize("block", [columns.BLOCK, 700, 1])
def test_without_timeouts_steps_are_counted(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modip.data.columns.BLOCK", block)
    data = arrays(3700 if block > 1 else 1200)
    del data["timeouts"]
    ends = [e for e in (4, 1004, 1500, 3500) if e < len(data["rewards"])]  # row 1004 is both
    data["terminals"][ends] = True
    data["terminals"] = data["terminals"].astype(np.float32)[:, None]
    write(tmp_path / "a.hdf5", data)
    made = convert(tmp_path / "a.hdf5")
    data["terminals"] = data["terminals"][:, 0]
    assert made.lengths.tolist() == oracle_lengths(data, 1000)
    np.testing.assert_array_equal(np.flatnonzero(made.terminated), ends)
    assert not (made.terminated & made.truncated).any()


def test_a_file_may_end_inside_an_episode(tmp_path: Path) -> None:
    data = arrays(50)
    data["terminals"][29] = True
    write(tmp_path / "a.hdf5", data)
    made = convert(tmp_path / "a.hdf5")
    assert made.lengths.tolist() == [30, 20]
    assert np.flatnonzero(made.truncated).tolist() == [49]


def test_actions_on_and_a_hair_outside_the_bounds(tmp_path: Path) -> None:
    data = arrays(4)
    data["actions"][:3, 0] = [1.0, -1.0, 1.000001]
    write(tmp_path / "a.hdf5", data)
    assert np.abs(convert(tmp_path / "a.hdf5").action).max() == 1.0
    data["actions"][2, 1] = 1.5
    write(tmp_path / "a.hdf5", data)
    with pytest.raises(UserError, match=r"action\[1\] is 1.5 in row 2, outside the bounds"):
        convert(tmp_path / "a.hdf5")


def change(key: str, values: Any) -> Any:
    def made(data: Arrays) -> None:
        data[key] = values

    return made


def nan(data: Arrays) -> None:
    data["rewards"][7] = np.nan


REFUSED = [
    (lambda d: d.pop("rewards"), ["no array rewards", "actions", "source: arrays"]),
    (nan, ["u/hopper.hdf5", "reward is nan in row 7"]),
    (change("rewards", np.full(40, 1e300)), ["reward is inf in row 0"]),
    (change("actions", np.zeros((39, 3))), ["actions has 39 rows, but rewards has 40"]),
    (change("observations", np.zeros((40, 4, 4))), ["observations has shape (40, 4, 4)"]),
    (change("rewards", np.float32(1)), ["rewards has shape ()"]),
    (change("terminals", np.array([b"no"] * 40)), ["terminals holds |S2"]),
    (
        change("observations", np.zeros((40, 17))),
        ["observation has 17 numbers", "Hopper-v5 has 11"],
    ),
    (change("actions", np.zeros((40, 6))), ["action has 6 numbers, but Hopper-v5 has 3"]),
]


@pytest.mark.parametrize(("broken", "named"), REFUSED)
def test_what_does_not_fit_is_named(broken: Any, named: list[str], tmp_path: Path) -> None:
    data = arrays(40)
    broken(data)
    write(tmp_path / "a.hdf5", data)
    with pytest.raises(UserError) as refusal:
        convert(tmp_path / "a.hdf5")
    for words in named:
        assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.98])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    write(path, arrays(4000), compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(UserError, match=r"u/hopper\.hdf5: not a complete HDF5 file") as refusal:
        convert(path)
    assert "\n" not in str(refusal.value)


def test_damage_inside_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    write(path, arrays(20_000), compression="gzip")
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 4000] = bytes(4000)
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"hopper\.hdf5"):
        convert(path)
    path.write_text("<html>404</html>")
    with pytest.raises(UserError, match="not a complete HDF5 file"):
        convert(path)
    with pytest.raises(UserError, match="not a complete HDF5 file"):
        convert(tmp_path)
    with h5py.File(path, "w") as file:
        for key in d4rl.KEYS.values():
            file.create_group(key)
    with pytest.raises(UserError, match="no array observations"):
        convert(path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Rows of 300 MB: no more than a few blocks are held."""
    path = tmp_path / "big.hdf5"
    count = 1_000_000
    with h5py.File(path, "w") as file:
        for key, width in (("observations", 60), ("actions", 9)):
            file.create_dataset(key, (count, width), np.float32, chunks=(20_000, width))
        file["observations"][-1, 0] = 1.0
        file.create_dataset("rewards", (count,), np.float32)
        file.create_dataset("terminals", (count,), np.bool_)
        file.create_dataset("timeouts", (count,), np.bool_)
    tracemalloc.start()
    blocks = d4rl._rows(path, "big", 1000)
    assert sum(len(rows.reward) for rows in blocks) == count
    assert tracemalloc.get_traced_memory()[1] < 80e6
    tracemalloc.stop()


# -- kitchen -----------------------------------------------------------------------------------


def kitchen_arrays(env_id: str, histories: list[list[set[int]]], timeouts: bool = False) -> Arrays:
    """Demonstrations by which of the four sub-tasks each observation shows done, as D4RL's script writes them."""
    tasks = kitchen.ENV_IDS[env_id]
    places = {
        "bottom burner": ([11, 12], [-0.88, -0.01]),
        "light switch": ([17, 18], [-0.69, -0.05]),
        "slide cabinet": ([19], [0.37]),
        "microwave": ([22], [-0.75]),
        "kettle": ([*range(23, 30)], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
    }
    rng = np.random.default_rng(0)
    shown = [seen for history in histories for seen in history]
    obs = np.zeros((len(shown), 60))
    obs[:, :9] = rng.normal(size=(len(shown), 9))
    obs[:, 23:30] = [-0.27, 0.35, 1.62, 1.0, 0.0, 0.0, 0.0]
    for row, seen in enumerate(shown):
        for number, task in enumerate(tasks):
            joints, goal = places[task]
            obs[row, [30 + joint for joint in joints]] = goal
            if number in seen:
                obs[row, joints] = np.array(goal) + rng.uniform(-0.1, 0.1, len(goal))
    last = np.zeros(len(shown), np.float32)
    last[np.cumsum([len(history) for history in histories]) - 1] = 1.0
    data = {
        "observations": obs.astype(np.float32),
        "actions": rng.uniform(-0.999, 0.999, (len(shown), 9)).astype(np.float32),
        "rewards": np.array([len(seen) for seen in shown], np.float32),
        "terminals": last,
        "infos": np.zeros(len(shown), np.int64),
    }
    return data | ({"timeouts": np.zeros(len(shown), np.bool_)} if timeouts else {})


COMPLETE = [set(), {0}, {0}, {0, 1}, {1}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}, {1}]
PARTIAL = [set(), set(), {2}, {2, 3}, {3}]


@pytest.mark.parametrize("env_id", [FULL, MIXED])
@pytest.mark.parametrize("timeouts", [True, False])
@pytest.mark.parametrize("block", [columns.BLOCK, 4, 1])
def test_kitchen_rewards_and_ends_are_the_environments(
    env_id: str, timeouts: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modip.data.columns.BLOCK", block)
    data = kitchen_arrays(env_id, [COMPLETE, PARTIAL, [set()], COMPLETE], timeouts)
    write(tmp_path / "k.hdf5", data, compression="gzip")
    made = convert(tmp_path / "k.hdf5", env_id)
    # the action of row 0 opens the microwave, ..., that of row 6 does the fourth: there the episode ends
    assert made.lengths.tolist() == [7, 5, 1, 7]
    assert made.reward.tolist() == [
        *[1, 0, 1, 0, 0, 1, 1],
        *[0, 1, 1, 0, 0],
        *[0],
        *[1, 0, 1, 0, 0, 1, 1],
    ]
    assert np.flatnonzero(made.terminated).tolist() == [6, 19]
    assert np.flatnonzero(made.truncated).tolist() == [11, 12]
    kept = [*range(7), *range(10, 16), *range(16, 23)]
    np.testing.assert_array_equal(made.observation, data["observations"][kept])
    np.testing.assert_allclose(made.action, data["actions"][kept], atol=1e-6)
    facts = episodes.statistics(made.recording)
    assert facts["success_rate"] == 0.5
    assert facts["return_max"] == 4.0
    assert facts["score_mean"] == pytest.approx(100 * (4 + 2 + 0 + 4) / 16)


def test_a_long_demonstration_is_cut_at_280_steps(tmp_path: Path) -> None:
    history = [set()] * 100 + [{1}] * 200 + [{1, 2}] * 20
    write(tmp_path / "k.hdf5", kitchen_arrays(FULL, [history, [*[{0, 1, 2, 3}] * 300]]))
    made = convert(tmp_path / "k.hdf5", FULL)
    assert made.lengths.tolist() == [280, 40]  # what is done from the start on is no episode
    assert made.returns.tolist() == [1.0, 1.0]
    assert np.flatnonzero(made.reward).tolist() == [99, 299]


def test_the_two_kitchens_are_not_interchangeable(tmp_path: Path) -> None:
    path = tmp_path / "k.hdf5"
    data = kitchen_arrays(FULL, [COMPLETE])
    write(path, data)
    with pytest.raises(UserError) as refusal:
        convert(path, "modip/Kitchen-microwave-kettle-light-slide-v1")
    for words in ("not interchangeable", "source: d4rl", f"set it to {FULL} or"):
        assert words in str(refusal.value)
    with pytest.raises(UserError, match=f"not that of {MIXED}; set params.yaml.* to {FULL}"):
        convert(path, MIXED)
    data["observations"] = data["observations"][:, :59]
    path = tmp_path / "short.hdf5"
    write(path, data)
    with pytest.raises(UserError) as refusal:
        convert(path, FULL)
    for words in ("observation has 59 numbers", "not interchangeable", "source: minari"):
        assert words in str(refusal.value)
    path = tmp_path / "other.hdf5"
    write(path, arrays(40, 60, 9))
    with pytest.raises(UserError, match="not that of .* the environment of its sub-tasks"):
        convert(path, FULL)


def test_all_env_ids_have_the_files_widths() -> None:
    """As in D4RL: hopper 11/3, halfcheetah and walker2d 17/6, kitchen 60/9."""
    for env_id, obs_dim, action_dim in (
        ("Hopper-v5", 11, 3),
        ("HalfCheetah-v5", 17, 6),
        ("Walker2d-v5", 17, 6),
        (FULL, 60, 9),
        (MIXED, 60, 9),
    ):
        spec = envs.spec(env_id)
        assert (spec.obs_dim, spec.action_dim) == (obs_dim, action_dim)
