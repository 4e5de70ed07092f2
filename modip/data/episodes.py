"""The episode file: one Parquet file per data set, checked whenever it is read or written.

Columns: episode_id int32, step int32, observation and action fixed-size lists of float32, reward
float32, terminated bool, truncated bool. Rows lie in order; the successor of a row is the next
row of its episode, and an episode's last row, which alone carries an end flag, has none. What
the data are stands as JSON in the schema metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from modip import envs
from modip.errors import UserError
from modip.files import write_atomically

METADATA_KEY = b"modip_dataset"
ROW_GROUP = 64 * 1024
# Floats byte plane by byte plane, counters as differences: a third smaller than plain zstd.
_ENCODING = {
    "observation.list.element": "BYTE_STREAM_SPLIT",
    "action.list.element": "BYTE_STREAM_SPLIT",
    "reward": "BYTE_STREAM_SPLIT",
    "episode_id": "DELTA_BINARY_PACKED",
    "step": "DELTA_BINARY_PACKED",
}
Float = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class DatasetInfo:
    """What the data are; `sha256` is that of the source file they were made from."""

    dataset: str
    env_id: str
    env_version: str
    source: str
    licence: str
    sha256: str
    description: str


@dataclass(frozen=True)
class Episodes:
    """N rows of whole episodes, in order."""

    info: DatasetInfo
    observation: Float  # (N, Do)
    action: Float  # (N, Da)
    reward: Float  # (N,)
    terminated: Flags  # (N,)
    truncated: Flags  # (N,)
    episode_id: NDArray[np.int32]  # (N,) 0, 1, 2, ...
    step: NDArray[np.int32]  # (N,) 0, 1, 2, ... within its episode

    @property
    def starts(self) -> NDArray[np.int64]:
        """First row of every episode, then N: (num_episodes + 1,)."""
        return np.append(np.flatnonzero(self.step == 0), len(self.step)).astype(np.int64)

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return int(self.episode_id[-1]) + 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Rows of every episode (num_episodes,)."""
        return np.diff(self.starts)

    @property
    def returns(self) -> NDArray[np.float64]:
        """Summed reward of every episode (num_episodes,)."""
        return np.add.reduceat(self.reward.astype(np.float64), self.starts[:-1])


def write(path: Path, episodes: Episodes) -> None:
    """Checks and writes one file, whole or not at all."""
    _check(path, episodes)
    columns = {
        "episode_id": pa.array(episodes.episode_id, pa.int32()),
        "step": pa.array(episodes.step, pa.int32()),
        "observation": _lists(episodes.observation),
        "action": _lists(episodes.action),
        "reward": pa.array(episodes.reward, pa.float32()),
        "terminated": pa.array(episodes.terminated, pa.bool_()),
        "truncated": pa.array(episodes.truncated, pa.bool_()),
    }
    metadata = {METADATA_KEY: json.dumps(asdict(episodes.info))}
    table = pa.table(columns).replace_schema_metadata(metadata)
    write_atomically(
        path,
        lambda temporary: pq.write_table(
            table,
            temporary,
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            column_encoding=_ENCODING,
            row_group_size=ROW_GROUP,
        ),
    )


def read(source: Path, info: DatasetInfo | None = None, path: Path | None = None) -> Episodes:
    """Reads and checks one file. `info` stands in for a file without description; `path` is the
    name in messages, for a copy of a user's file.

    Raises UserError, naming file, field, row, value and remedy, for anything wrong in it.
    """
    path = path or source
    if not source.is_file():
        raise UserError(f"{source}: no such file; run the stages before this one (`dvc repro`)")
    try:
        table = pq.read_table(source)
    except (pa.ArrowException, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(
            f"{path}: not a complete Parquet file ({reason}); write or copy it again"
        ) from problem
    missing = [name for name in _TYPES if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path}: column {missing[0]} is missing (it has {', '.join(table.column_names)}); "
            f"the schema is {', '.join(_TYPES)}"
        )
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows; a data set needs at least one episode")
    episodes = Episodes(
        info=_info(path, table.schema.metadata) or info or _no_info(path),
        observation=_matrix(path, table, "observation"),
        action=_matrix(path, table, "action"),
        reward=_vector(path, table, "reward").astype(np.float32, copy=False),
        terminated=_vector(path, table, "terminated"),
        truncated=_vector(path, table, "truncated"),
        episode_id=_vector(path, table, "episode_id").astype(np.int32, copy=False),
        step=_vector(path, table, "step").astype(np.int32, copy=False),
    )
    _check(path, episodes)
    return episodes


def statistics(episodes: Episodes) -> dict[str, Any]:
    """What the data are and how good: counts, returns, score and success where known."""
    env_id = episodes.info.env_id
    returns, ends = episodes.returns, episodes.starts[1:] - 1
    successes = [
        envs.success_at_end(env_id, float(episodes.reward[end]), bool(episodes.terminated[end]))
        for end in ends
    ]
    return {
        **asdict(episodes.info),
        "episodes": episodes.num_episodes,
        "steps": len(episodes.step),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "score_mean": envs.score(env_id, float(returns.mean())),
        "success_rate": None if None in successes else float(np.mean([bool(s) for s in successes])),
        "terminated": int(episodes.terminated[ends].sum()),
        "length_min": int(episodes.lengths.min()),
        "length_max": int(episodes.lengths.max()),
        "obs_dim": episodes.observation.shape[1],
        "action_dim": episodes.action.shape[1],
        "action_min": float(episodes.action.min()),
        "action_max": float(episodes.action.max()),
    }


_TYPES: dict[str, Callable[[pa.DataType], bool]] = {
    "episode_id": pa.types.is_integer,
    "step": pa.types.is_integer,
    "observation": pa.types.is_fixed_size_list,
    "action": pa.types.is_fixed_size_list,
    "reward": pa.types.is_floating,
    "terminated": pa.types.is_boolean,
    "truncated": pa.types.is_boolean,
}

_WANTED = {
    pa.types.is_integer: "int32",
    pa.types.is_fixed_size_list: "a fixed-size list, pyarrow.list_(pyarrow.float32(), length)",
    pa.types.is_floating: "float32",
    pa.types.is_boolean: "bool",
}


def _lists(rows: Float) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel(), pa.float32()), rows.shape[1])


def _column(path: Path, table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    if not _TYPES[name](column.type):
        raise UserError(
            f"{path}: column {name} has type {column.type}; make it {_WANTED[_TYPES[name]]}"
        )
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"{path}: column {name}, row {row} is null; remove or repair its episode")
    return column.combine_chunks()


def _vector(path: Path, table: pa.Table, name: str) -> NDArray[Any]:
    array: NDArray[Any] = _column(path, table, name).to_numpy(zero_copy_only=False)
    return array


def _matrix(path: Path, table: pa.Table, name: str) -> Float:
    column = _column(path, table, name)
    values = column.flatten()
    if not pa.types.is_floating(values.type):
        raise UserError(f"{path}: column {name} holds {values.type}; make it lists of float32")
    flat = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    rows: Float = flat.reshape(len(column), column.type.list_size)
    return rows


def _info(path: Path, metadata: dict[bytes, bytes] | None) -> DatasetInfo | None:
    if not metadata or METADATA_KEY not in metadata:
        return None
    names = {field.name for field in fields(DatasetInfo)}
    try:
        told = json.loads(metadata[METADATA_KEY])
    except ValueError:
        told = None
    if not isinstance(told, dict) or set(told) != names or not _all_text(told):
        raise UserError(
            f"{path}: its metadata {METADATA_KEY.decode()} must be JSON with exactly the texts "
            f"{', '.join(sorted(names))}; correct or remove it"
        )
    return DatasetInfo(**told)


def _all_text(told: dict[str, Any]) -> bool:
    return all(isinstance(value, str) for value in told.values())


def _no_info(path: Path) -> NoReturn:
    raise UserError(f"{path}: no metadata {METADATA_KEY.decode()}; write it with episodes.write")


def _check(path: Path, episodes: Episodes) -> None:
    """Everything a reader relies on. Raises UserError at the first row that breaks it."""
    count = len(episodes.step)
    if count == 0:
        raise UserError(f"{path}: no rows; a data set needs at least one episode")
    for name in ("observation", "action", "reward"):
        values: Float = getattr(episodes, name)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, *component = bad[0].tolist()
            where = f"{name}[{component[0]}]" if component else name
            raise UserError(
                f"{path}: {where} is {values[tuple(bad[0])]} in row {row} (episode "
                f"{episodes.episode_id[row]}, step {episodes.step[row]}); remove or repair "
                "that episode"
            )
    ended = episodes.terminated | episodes.truncated
    begins = np.append(True, ended[:-1])  # the row after an end begins the next episode
    wanted_id = np.cumsum(begins) - 1
    first = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    wanted_step = np.arange(count) - first
    wrong = np.flatnonzero((episodes.episode_id != wanted_id) | (episodes.step != wanted_step))
    if len(wrong):
        row = int(wrong[0])
        found = f"episode_id {episodes.episode_id[row]}, step {episodes.step[row]}"
        if row and episodes.episode_id[row] == episodes.episode_id[row - 1] and begins[row]:
            remedy = "the row before ended this episode; rows after the end must go"
        elif row and episodes.step[row] == 0 and not begins[row]:
            remedy = (
                f"the row before ends episode {episodes.episode_id[row - 1]} but has neither "
                "terminated nor truncated; mark it"
            )
        else:
            remedy = (
                f"expected episode_id {wanted_id[row]}, step {wanted_step[row]}; sort the rows by "
                "episode and step, both counted from 0 without gaps"
            )
        raise UserError(f"{path}: row {row} has {found}: {remedy}")
    if not ended[-1]:
        raise UserError(
            f"{path}: row {count - 1}, the last of episode {episodes.episode_id[-1]}, has neither "
            "terminated nor truncated; mark it"
        )
