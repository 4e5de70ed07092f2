"""CALVIN: files in the layout of calvin_env/datarenderer.py and of the language annotator, converted."""

from __future__ import annotations

import os
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from modip.data import calvin, episodes
from modip.data.episodes import Episodes, Recording, Segment
from modip.data.sources import CalvinSource
from modip.errors import UserError

Dtype = Literal["f2", "f4", "f8"]
RECORDINGS = [(40, 59), (60, 60), (61, 90)]  # frames; the second is one step long
ANNOTATIONS = [
    ((42, 50), "open_drawer", "pull the drawer"),
    ((55, 60), "turn_on_led", "press the button"),  # one frame beyond its recording, as upstream
    ((70, 90), "open_drawer", "open the drawer"),
]


def step(rng: np.random.Generator, dtype: Dtype = "f8", side: int = 4) -> dict[str, Any]:
    """One file's arrays, in the order of the renderer, with small pictures unless told."""
    rel = np.clip(rng.normal(size=7), -1, 1)
    rel[6] = np.sign(rel[6])
    return {
        "actions": rng.normal(size=7).astype(dtype),
        "rel_actions": rel.astype(dtype),
        "robot_obs": rng.normal(size=15).astype(dtype),
        "scene_obs": rng.normal(size=24).astype(dtype),
        "rgb_static": rng.integers(0, 255, (side, side, 3), np.uint8),
        "rgb_gripper": rng.integers(0, 255, (side // 2, side // 2, 3), np.uint8),
        "depth_static": rng.normal(size=(side, side)).astype(np.float32),
        "depth_gripper": rng.normal(size=(side // 2, side // 2)).astype(np.float32),
    }


def write(
    root: Path,
    split: str = "training",
    recordings: list[tuple[int, int]] = RECORDINGS,
    annotations: list[tuple[tuple[int, int], str, str]] | None = ANNOTATIONS,
    dtype: Dtype = "f8",
    side: int = 4,
) -> dict[str, np.ndarray[Any, Any]]:
    """Writes root/split; returns what every array was, frame after frame."""
    rng = np.random.default_rng(3)
    folder = root / split
    folder.mkdir(parents=True)
    kept: dict[str, list[Any]] = {"robot_obs": [], "scene_obs": [], "rel_actions": []}
    for first, last in recordings:
        for frame in range(first, last + 1):
            arrays = step(rng, dtype, side)
            np.savez_compressed(folder / f"episode_{frame:07d}.npz", **arrays)
            for name, values in kept.items():
                values.append(arrays[name])
    np.save(folder / "ep_start_end_ids.npy", recordings)
    np.save(folder / "ep_lens.npy", [last + 1 - first for first, last in recordings])
    np.save(folder / "scene_info.npy", {"calvin_scene_D": [0, 90]})  # type: ignore[arg-type]
    (folder / "statistics.yaml").write_text("robot_obs: []\n")
    if annotations is not None:
        (folder / "lang_annotations").mkdir()
        told: dict[str, Any] = {
            "language": {
                "ann": [text for _, _, text in annotations],
                "task": [task for _, task, _ in annotations],
                "emb": rng.normal(size=(len(annotations), 1, 384)).astype(np.float32),
            },
            "info": {
                "episodes": [],
                "indx": [(np.int64(a), np.int64(b)) for (a, b), _, _ in annotations],
            },
        }
        np.save(folder / "lang_annotations" / "auto_lang_ann.npy", told)  # type: ignore[arg-type]
    return {name: np.array(values) for name, values in kept.items()}


def source(path: Path, take: str = "play", env: str = "calvin/D-open_drawer") -> CalvinSource:
    return CalvinSource.model_validate(
        {"source": "calvin", "env": env, "path": str(path), "split": "training", "take": take}
    )


def converted(path: Path, take: str = "play") -> tuple[Recording, Episodes]:
    recording = calvin.convert("c", source(path, take), path, "5ha")
    return recording, episodes.collected(recording)


def zipped(folder: Path, target: Path, prefix: str, method: int) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return target


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_play_is_kept_whole(tmp_path: Path, dtype: Dtype) -> None:
    arrays = write(tmp_path, dtype=dtype)
    recording, data = converted(tmp_path)
    both = np.concatenate((arrays["robot_obs"], arrays["scene_obs"]), axis=1)
    np.testing.assert_array_equal(data.observation, both.astype(np.float32))
    np.testing.assert_array_equal(data.action, arrays["rel_actions"].astype(np.float32))
    assert data.observation.shape == (51, 39)
    assert data.lengths.tolist() == [20, 1, 30]
    assert not data.terminated.any()
    frames = np.concatenate([np.arange(a, b + 1) for a, b in RECORDINGS])
    assert frames[data.reward == 1].tolist() == [50, 90]
    assert set(data.reward.tolist()) == {0.0, 1.0}
    assert recording.segments == (
        Segment(0, 2, 10, "open_drawer", "pull the drawer"),
        Segment(0, 15, 19, "turn_on_led", "press the button"),
        Segment(2, 9, 29, "open_drawer", "open the drawer"),
    )


def test_a_tasks_stretches_are_episodes_that_succeed(tmp_path: Path) -> None:
    write(tmp_path)
    _, play = converted(tmp_path)
    recording, data = converted(tmp_path, "task")
    rows = [*range(2, 11), *range(30, 51)]
    np.testing.assert_array_equal(data.observation, play.observation[rows])
    np.testing.assert_array_equal(data.action, play.action[rows])
    assert data.lengths.tolist() == [9, 21]
    assert data.returns.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(data.terminated, data.reward == 1)
    assert not data.truncated.any()
    assert recording.segments == (
        Segment(0, 0, 8, "open_drawer", "pull the drawer"),
        Segment(1, 0, 20, "open_drawer", "open the drawer"),
    )
    facts = episodes.statistics(recording._replace(rows=data.recording.rows))
    assert facts["success_rate"] == 1.0


def test_annotations_survive_the_episode_file(tmp_path: Path) -> None:
    write(tmp_path / "in")
    recording, data = converted(tmp_path / "in")
    target = tmp_path / "c.parquet"
    episodes.write(target, recording._replace(rows=data.recording.rows))
    again = episodes.stream(target)
    assert again.segments == recording.segments
    assert again.info == recording.info
    np.testing.assert_array_equal(episodes.collected(again).observation, data.observation)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "task_D_D/"])
def test_the_zip_gives_the_same(tmp_path: Path, method: int, prefix: str) -> None:
    write(tmp_path / "in")
    write(tmp_path / "in", "validation", [(7, 9)])
    path = zipped(tmp_path / "in", tmp_path / "calvin.zip", prefix, method)
    for take in ("play", "task"):
        folder, archive = converted(tmp_path / "in", take), converted(path, take)
        assert folder[0].segments == archive[0].segments
        for name in ("observation", "action", "reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(folder[1], name), getattr(archive[1], name))


def test_the_folder_that_the_zip_unpacks_to_is_found(tmp_path: Path) -> None:
    write(tmp_path / "task_D_D", "validation", [(7, 9)], None)
    config = source(tmp_path).model_copy(update={"split": "validation"})
    recording = calvin.convert("c", config, tmp_path, "")
    assert recording.segments == ()
    assert episodes.collected(recording).lengths.tolist() == [3]


def spoiled(folder: Path, frame: int, **change: Any) -> None:
    file = folder / f"episode_{frame:07d}.npz"
    with np.load(file) as old:
        arrays = {**old, **change}
    np.savez_compressed(file, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_actions": None}, "episode_0000062.npz: rel_actions is missing"),
        ({"scene_obs": np.zeros(25)}, r"episode_0000062.npz: scene_obs is float64\(25,\), not 24"),
        ({"robot_obs": np.array(["x"] * 15)}, "episode_0000062.npz: robot_obs is <U1"),
        ({"robot_obs": np.array([None] * 15)}, "episode_0000062.npz: it holds Python objects"),
        (
            {"rel_actions": np.full(7, 1.5)},
            r"episode_0000062.npz: rel_actions\[0\] is 1.5, outside",
        ),
        (
            {"robot_obs": np.full(15, np.nan)},
            r"observation\[0\] is nan in row 22 \(episode 2, step 1",
        ),
    ],
)
def test_a_spoiled_step_is_named(
    tmp_path: Path, change: dict[str, Any], message: str, archive: bool
) -> None:
    write(tmp_path / "in")
    spoiled(tmp_path / "in" / "training", 62, **change)
    path = tmp_path / "in"
    if archive:
        path = zipped(path, tmp_path / "c.zip", "", zipfile.ZIP_STORED)
    with pytest.raises(UserError, match=message):
        episodes.write(tmp_path / "c.parquet", calvin.convert("c", source(path), path, ""))


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "in")
    folder = tmp_path / "in" / "training"
    step_file = folder / "episode_0000070.npz"
    whole = step_file.read_bytes()
    for size in (0, 10, 500, len(whole) - 1):
        step_file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"training/episode_0000070\.npz: .*zip"):
            converted(tmp_path / "in")
    at = whole.index(b"rel_actions.npy") + 80
    step_file.write_bytes(whole[:at] + b"damage" + whole[at + 6 :])
    with pytest.raises(UserError, match=r"training/episode_0000070\.npz: "):
        converted(tmp_path / "in")
    step_file.unlink()
    with pytest.raises(UserError, match=r"episode_0000070\.npz: no such file; ep_start_end_ids"):
        converted(tmp_path / "in")
    path = zipped(tmp_path / "in", tmp_path / "c.zip", "", zipfile.ZIP_STORED)
    with pytest.raises(UserError, match=r"episode_0000070\.npz: no such file"):
        converted(path)
    good = path.read_bytes()
    for name in (b"training/ep_start_end_ids.npy", b"training/lang_annotations/auto_lang_ann.npy"):
        at = good.index(name) + 200
        path.write_bytes(good[:at] + b"damage" + good[at + 6 :])
        with pytest.raises(UserError, match=rf"{name.decode()}: .*checksum"):
            converted(path)
    path.write_bytes(good[:-30])
    with pytest.raises(UserError, match=r"c\.zip: .*download it again"):
        converted(path)
    with pytest.raises(UserError, match=r"training/ep_start_end_ids\.npy: no such file"):
        converted(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([(40, 59), (50, 60)], "overlap"),
        ([(59, 40)], "overlap or end before"),
        ([40, 59], "not a list of frame pairs"),
        ([(40.0, 59.0)], "not a list of frame pairs"),
        (np.array([None]), "Python objects"),
    ],
)
def test_recordings_that_make_no_sense_are_refused(tmp_path: Path, ids: Any, message: str) -> None:
    write(tmp_path)
    np.save(tmp_path / "training" / "ep_start_end_ids.npy", ids)
    with pytest.raises(UserError, match=rf"ep_start_end_ids\.npy: .*{message}"):
        converted(tmp_path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_malicious_annotations_are_refused_and_run_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "training" / "lang_annotations" / "auto_lang_ann.npy"
    witness = tmp_path / "witness"
    np.save(file, {"language": Evil(witness)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"auto_lang_ann\.npy: it asks to run posix.mkdir"):
        converted(tmp_path)
    assert not witness.exists()


def test_annotations_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "training" / "lang_annotations" / "auto_lang_ann.npy"
    good = file.read_bytes()
    for bad in (b"", good[:50], good[:400], good[:-1]):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"auto_lang_ann\.npy: "):
            converted(tmp_path)
    for told in (
        {"language": {"ann": ["x"], "task": []}, "info": {"indx": [(42, 50)]}},
        {"language": {"ann": ["x"], "task": ["y"]}, "info": {"indx": [(42, 50, 3)]}},
        {"language": {"ann": ["x"], "task": ["y"]}, "info": {"indx": [(2, 5)]}},
        {"language": {"ann": ["x"], "task": ["y"]}},
        [1, 2],
    ):
        np.save(file, np.array(told) if isinstance(told, list) else told)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"auto_lang_ann\.npy: "):
            converted(tmp_path)


def test_a_task_that_nobody_did_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    config = source(tmp_path, "task", "calvin/D-close_drawer")
    with pytest.raises(UserError, match=r"annotated close_drawer.*annotated: open_drawer, turn_on"):
        calvin.convert("c", config, tmp_path, "")


def test_steps_are_read_fast_and_pictures_never(tmp_path: Path) -> None:
    write(tmp_path / "in", recordings=[(0, 19)], annotations=None, side=200)
    folder = tmp_path / "in" / "training"
    count = 3000  # the same 20 files under other names
    for frame in range(20, count):
        os.link(folder / f"episode_{frame % 20:07d}.npz", folder / f"episode_{frame:07d}.npz")
    np.save(folder / "ep_start_end_ids.npy", [(0, count - 1)])
    size = (folder / "episode_0000000.npz").stat().st_size
    assert size > 150_000
    tracemalloc.start()
    begun = time.process_time()
    _, data = converted(tmp_path / "in")
    spent = time.process_time() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.step) == count
    assert peak < 10e6
    assert spent < count / 500  # measured: some 10,000 steps/s, a tenth of it under tracemalloc
    shutil.rmtree(tmp_path / "in")
