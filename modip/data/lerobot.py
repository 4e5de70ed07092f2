"""LeRobot data sets: layouts v2.0, v2.1 (one Parquet file per episode) and v3.0 (many episodes per file).

Read are meta/info.json, which lists the features and counts, and the columns that are needed of data/chunk-*/*.parquet,
one row group at a time; videos and task descriptions are not. An episode's last frame ends it: terminated where
next.success says that it succeeded, else truncated, because next.done marks the last frame of every recording,
whatever became of it.

Reward: `recorded` takes next.reward. Most real-robot sets have none; `last_frame` then gives what people mean by a
demonstration, 1 on the last frame of every success and 0 elsewhere: every episode counts as one, or, where there is
next.success, those it marks. With it a success is terminated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from modip.data.episodes import ROW_GROUP, DatasetInfo, Float, Recording, Rows
from modip.data.sources import LeRobotSource
from modip.data.units import normalised
from modip.errors import UserError

VERSIONS = ("v2.0", "v2.1", "v3.0")
_REWARD, _SUCCESS = "next.reward", "next.success"


class _Layout(NamedTuple):
    """What info.json says."""

    version: str
    robot: str
    episodes: int
    frames: int
    widths: dict[str, int]  # of every feature that is a vector of numbers or a flag
    success: bool  # whether there is next.success


def convert(dataset: str, config: LeRobotSource, root: Path, sha256: str) -> Recording:
    """The features named in params.yaml, concatenated, as observation; the feature `action`."""
    layout = _layout(dataset, config, root)
    files = sorted((root / "data").glob("chunk-*/*.parquet"), key=_numbers)
    if not files:
        raise UserError(f"{config.path}: data/chunk-*/*.parquet: no such files; download them too")
    info = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version="not stated",
        source=config.path,
        licence="not stated; see the data set's card",
        sha256=sha256,
        description=f"LeRobot {layout.version}, robot {layout.robot}: {', '.join(config.observation)}; "
        f"reward {config.reward}.",
    )
    rows = _rows(files, layout, config, root)
    return Recording(info, normalised(rows, config.env, config.path, f"data.{dataset}.env"))


def _rows(files: list[Path], layout: _Layout, config: LeRobotSource, root: Path) -> Iterator[Rows]:
    """Rows with their end flags. The last row of a batch is held back: only the next row tells whether it is an end."""
    needed = dict.fromkeys((*config.observation, "action", "episode_index", "frame_index"))
    if config.reward == "recorded":
        needed[_REWARD] = None
    if layout.success:
        needed[_SUCCESS] = None
    held: dict[str, NDArray[Any]] | None = None
    episodes = frames = 0
    for batch in _batches(files, list(needed), layout, config, root):
        columns = batch if held is None else {n: np.concatenate((held[n], batch[n])) for n in batch}
        begins = columns["frame_index"] == 0
        new = np.arange(len(begins)) >= (held is not None)  # rows not counted before
        expected = episodes - 1 + np.cumsum(begins & new)
        frame = columns["frame_index"]
        wrong = columns["episode_index"] != expected
        wrong[1:] |= ~begins[1:] & (frame[1:] != frame[:-1] + 1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{config.path}: row {frames - (held is not None) + row} is frame {frame[row]} of episode "
                f"{columns['episode_index'][row]}, out of order; a file of data/ is missing or damaged"
            )
        episodes, frames = int(expected[-1]) + 1, frames + int(new.sum())
        if len(begins) > 1:
            yield _marked({n: v[:-1] for n, v in columns.items()}, begins[1:], layout, config)
        held = {name: values[-1:] for name, values in columns.items()}
    if (episodes, frames) != (layout.episodes, layout.frames):
        raise UserError(
            f"{config.path}: {episodes} episodes and {frames} frames in data/, but meta/info.json says "
            f"{layout.episodes} and {layout.frames}; download the missing files"
        )
    if held is not None:
        yield _marked(held, np.array([True]), layout, config)


def _marked(
    columns: dict[str, NDArray[Any]],
    ends: NDArray[np.bool_],
    layout: _Layout,
    config: LeRobotSource,
) -> Rows:
    """The rows, `ends` (N,) telling which are the last of their episode."""
    if layout.success:
        success = ends & (columns[_SUCCESS][:, 0] > 0.5)
    else:
        success = ends & (config.reward == "last_frame")
    if config.reward == "recorded":
        reward: Float = columns[_REWARD][:, 0]
    else:
        reward = success.astype(np.float32)
    return Rows(
        observation=np.concatenate([columns[name] for name in config.observation], axis=1),
        action=columns["action"],
        reward=reward,
        terminated=success,
        truncated=ends & ~success,
    )


def _batches(
    files: list[Path], names: list[str], layout: _Layout, config: LeRobotSource, root: Path
) -> Iterator[dict[str, NDArray[Any]]]:
    """Columns: counters (N,) int64, features (N, width) float32."""
    for path in files:
        where = f"{config.path}: {path.relative_to(root)}"
        try:
            with pq.ParquetFile(path) as file:
                missing = [name for name in names if name not in file.schema_arrow.names]
                if missing:
                    raise UserError(f"{where}: column {missing[0]} is missing; download it again")
                for batch in file.iter_batches(ROW_GROUP, columns=names):
                    if batch.num_rows:
                        yield {
                            name: _values(batch.column(name), layout.widths.get(name), name, where)
                            for name in names
                        }
        except (pa.ArrowException, OSError) as problem:
            reason = str(problem).splitlines()[0]
            raise UserError(
                f"{where}: not a complete Parquet file ({reason}); download it again"
            ) from problem


def _values(column: pa.Array, width: int | None, name: str, where: str) -> NDArray[Any]:
    """A column of lists, or of numbers for width 1; without a width, a counter (N,)."""
    count, kind = len(column), column.type
    if column.null_count:
        raise UserError(f"{where}: column {name} has empty rows; remove their episodes")
    if width is None:
        counter: NDArray[Any] = column.to_numpy(zero_copy_only=False).astype(np.int64)
        return counter
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        fixed = pa.types.is_fixed_size_list(kind)
        lengths = np.array([kind.list_size]) if fixed else np.diff(column.offsets.to_numpy())
        if (lengths != width).any():
            raise UserError(
                f"{where}: column {name} has a row of {lengths[lengths != width][0]} numbers, but "
                f"meta/info.json says {width}"
            )
        column = column.flatten()
    if not (
        pa.types.is_floating(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_boolean(column.type)
    ):
        raise UserError(f"{where}: column {name} holds {kind}, not lists of numbers")
    flat = column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if len(flat) != count * width:
        raise UserError(
            f"{where}: column {name} has one number a row, but meta/info.json says {width}"
        )
    values: Float = flat.reshape(count, width)
    return values


def _layout(dataset: str, config: LeRobotSource, root: Path) -> _Layout:
    name = f"{config.path}: meta/info.json"
    try:
        told = json.loads((root / "meta" / "info.json").read_text())
        version, features = str(told["codebase_version"]), dict(told["features"])
        widths = {
            feature: int(np.prod(about["shape"]))
            for feature, about in features.items()
            if about["dtype"] not in ("video", "image", "string")
            and feature not in ("episode_index", "frame_index")
        }
        episodes, frames = int(told["total_episodes"]), int(told["total_frames"])
        robot = str(told.get("robot_type"))
    except FileNotFoundError as problem:
        raise UserError(
            f"{name}: no such file; path must be the folder of a LeRobot data set"
        ) from problem
    except KeyError as problem:
        raise UserError(f"{name}: {problem.args[0]} is missing; download it again") from problem
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(f"{name}: {problem}; download it again") from problem
    if version not in VERSIONS:
        raise UserError(
            f"{name}: codebase_version {version} is not one of {', '.join(VERSIONS)}; convert it with LeRobot's own scripts"
        )
    for feature in (*config.observation, "action"):
        if feature not in widths:
            field = "" if feature == "action" else f" (data.{dataset}.observation in params.yaml)"
            raise UserError(
                f"{name}: there is no feature {feature} of numbers{field}; there are {', '.join(widths)}"
            )
    if config.reward == "recorded" and _REWARD not in widths:
        raise UserError(
            f"{name}: there is no feature {_REWARD}; with data.{dataset}.reward: last_frame in params.yaml, the last "
            "frame of every demonstration counts as its success, with reward 1"
        )
    return _Layout(version, robot, episodes, frames, widths, _SUCCESS in widths)


def _numbers(path: Path) -> list[int]:
    """Chunk and file number: file-1000 comes after file-999."""
    return [int(digits) for digits in re.findall(r"\d+", f"{path.parent.name}/{path.name}")]
