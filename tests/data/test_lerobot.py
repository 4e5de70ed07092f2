"""LeRobot data sets of every layout, written as LeRobot writes them, converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modip import envs
from modip.data import episodes, lerobot
from modip.data.episodes import Episodes
from modip.data.sources import LeRobotSource
from modip.errors import UserError

KEYPOINTS = "modip/PushTKeypoints-v0"
FEATURES = ["observation.state", "observation.environment_state"]
LENGTHS = [5, 1, 7, 4]
SUCCESS = [True, False, False, True]


def frames(
    lengths: list[int] = LENGTHS, dtype: str = "float32", seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """The columns of a PushT data set, episode after episode."""
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    ends = np.cumsum(lengths) - 1
    frame = np.concatenate([np.arange(n) for n in lengths])
    success = np.zeros(count, np.bool_)
    success[ends] = (SUCCESS * len(lengths))[: len(lengths)]
    return {
        "observation.state": rng.uniform(0, 512, (count, 2)).astype(dtype),
        "observation.environment_state": rng.uniform(0, 512, (count, 16)).astype(dtype),
        "action": rng.uniform(0, 512, (count, 2)).astype(dtype),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": frame,
        "timestamp": (frame / 10).astype(np.float32),
        "next.reward": rng.uniform(size=count).astype(dtype),
        "next.done": np.isin(np.arange(count), ends),
        "next.success": success,
        "index": np.arange(count),
        "task_index": np.zeros(count, np.int64),
    }


def table(columns: dict[str, Any], rows: slice, fixed: bool) -> pa.Table:
    arrays = {}
    for name, values in columns.items():
        part = np.asarray(values)[rows]
        if part.ndim == 1:
            arrays[name] = pa.array(part)
        elif fixed:
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
        else:
            offsets = np.arange(0, part.size + 1, part.shape[1], dtype=np.int32)
            arrays[name] = pa.ListArray.from_arrays(offsets, pa.array(part.ravel()))
    return pa.table(arrays)


def write(root: Path, columns: dict[str, Any], version: str = "v2.1", split: int = 2) -> None:
    """Layout v2.x: one file per episode; v3.0: `split` episodes per file."""
    lengths = np.bincount(columns["episode_index"]).tolist()
    starts = np.append(0, np.cumsum(lengths)).tolist()
    features = {
        name: {
            "dtype": str(np.asarray(values).dtype),
            "shape": list(np.asarray(values).shape[1:]) or [1],
            "names": None,
        }
        for name, values in columns.items()
    }
    features["observation.image"] = {"dtype": "video", "shape": [96, 96, 3], "names": None}
    old = version != "v3.0"
    info: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": "unknown",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": 10,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        if old
        else "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": features,
    }
    meta, data = root / "meta", root / "data" / "chunk-000"
    meta.mkdir(parents=True)
    data.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info, indent=4))
    if old:
        (meta / "tasks.jsonl").write_text('{"task_index": 0, "task": "Push the T"}\n')
        with (meta / "episodes.jsonl").open("w") as file:
            for episode, length in enumerate(lengths):
                told = {"episode_index": episode, "tasks": ["Push the T"], "length": length}
                file.write(json.dumps(told) + "\n")
    else:
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        rows = [{"episode_index": e, "length": n} for e, n in enumerate(lengths)]
        pq.write_table(
            pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet"
        )
    step = 1 if old else split
    for number, first in enumerate(range(0, len(lengths), step)):
        last = min(first + step, len(lengths))
        name = f"episode_{number:06d}.parquet" if old else f"file-{number:03d}.parquet"
        pq.write_table(table(columns, slice(starts[first], starts[last]), not old), data / name)


def source(path: Path, **change: Any) -> LeRobotSource:
    told = {
        "source": "lerobot", "env": KEYPOINTS, "path": str(path), "observation": FEATURES,
        "reward": "recorded",
    }  # fmt: skip
    return LeRobotSource.model_validate({**told, **change})


def converted(path: Path, **change: Any) -> Episodes:
    return episodes.collected(lerobot.convert("l", source(path, **change), path, "5ha"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("version", lerobot.VERSIONS)
def test_every_layout_gives_what_was_recorded(tmp_path: Path, version: str, dtype: str) -> None:
    columns = frames(dtype=dtype)
    write(tmp_path, columns, version)
    data = converted(tmp_path)
    wanted = np.concatenate([columns[name] for name in FEATURES], axis=1)
    np.testing.assert_array_equal(data.observation, wanted.astype(np.float32))
    np.testing.assert_allclose(data.action, columns["action"] / 256.0 - 1, atol=1e-3)
    np.testing.assert_array_equal(data.reward, columns["next.reward"].astype(np.float32))
    np.testing.assert_array_equal(data.episode_id, columns["episode_index"])
    np.testing.assert_array_equal(data.step, columns["frame_index"])
    ends = columns["next.done"]
    np.testing.assert_array_equal(data.terminated, columns["next.success"])
    np.testing.assert_array_equal(data.truncated, ends & ~columns["next.success"])
    assert (data.info.dataset, data.info.sha256) == ("l", "5ha")
    assert version in data.info.description


def test_the_environment_sees_what_was_recorded(tmp_path: Path) -> None:
    env = envs.make(KEYPOINTS)
    obs, columns = [env.reset(seed=4)[0]], frames([6])
    rng = np.random.default_rng(1)
    targets = (obs[0][:2] + rng.uniform(-60, 60, (6, 2))).clip(0, 512)
    for target in targets:
        obs.append(env.step(env.bounds.normalised(target))[0])
    columns["observation.state"] = np.array(obs[:-1])[:, :2]
    columns["observation.environment_state"] = np.array(obs[:-1])[:, 2:]
    columns["action"] = targets.astype(np.float32)
    write(tmp_path, columns)
    data = converted(tmp_path)
    np.testing.assert_array_equal(env.reset(seed=4)[0], data.observation[0])
    for row in range(5):
        np.testing.assert_allclose(
            env.step(data.action[row])[0], data.observation[row + 1], atol=1e-3
        )
    env.close()


def test_without_rewards_success_at_the_last_frame_is_the_reward(tmp_path: Path) -> None:
    columns = frames()
    del columns["next.reward"]
    write(tmp_path / "a", columns)
    data = converted(tmp_path / "a", reward="last_frame")
    np.testing.assert_array_equal(data.reward, columns["next.success"].astype(np.float32))
    np.testing.assert_array_equal(data.terminated, columns["next.success"])
    with pytest.raises(UserError, match=r"no feature next\.reward; with data\.l\.reward: last_fra"):
        converted(tmp_path / "a")
    del columns["next.success"]
    write(tmp_path / "b", columns)
    data = converted(tmp_path / "b", reward="last_frame")
    np.testing.assert_array_equal(data.reward, columns["next.done"].astype(np.float32))
    np.testing.assert_array_equal(data.terminated, columns["next.done"])


def test_done_alone_does_not_say_success(tmp_path: Path) -> None:
    columns = frames()
    del columns["next.success"]
    write(tmp_path, columns)
    data = converted(tmp_path)
    assert not data.terminated.any()
    np.testing.assert_array_equal(data.truncated, columns["next.done"])


def test_many_blocks_and_files_in_order_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot, "ROW_GROUP", 3)
    columns = frames([2, 1, 3] * 4)
    write(tmp_path, columns, "v3.0", split=1)
    folder = tmp_path / "data" / "chunk-000"
    for number in range(10, 12):  # file-1000 comes after file-999, not before
        (folder / f"file-{number:03d}.parquet").rename(folder / f"file-{990 + number}.parquet")
    data = converted(tmp_path)
    np.testing.assert_array_equal(data.episode_id, columns["episode_index"])
    np.testing.assert_array_equal(data.action, converted(tmp_path).action)
    np.testing.assert_array_equal(data.observation[:, :2], columns["observation.state"])
    np.testing.assert_array_equal(data.terminated, columns["next.success"])


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, version: str) -> None:
    write(tmp_path, frames(), version)
    files = sorted((tmp_path / "data" / "chunk-000").iterdir())
    last = files[-1].read_bytes()
    files[-1].write_bytes(last[: len(last) // 2])
    with pytest.raises(UserError, match=rf"data/chunk-000/{files[-1].name}: not a complete"):
        converted(tmp_path)
    files[-1].unlink()
    with pytest.raises(
        UserError, match=r"episodes and \d+ frames in data/, but meta/info.json says 4 and 17"
    ):
        converted(tmp_path)
    files[-1].write_bytes(last)
    files[0].unlink()
    with pytest.raises(UserError, match="row 0 is frame 0 of episode .*, out of order"):
        converted(tmp_path)
    for file in files[1:]:
        file.unlink()
    with pytest.raises(UserError, match="no such files"):
        converted(tmp_path)


def test_frames_that_are_missing_are_found(tmp_path: Path) -> None:
    columns = {name: np.delete(values, 8, axis=0) for name, values in frames().items()}
    write(tmp_path, columns, "v3.0")
    with pytest.raises(UserError, match="row 8 is frame 3 of episode 2, out of order"):
        converted(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version v1.6 is not one of v2.0, v2.1, v3.0"),
        ({"features": None}, "info.json: "),
        ({"total_frames": "many"}, "info.json: "),
    ],
)
def test_an_impossible_info_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, frames())
    info = tmp_path / "meta" / "info.json"
    good = json.loads(info.read_text())
    info.write_text(json.dumps({**good, **change}))
    with pytest.raises(UserError, match=message):
        converted(tmp_path)
    info.write_text(json.dumps({k: v for k, v in good.items() if k != "features"}))
    with pytest.raises(UserError, match=r"info\.json: features is missing"):
        converted(tmp_path)
    info.write_text("{")
    with pytest.raises(UserError, match=r"info\.json: "):
        converted(tmp_path)
    info.unlink()
    with pytest.raises(UserError, match=r"info\.json: no such file"):
        converted(tmp_path)


def test_features_that_do_not_fit_are_named(tmp_path: Path) -> None:
    columns = frames()
    write(tmp_path / "a", columns)
    for name in ("observation.image", "observation.velocity", "episode_index"):
        with pytest.raises(
            UserError, match=rf"no feature {name} of numbers \(data\.l\.observation"
        ):
            converted(tmp_path / "a", observation=[name])
    with pytest.raises(UserError, match="observation has 2 numbers, but modip/PushTKey.* has 18"):
        converted(tmp_path / "a", observation=["observation.state"])
    write(tmp_path / "b", {**columns, "action": columns["action"] + 1000})
    with pytest.raises(UserError, match=r"action\[0\] is .* outside the bounds"):
        converted(tmp_path / "b")
    write(tmp_path / "c", {**columns, "action": columns["action"].astype(str)})
    with pytest.raises(UserError, match=r"episode_000000\.parquet: column action holds list<"):
        converted(tmp_path / "c")
    bad = columns["next.reward"].copy()
    bad[6] = np.nan
    write(tmp_path / "d", {**columns, "next.reward": bad})
    recording = lerobot.convert("l", source(tmp_path / "d"), tmp_path / "d", "")
    with pytest.raises(UserError, match=r"reward is nan in row 6 \(episode 2, step 0\)"):
        episodes.write(tmp_path / "d.parquet", recording)
    info = tmp_path / "a" / "meta" / "info.json"
    told = json.loads(info.read_text())
    told["features"]["action"]["shape"] = [3]
    info.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"column action has a row of 2 numbers, but .* says 3"):
        converted(tmp_path / "a")
    told["features"]["action"]["shape"] = [2]
    told["features"]["next.reward"]["shape"] = [2]
    info.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"column next\.reward has one number a row"):
        converted(tmp_path / "a")


def test_empty_rows_and_missing_columns_are_named(tmp_path: Path) -> None:
    write(tmp_path, frames())
    file = tmp_path / "data" / "chunk-000" / "episode_000002.parquet"
    good = pq.read_table(file)
    pq.write_table(good.drop(["action"]), file)
    with pytest.raises(UserError, match=r"episode_000002\.parquet: column action is missing"):
        converted(tmp_path)
    holes = [None, *good.column("action").to_pylist()[1:]]
    at = good.column_names.index("action")
    pq.write_table(good.set_column(at, "action", pa.array(holes)), file)
    with pytest.raises(UserError, match=r"episode_000002\.parquet: column action has empty rows"):
        converted(tmp_path)
