"""PushT's official zip: written from the embedded recording in the authors' layout, converted, compared with it."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import Blosc

from modip.data import episodes, pusht
from modip.data.episodes import Episodes
from modip.data.sources import PushTSource
from modip.errors import UserError

HUMAN = Path(__file__).parents[2] / "data" / "samples" / "pusht_human_state.parquet"
GROUP = "pusht/pusht_cchi_v7_replay.zarr/"


def zarr_files(
    name: str, values: np.ndarray[Any, Any], rows: int, compressor: Any
) -> dict[str, bytes]:
    """An array as Zarr 2 writes it: chunks of `rows`, the last filled up with zeros."""
    told = {
        "chunks": [rows, *values.shape[1:]],
        "compressor": None if compressor is None else compressor.get_config(),
        "dtype": values.dtype.str,
        "fill_value": 0.0,
        "filters": None,
        "order": "C",
        "shape": list(values.shape),
        "zarr_format": 2,
    }
    files = {f"{name}/.zarray": json.dumps(told, indent=4).encode()}
    for chunk, first in enumerate(range(0, len(values), rows)):
        part = np.zeros((rows, *values.shape[1:]), values.dtype)
        part[: len(values[first : first + rows])] = values[first : first + rows]
        key = ".".join([str(chunk), *["0"] * (values.ndim - 1)])
        files[f"{name}/{key}"] = part.tobytes() if compressor is None else compressor.encode(part)
    return files


def official(
    path: Path, raw: Episodes, compressor: Any, dtype: str = "<f4", **replaced: bytes | None
) -> PushTSource:
    """The zip: state, action, n_contacts and a picture that nobody could read, and where the episodes end."""
    files = {".zgroup": b'{"zarr_format": 2}', "data/.zgroup": b'{"zarr_format": 2}'}
    files |= zarr_files("data/state", raw.observation.astype(dtype), 161, compressor)
    files |= zarr_files("data/action", raw.action.astype(dtype), 161, compressor)
    files |= zarr_files("data/n_contacts", np.zeros((len(raw.step), 1), dtype), 161, compressor)
    files |= {"data/img/.zarray": b"{}", "data/img/0.0.0.0": b"no picture"}
    ends = np.cumsum(raw.lengths).astype(np.int64)
    files |= zarr_files("meta/episode_ends", ends, len(ends) + 2, compressor)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **replaced}.items():
            if content is not None:
                archive.writestr(GROUP + name, content)
    return PushTSource(source="pusht", env="gym_pusht/PushT-v0", path=str(path))


def head(count: int) -> Episodes:
    """The first episodes of the embedded recording."""
    raw = episodes.read(HUMAN)
    rows = slice(0, int(raw.starts[count]))
    names = ("observation", "action", "reward", "terminated", "truncated", "episode_id", "step")
    return Episodes(raw.info, *(getattr(raw, name)[rows] for name in names))


# What the authors' arrays are compressed with.
ZSTD = Blosc(cname="zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)


def test_the_official_zip_is_the_embedded_recording(tmp_path: Path) -> None:
    path = tmp_path / "pusht.zip"
    config = official(path, episodes.read(HUMAN), ZSTD)
    found = episodes.collected(pusht.convert("p", config, path, "5ha"))
    told = config.model_copy(update={"path": str(HUMAN)})
    wanted = episodes.collected(pusht.convert("p", told, HUMAN, "5ha"))
    for name in ("observation", "action", "terminated", "truncated", "episode_id", "step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.reward, wanted.reward, atol=1e-6)
    assert found.num_episodes == 206
    assert not found.terminated.any()
    assert (found.info.dataset, found.info.sha256) == ("p", "5ha")
    assert "MIT" in found.info.licence


@pytest.mark.parametrize(
    "compressor",
    [None, Blosc("lz4", 5, Blosc.SHUFFLE), Blosc("zstd", 1, Blosc.NOSHUFFLE), Blosc("blosclz")],
)
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4"])
def test_other_ways_to_store_the_numbers(tmp_path: Path, compressor: Any, dtype: str) -> None:
    raw, path = head(3), tmp_path / "pusht.zip"
    config = official(path, raw, compressor, dtype)
    found = episodes.collected(pusht.convert("p", config, path, ""))
    np.testing.assert_allclose(found.reward, raw.reward, atol=1e-6)


def test_an_episode_of_one_step_and_a_pose_of_success(tmp_path: Path) -> None:
    """Rewards in numbers: the goal's own pose covers all, one turned half round little; clipped at 1."""
    raw, path = head(1), tmp_path / "pusht.zip"
    state = np.tile(np.array([100, 100, 256, 256, np.pi / 4], np.float32), (4, 1))
    state[1, 4] += np.pi
    rows = np.arange(4)
    data = Episodes(
        raw.info, state, state[:, :2], np.zeros(4, np.float32), rows < 0, (rows == 0) | (rows == 3),
        (rows > 0).astype(np.int32), np.array([0, 0, 1, 2], np.int32),
    )  # fmt: skip
    found = episodes.collected(pusht.convert("p", official(path, data, ZSTD), path, ""))
    np.testing.assert_allclose(found.reward, [1, 1, 1, 1])  # row 1, turned, leads to the goal
    state[2, 4] += np.pi
    found = episodes.collected(pusht.convert("p", official(path, data, ZSTD), path, ""))
    assert found.reward[0] == 1.0
    assert found.reward[1] < 0.5
    assert found.reward[2] == found.reward[3] == 1.0
    assert found.truncated.tolist() == [True, False, False, True]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_a_codec_that_unpickles_is_refused(tmp_path: Path) -> None:
    """numcodecs would choose by the file's word, and one of its codecs runs pickles."""
    raw, path, witness = head(1), tmp_path / "pusht.zip", tmp_path / "witness"
    told = json.loads(zarr_files("x", raw.observation, 161, None)["x/.zarray"])
    told["compressor"] = {"id": "pickle", "protocol": 4}
    change = {
        "data/state/.zarray": json.dumps(told).encode(),
        "data/state/0.0": pickle.dumps(Evil(witness)),
    }
    config = official(path, raw, None, **change)
    with pytest.raises(UserError, match=r"data/state is stored in a form that is not known"):
        pusht.convert("p", config, path, "")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data/state/.zarray": None}, "0 arrays data/state"),
        ({"data/action/.zarray": None}, "data/action/.zarray"),
        ({"data/action/0.0": None}, "data/action/0.0"),
        ({"data/action/0.0": b"damage"}, "data/action/0.0 is damaged"),
        ({"data/action/0.0": b""}, "data/action/0.0 is damaged"),
        ({"data/state/.zarray": b"{"}, "not the official PushT recording"),
        ({"data/state/.zarray": b"{}"}, "shape"),
    ],
)
def test_what_is_wrong_with_a_zip_is_told(
    tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    path = tmp_path / "pusht.zip"
    config = official(path, head(1), ZSTD, **change)
    with pytest.raises(UserError, match=message):
        pusht.convert("p", config, path, "")


def test_arrays_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    path, raw = tmp_path / "pusht.zip", head(2)
    for ends in ([100, 90, len(raw.step)], [100, len(raw.step) + 1], [50], []):
        change = zarr_files("meta/episode_ends", np.array(ends, np.int64), 9, ZSTD)
        with pytest.raises(UserError, match=r"they must agree|damaged|no.*official"):
            pusht.convert("p", official(path, raw, ZSTD, **change), path, "")
    config = official(path, raw, ZSTD)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        UserError, match=r"pusht\.zip: not the official PushT recording .*not a zip file.*download"
    ):
        pusht.convert("p", config, path, "")


def test_a_nan_is_found_when_it_is_written(tmp_path: Path) -> None:
    raw, path = head(2), tmp_path / "pusht.zip"
    raw.action[7, 1] = np.nan
    config = official(path, raw, ZSTD)
    with pytest.raises(UserError, match=r"action\[\d\] is nan in row 7"):
        episodes.write(tmp_path / "p.parquet", pusht.convert("p", config, path, ""))
