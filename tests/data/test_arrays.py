"""A user's own HDF5 and npz files: the mapping in params.yaml, three ways to end episodes, and every refusal."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from modip.data import arrays, columns, episodes
from modip.data.episodes import Episodes
from modip.data.sources import ArraysSource
from modip.errors import UserError

Named = dict[str, Any]
KINDS = ["hdf5", "npz", "npz, packed"]


def numbers(count: int = 60, dtype: Any = np.float64) -> Named:
    """Pendulum: three numbers, a torque in [-2, 2]."""
    rng = np.random.default_rng(count)
    return {
        "data/obs": rng.normal(size=(count, 3)).astype(dtype),
        "data/act": rng.uniform(-2, 2, (count, 1)).astype(dtype),
        "rew": rng.normal(size=count).astype(dtype),
    }


def write(path: Path, kind: str, named: Named) -> None:
    if kind == "hdf5":
        with h5py.File(path, "w") as file:
            for key, values in named.items():
                file[key] = values
    else:
        with path.open("wb") as file:
            (np.savez_compressed if "packed" in kind else np.savez)(file, **named)


def source(**change: str) -> ArraysSource:
    fields = {
        "source": "arrays", "env": "Pendulum-v1", "path": "my/file", "observation": "data/obs", "action": "data/act",
        "reward": "rew", "terminated": "", "truncated": "", "episode_ends": "",
    }  # fmt: skip
    return ArraysSource.model_validate(fields | change)


def convert(path: Path, config: ArraysSource) -> Episodes:
    out = path.with_name("out.parquet")
    episodes.write(out, arrays.convert("own", config, path, "5ha"), Path(config.path))
    return episodes.read(out)


def check_rows(made: Episodes, named: Named) -> None:
    np.testing.assert_array_equal(made.observation, named["data/obs"].astype(np.float32))
    np.testing.assert_allclose(made.action, named["data/act"].astype(np.float32) / 2, atol=1e-6)
    np.testing.assert_array_equal(made.reward, named["rew"].astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("block", [columns.BLOCK, 7])
def test_flags_end_episodes(
    kind: str, dtype: Any, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modip.data.columns.BLOCK", block)
    named = numbers(dtype=dtype)
    named["done"] = np.isin(np.arange(60), [9, 10, 30])
    named["cut"] = np.isin(np.arange(60), [20, 30]).astype(np.uint8)[:, None]
    write(tmp_path / "f", kind, named)
    made = convert(tmp_path / "f", source(terminated="done", truncated="cut"))
    check_rows(made, named)
    assert made.lengths.tolist() == [10, 1, 10, 10, 29]
    assert np.flatnonzero(made.terminated).tolist() == [9, 10, 30]
    assert np.flatnonzero(made.truncated).tolist() == [20, 30, 59]
    assert (made.info.dataset, made.info.env_id, made.info.sha256) == ("own", "Pendulum-v1", "5ha")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [columns.BLOCK, 7])
def test_episode_ends_end_them(
    kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modip.data.columns.BLOCK", block)
    named = numbers() | {"meta/ends": np.array([1, 14, 21, 60])}
    named["done"] = np.arange(60) == 13
    write(tmp_path / "f", kind, named)
    made = convert(tmp_path / "f", source(episode_ends="meta/ends", terminated="done"))
    check_rows(made, named)
    assert made.lengths.tolist() == [1, 13, 7, 39]
    assert np.flatnonzero(made.terminated).tolist() == [13]
    assert np.flatnonzero(made.truncated).tolist() == [0, 20, 59]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_may_be_an_episode(kind: str, tmp_path: Path) -> None:
    parts = {number: numbers(number + 1) for number in (0, 2, 9, 10)}
    named = {
        f"data/demo_{number}/{key.rpartition('/')[2]}": values
        for number, part in parts.items()
        for key, values in (*part.items(), ("done", np.arange(number + 1) == 9))
    }
    named["data/demo_x/rew"] = named["data/demo_10_old/rew"] = np.zeros(3)
    write(tmp_path / "f", kind, named)
    keys = {"observation": "obs", "action": "act", "reward": "rew", "terminated": "done"}
    config = source(**{name: f"data/demo_{{episode}}/{key}" for name, key in keys.items()})
    made = convert(tmp_path / "f", config)
    # in numeric order; a flag ends the last episode inside its group
    assert made.lengths.tolist() == [1, 3, 10, 10, 1]
    whole = {key: np.concatenate([part[key] for part in parts.values()]) for key in numbers(1)}
    check_rows(made, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_the_names_of_arrays(kind: str, tmp_path: Path) -> None:
    parts = [numbers(4), numbers(5)]
    named = {
        f"{key.rpartition('/')[2]}_{number}": values
        for number, part in enumerate(parts)
        for key, values in part.items()
    }
    write(tmp_path / "f", kind, named)
    config = source(observation="obs_{episode}", action="act_{episode}", reward="rew_{episode}")
    assert convert(tmp_path / "f", config).lengths.tolist() == [4, 5]


def nan(named: Named) -> None:
    named["rew"][7] = np.nan


def value(key: str, values: Any) -> Any:
    def change(named: Named) -> None:
        named[key] = values

    return change


REFUSED = [
    (nan, {}, ["my/file", "reward is nan in row 7"]),
    (None, {"reward": "rewards"}, ["no array rewards", "data.own.reward", "has cut, data"]),
    (None, {"action": "data/actions"}, ["no array data/actions", "data has act, obs"]),
    (None, {"truncated": ""}, ["where do episodes end", "episode_ends", "{episode}"]),
    (None, {"reward": "rew_{episode}"}, ["data.own.observation: 'data/obs' must hold {episode}"]),
    (value("rew", np.zeros(59)), {}, ["data/obs has 60 rows, but rew has 59"]),
    (value("data/obs", np.zeros((60, 9, 9, 3))), {}, ["data/obs has shape (60, 9, 9, 3)"]),
    (value("data/act", np.zeros(60)), {}, ["data/act has shape (60,)"]),
    (value("data/obs", np.zeros((60, 4))), {}, ["observation has 4 numbers, but Pendulum-v1 has 3"]),
    (value("data/act", np.full((60, 1), 3.0)), {}, ["action[0] is 3.0 in row 0, outside"]),
    (value("cut", np.array([7, 5])), {"truncated": "", "episode_ends": "cut"}, ["cut must be whole"]),
    (value("cut", np.array([7, 59])), {"truncated": "", "episode_ends": "cut"}, ["cut ends at 59"]),
    (value("cut", np.array([7, 99])), {"truncated": "", "episode_ends": "cut"}, ["cut ends at 99"]),
    (value("cut", np.float32(3)), {"truncated": "", "episode_ends": "cut"}, ["cut must be whole"]),
    (
        None,
        {"observation": "o/{episode}", "action": "a/{episode}", "reward": "rew/{episode}", "truncated": ""},
        ["nothing in it is called rew/{episode}", "data.own.reward"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
@pytest.mark.parametrize(("broken", "change", "words"), REFUSED)
def test_what_does_not_fit_is_named(
    kind: str, broken: Any, change: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    named = numbers() | {"cut": np.arange(60) == 59}
    if broken:
        broken(named)
    write(tmp_path / "f", kind, named)
    with pytest.raises(UserError) as refusal:
        convert(tmp_path / "f", source(**{"truncated": "cut"} | change))
    for part in words:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_episodes_of_unlike_width_are_refused(tmp_path: Path) -> None:
    named = {"o_0": np.zeros((2, 3)), "o_1": np.zeros((2, 4))}
    named |= {f"{key}_{n}": np.zeros((2, 1)) for key in ("a", "r") for n in (0, 1)}
    write(tmp_path / "f", "npz", named)
    config = source(observation="o_{episode}", action="a_{episode}", reward="r_{episode}")
    with pytest.raises(UserError, match="r_1: observation has 4 numbers, but Pendulum-v1 has 3"):
        convert(tmp_path / "f", config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused(kind: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, kind, numbers(3000) | {"cut": np.arange(3000) == 2999})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match="my/file: not a complete (HDF5|npz) file"):
        convert(path, source(truncated="cut"))


def test_damaged_and_odd_npz_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    named = numbers(3000) | {"cut": np.arange(3000) == 2999}
    for kind in ("npz", "npz, packed"):
        write(path, kind, named)
        damaged = bytearray(path.read_bytes())
        damaged[5000:5400] = bytes(400)
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match="my/file: not a complete npz file"):
            convert(path, source(truncated="cut"))
    write(path, "npz", named | {"rew": np.array([None] * 3000)})
    with pytest.raises(UserError, match="rew must be an array of numbers in row order"):
        convert(path, source(truncated="cut"))
    write(path, "npz", named | {"data/obs": np.asfortranarray(named["data/obs"])})
    with pytest.raises(UserError, match="data/obs must be an array of numbers in row order"):
        convert(path, source(truncated="cut"))
    write(path, "npz", named)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("note.npy", b"hello")
    with pytest.raises(UserError, match="note is not an array of numbers"):
        convert(path, source(truncated="note"))
    with zipfile.ZipFile(path) as archive:
        header = archive.read("rew.npy")[:-8]  # whole for the archive, but a number short
    write(path, "npz", {key: values for key, values in named.items() if key != "rew"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("rew.npy", header)
    with pytest.raises(UserError, match="rew ends early"):
        convert(path, source(truncated="cut"))


@pytest.mark.parametrize("kind", ["hdf5", "npz, packed"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """Rows of 128 MB: no more than a few blocks are held."""
    count = 2_000_000
    named = {"data/obs": np.zeros((count, 3)), "data/act": np.zeros((count, 1))}
    write(tmp_path / "f", kind, named | {"rew": np.zeros(count), "ends": np.array([count])})
    del named
    config = source(episode_ends="ends")
    tracemalloc.start()
    blocks = arrays._rows(config, tmp_path / "f", "data.own")
    assert sum(len(rows.reward) for rows in blocks) == count
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
