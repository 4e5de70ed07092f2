"""Minari folders in their true layout, HDF5 and Arrow: every row, the kitchen, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from modip.data import episodes, minari
from modip.data.episodes import Episodes
from modip.data.sources import MinariSource
from modip.envs import fetch
from modip.errors import UserError

Episode = dict[str, Any]
KITCHEN = "modip/Kitchen-microwave-kettle-light-slide-v1"
MIXED = "modip/Kitchen-microwave-kettle-bottom_burner-light-v1"
FORMATS = ["hdf5", "arrow"]


def spec(env_id: str, **kwargs: Any) -> str:
    """As gymnasium.envs.registration.EnvSpec.to_json writes it."""
    return json.dumps(
        {
            "id": env_id, "entry_point": "a.b:C", "reward_threshold": None, "nondeterministic": False,
            "max_episode_steps": 1000, "order_enforce": True, "disable_env_checker": False,
            "kwargs": kwargs, "additional_wrappers": [], "vector_entry_point": None,
        }
    )  # fmt: skip


def box(
    length: int, obs: int = 11, act: int = 3, seed: int = 0, dtype: Any = np.float64
) -> Episode:
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(length + 1, obs)).astype(dtype),
        "actions": np.tanh(rng.normal(size=(length, act))).astype(np.float32),
        "rewards": rng.normal(size=length).astype(dtype),
        "terminations": np.zeros(length, np.bool_),
        "truncations": np.arange(length) == length - 1,
    }


def write(
    root: Path, data_format: str, found: list[Episode], env_spec: str | None, **more: Any
) -> None:
    data = root / "data"
    data.mkdir(parents=True)
    metadata = {
        "total_episodes": len(found),
        "total_steps": sum(len(one["rewards"]) for one in found),
        "data_format": data_format,
        "observation_space": "{}",
        "action_space": "{}",
        "dataset_id": "mujoco/hopper/medium-v0",
        "author": ["Kallinteris Andreas"],
        "author_email": ["a@b.c"],
        "code_permalink": "https://example.org",
        "minari_version": "==0.5.0",
        "requirements": ["mujoco==3.2.3", "gymnasium>=1.0.0"],
        "description": "Medium.",
        "dataset_size": 1.0,
    }
    if env_spec is not None:
        metadata["env_spec"] = env_spec
    (data / "metadata.json").write_text(json.dumps(metadata | more))
    if data_format == "hdf5":
        write_hdf5(data / "main_data.hdf5", found)
    else:
        write_arrow(data, found)


def write_hdf5(path: Path, found: list[Episode]) -> None:
    """minari/dataset/_storages/hdf5_storage.py, update_episodes."""

    def add(group: h5py.Group, part: Episode) -> None:
        for key, values in part.items():
            if isinstance(values, dict):
                add(group.create_group(key), values)
            else:
                shape = (None, *values.shape[1:])
                group.create_dataset(key, data=values, chunks=True, maxshape=shape)

    with h5py.File(path, "a", track_order=True) as file:
        for number, one in enumerate(found):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"] = number
            group.attrs["total_steps"] = len(one["actions"])
            group.attrs["seed"] = 5
            add(group, one)
            group.create_dataset("infos", (0,), dtype=h5py.special_dtype(vlen=str))


def write_arrow(data: Path, found: list[Episode]) -> None:
    """minari/dataset/_storages/arrow_storage.py, update_episodes."""

    def encode(values: Any, pad: int) -> pa.Array:
        if isinstance(values, dict):
            parts = [encode(part, pad) for part in values.values()]
            return pa.StructArray.from_arrays(parts, names=list(values))
        values = np.pad(values.reshape(len(values), -1), ((0, pad), (0, 0)))
        kind = pa.list_(pa.from_numpy_dtype(values.dtype), list_size=values.shape[1])
        return pa.FixedSizeListArray.from_arrays(values.reshape(-1), type=kind)

    for number, one in enumerate(found):
        length = len(one["rewards"])
        batch = {
            "episode_id": np.full(length + 1, number, np.int32),
            "observations": encode(one["observations"], 0),
            "actions": encode(one["actions"], 1),
            **{key: np.pad(one[key], (0, 1)) for key in ("rewards", "terminations", "truncations")},
            "infos": pa.array(["{}"] * (length + 1)),
        }
        ds.write_dataset(
            pa.RecordBatch.from_pydict(batch), data, format="arrow",
            partitioning=["episode_id"], existing_data_behavior="overwrite_or_ignore",
        )  # fmt: skip
        text = json.dumps({"id": number, "total_steps": length})
        (data / str(number) / "metadata.json").write_text(text)


def convert(root: Path, env: str = "Hopper-v5") -> Episodes:
    config = MinariSource(source="minari", env=env, path="m/hopper")
    out = root / "out.parquet"
    episodes.write(out, minari.convert("minari/m", config, root, "5ha"), Path(config.path))
    return episodes.read(out)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_rows_are_as_recorded(data_format: str, dtype: Any, tmp_path: Path) -> None:
    found = [box(length, seed=length, dtype=dtype) for length in (7, 1, *range(20, 31))]
    found[0]["truncations"][:] = False
    found[0]["terminations"][-1] = True
    found[3]["truncations"][:] = False  # broken off
    write(tmp_path, data_format, found, spec("Hopper-v5"))
    made = convert(tmp_path)
    assert made.lengths.tolist() == [7, 1, *range(20, 31)]  # episode_10 after episode_9
    for ours, theirs in (
        ("observation", "observations"),
        ("action", "actions"),
        ("reward", "rewards"),
    ):
        kept = [one[theirs][: len(one["rewards"])] for one in found]
        expected = np.concatenate(kept).astype(np.float32)
        np.testing.assert_allclose(getattr(made, ours), expected, atol=1e-7)
    assert np.flatnonzero(made.terminated).tolist() == [6]
    assert made.truncated.sum() == 12
    info = made.info
    assert info.env_version == "Hopper-v5, mujoco==3.2.3, gymnasium>=1.0.0"
    assert (info.source, info.licence) == ("mujoco/hopper/medium-v0", "not stated")
    assert info.description == "Medium. (by Kallinteris Andreas)"


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_dict_is_laid_flat_as_the_environment_lays_it(data_format: str, tmp_path: Path) -> None:
    """Keys in Gymnasium's order, whatever their order in the file; the oracle is Gymnasium's own flatten."""
    env_id = "FetchReachDense-v4"  # custom: 10 + 3 + 3 numbers
    fetch.register()
    env = gymnasium.make(env_id)
    seen = [env.reset(seed=1)[0]]
    one = box(4, act=4)
    for action in one["actions"]:
        seen.append(env.step(action)[0])
    space = env.observation_space
    one["observations"] = {
        key: np.stack([raw[key] for raw in seen])
        for key in ("observation", "desired_goal", "achieved_goal")
    }
    write(tmp_path, data_format, [one], spec(env_id), author="One", license="MIT")
    made = convert(tmp_path, env_id)
    expected = [gymnasium.spaces.flatten(space, raw) for raw in seen[:-1]]
    np.testing.assert_allclose(made.observation, expected, rtol=1e-6, atol=1e-7)
    assert made.info.licence == "MIT"
    assert "One" in made.info.description


def kitchen_episode(shown: list[set[int]]) -> Episode:
    """T + 1 observations that show these of (microwave, kettle, light switch, slide cabinet) done."""
    goals: list[tuple[list[int], Any]] = [
        ([22], [-0.75]),
        ([*range(23, 30)], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
        ([17, 18], [-0.69, -0.05]),
        ([19], [0.37]),
    ]
    length = len(shown) - 1
    one = box(length, 59, 9)
    qpos = np.zeros((length + 1, 30))
    qpos[:, 23:30] = [-0.27, 0.35, 1.62, 1.0, 0.0, 0.0, 0.0]
    for row, now in enumerate(shown):
        for number in now:
            qpos[row, goals[number][0]] = goals[number][1]
    one["observations"][:, 18:39] = qpos[:, 9:]
    one["rewards"] = np.array([float(len(now)) for now in shown[1:]])  # counted again at every step
    goal = {"microwave": np.zeros((length + 1, 1)), "kettle": np.zeros((length + 1, 7))}
    one["observations"] = {
        "achieved_goal": goal, "desired_goal": goal, "observation": one["observations"]
    }  # fmt: skip
    return one


TASKS = ["microwave", "kettle", "light switch", "slide cabinet"]


@pytest.mark.parametrize("data_format", FORMATS)
def test_kitchen_rewards_and_ends_are_the_environments(data_format: str, tmp_path: Path) -> None:
    found = [
        kitchen_episode([set(), {0}, {0}, {0, 1}, {1}, {0, 1, 2}, {0, 1, 2, 3}, {3}, set()]),
        kitchen_episode([set(), {2}, {2, 3}, {2, 3}]),
        kitchen_episode([set(), {0, 1, 2}, {0, 1, 2, 3}]),  # done by the very last action
    ]
    made_in = spec("FrankaKitchen-v1", tasks_to_complete=TASKS, remove_task_when_completed=False)
    write(tmp_path, data_format, found, made_in)
    made = convert(tmp_path, KITCHEN)
    assert made.reward.tolist() == [1, 0, 1, 0, 1, 1, 1, 1, 0, 3, 1]
    assert made.lengths.tolist() == [6, 3, 2]
    assert np.flatnonzero(made.terminated).tolist() == [5, 10]
    assert np.flatnonzero(made.truncated).tolist() == [8]
    first = found[0]["observations"]["observation"][:6]
    np.testing.assert_allclose(made.observation[:6], first, rtol=1e-6)
    assert made.returns.tolist() == [4, 2, 4]
    with pytest.raises(UserError, match=f"recorded in FrankaKitchen-v1 with .*env is {MIXED}; set"):
        convert(tmp_path, MIXED)
    with pytest.raises(UserError, match=r"not interchangeable.*set it to modip/Kitchen-micro"):
        convert(tmp_path, "modip/KitchenD4RL-microwave-kettle-light-slide-v0")


def test_a_60_number_kitchen_file_is_refused(tmp_path: Path) -> None:
    made_in = spec("FrankaKitchen-v1", tasks_to_complete=TASKS)
    one = box(5, 60, 9)
    one["observations"] = {"observation": one["observations"]}
    write(tmp_path, "hdf5", [one], made_in)
    with pytest.raises(
        UserError, match=r"observation has 60 numbers.*not interchangeable.*source: d4rl"
    ):
        convert(tmp_path, KITCHEN)


def with_nan(one: Episode) -> None:
    one["rewards"][2] = np.nan


def short(key: str) -> Any:
    def change(one: Episode) -> None:
        one[key] = one[key][:-1]

    return change


def value(key: str, values: Any) -> Any:
    def change(one: Episode) -> None:
        one[key] = values

    return change


REFUSED = [
    (with_nan, ["m/hopper", "reward is nan in row 7 (episode 1, step 2)"]),
    (lambda one: one.pop("rewards"), ["no array episode_1/rewards"]),
    (lambda one: one.pop("observations"), ["no array episode_1/observations"]),
    (short("actions"), ["episode_1: actions has 4 rows, but 5 belong to 5 rewards"]),
    (short("observations"), ["episode_1: observations has 5 rows, but 6 belong to 5 rewards"]),
    (value("observations", np.zeros((6, 8, 8, 3))), ["observations has shape (6, 8, 8, 3)"]),
    (value("actions", np.zeros(5, np.int64)), ["actions has shape (5,)"]),
    (value("actions", np.zeros((5, 6))), ["action has 6 numbers, but Hopper-v5 has 3"]),
    (value("rewards", np.array([b"a"] * 5)), ["rewards holds |S1"]),
]


@pytest.mark.parametrize(("broken", "named"), REFUSED)
def test_what_does_not_fit_is_named(broken: Any, named: list[str], tmp_path: Path) -> None:
    found = [box(5), box(5)]
    broken(found[1])
    (tmp_path / "data").mkdir()
    metadata = {"total_episodes": 2, "data_format": "hdf5", "env_spec": spec("Hopper-v5")}
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
    write_hdf5(tmp_path / "data" / "main_data.hdf5", found)
    with pytest.raises(UserError) as refusal:
        convert(tmp_path)
    for words in named:
        assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("data_format", FORMATS)
def test_an_incomplete_folder_is_refused(data_format: str, tmp_path: Path) -> None:
    write(tmp_path / "a", data_format, [box(30), box(30)], spec("Hopper-v5"))
    file = "main_data.hdf5" if data_format == "hdf5" else "1/part-0.arrow"
    whole = (tmp_path / "a" / "data" / file).read_bytes()
    for keep in (0, 300, len(whole) - 800):
        (tmp_path / "a" / "data" / file).write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"m/hopper.* not a complete"):
            convert(tmp_path / "a")
    (tmp_path / "a" / "data" / file).unlink()
    with pytest.raises(UserError, match="not a complete"):
        convert(tmp_path / "a")
    write(tmp_path / "b", data_format, [box(3)], spec("Hopper-v5"), total_episodes=2)
    with pytest.raises(UserError, match="tells of 2 episodes, but there are 1"):
        convert(tmp_path / "b")


def test_metadata_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no readable data/metadata\.json"):
        convert(tmp_path)
    write(tmp_path / "a", "hdf5", [box(3)], spec("HalfCheetah-v5"))
    with pytest.raises(
        UserError, match="recorded in HalfCheetah-v5, but .* set it to HalfCheetah-v5"
    ):
        convert(tmp_path / "a")
    with pytest.raises(UserError, match="source: parquet"):
        convert(tmp_path / "a", "FetchPickAndPlace-v4")
    path = tmp_path / "a" / "data" / "metadata.json"
    for text, words in (
        ('{"total_episodes": 1}', "no data_format"),
        ("{", "no readable"),
        ('{"total_episodes": 1, "data_format": "parquet"}', "data_format is parquet"),
        ('{"total_episodes": 1, "data_format": "hdf5", "env_spec": "{}"}', "env_spec"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            convert(tmp_path / "a")
    path.write_text(
        '{"total_episodes": 1, "data_format": "hdf5"}'
    )  # no env_spec: nothing to compare
    assert convert(tmp_path / "a").info.env_version == "not stated"
