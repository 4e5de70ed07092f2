"""The episode file: one Parquet file per data set, checked whenever it is read or written, block by block.

Columns: episode_id int32, step int32, observation and action fixed-size lists of float32, reward
float32, terminated bool, truncated bool. Rows lie in order; the successor of a row is the next
row of its episode, and an episode's last row, which alone carries an end flag, has none. What
the data are stands as JSON in the schema metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from modip import envs
from modip.errors import UserError
from modip.files import write_atomically

METADATA_KEY = b"modip_dataset"
SEGMENTS_KEY = b"modip_segments"
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


class Rows(NamedTuple):
    """N consecutive rows of a recording; the first may go on with an episode of the block before."""

    observation: Float  # (N, Do)
    action: Float  # (N, Da)
    reward: Float  # (N,)
    terminated: Flags  # (N,)
    truncated: Flags  # (N,)


class Segment(NamedTuple):
    """A stretch of an episode that someone described."""

    episode: int  # its episode_id
    first: int  # step
    last: int  # step, inclusive
    task: str
    text: str


class Recording(NamedTuple):
    """What the data are, and their rows in blocks of any length, read as they are asked for."""

    info: DatasetInfo
    rows: Iterable[Rows]
    segments: tuple[Segment, ...] = ()


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
    def recording(self) -> Recording:
        """The same, as something to write."""
        rows = Rows(self.observation, self.action, self.reward, self.terminated, self.truncated)
        return Recording(self.info, [rows])

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


def write(path: Path, recording: Recording, origin: Path | None = None) -> None:
    """Checks and writes one file, whole or not at all, with no more than a few blocks in memory.

    `origin` is the name in messages, for rows that come from a file. Raises UserError at the first
    row with a value that is not finite, and where the last episode has no end.
    """

    def write_file(temporary: Path) -> None:
        writer = None
        try:
            for rows, episode_id, step in _numbered(recording.rows, origin or path):
                columns = {
                    "episode_id": pa.array(episode_id),
                    "step": pa.array(step),
                    "observation": _lists(rows.observation),
                    "action": _lists(rows.action),
                    "reward": pa.array(rows.reward, pa.float32()),
                    "terminated": pa.array(rows.terminated, pa.bool_()),
                    "truncated": pa.array(rows.truncated, pa.bool_()),
                }
                metadata = {METADATA_KEY: json.dumps(asdict(recording.info))}
                if recording.segments:
                    metadata[SEGMENTS_KEY] = json.dumps(recording.segments)
                table = pa.table(columns).replace_schema_metadata(metadata)
                if writer is None:
                    writer = pq.ParquetWriter(
                        temporary,
                        table.schema,
                        compression="zstd",
                        use_dictionary=False,
                        column_encoding=_ENCODING,
                    )
                writer.write_table(table, row_group_size=ROW_GROUP)
        finally:
            if writer is not None:
                writer.close()

    write_atomically(path, write_file)


def read(source: Path) -> Episodes:
    """Reads and checks one file.

    Raises UserError, naming file, field, row, value and remedy, for anything wrong in it.
    """
    return collected(stream(source))


def collected(recording: Recording) -> Episodes:
    """All of a recording in memory. Raises what reading its rows raises."""
    blocks = list(recording.rows)
    rows = Rows(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
    episode_id, step = _Numbering().number(rows.terminated | rows.truncated)
    return Episodes(recording.info, *rows, episode_id, step)


def stream(source: Path, info: DatasetInfo | None = None, path: Path | None = None) -> Recording:
    """One file's rows, checked as they are read. `info` stands in for a file without description;
    `path` is the name in messages, for a copy of a user's file.

    Raises UserError as `read` does: for the file and its schema at once, for a row when it comes.
    """
    path = path or source
    if not source.is_file():
        raise UserError(f"{source}: no such file; run the stages before this one (`dvc repro`)")
    try:
        # Read ahead, pyarrow keeps all of the file in memory to the end.
        file = pq.ParquetFile(source, pre_buffer=False)
    except (pa.ArrowException, OSError) as problem:
        raise _incomplete(path, problem) from problem
    names = file.schema_arrow.names
    missing = [name for name in _TYPES if name not in names]
    if missing:
        raise UserError(
            f"{path}: column {missing[0]} is missing (it has {', '.join(names)}); "
            f"the schema is {', '.join(_TYPES)}"
        )
    for name, fits in _TYPES.items():
        kind = file.schema_arrow.field(name).type
        if not fits(kind):
            raise UserError(f"{path}: column {name} has type {kind}; make it {_WANTED[fits]}")
        if fits is pa.types.is_fixed_size_list and not pa.types.is_floating(kind.value_type):
            raise UserError(
                f"{path}: column {name} holds {kind.value_type}; make it lists of float32"
            )
    if file.metadata.num_rows == 0:
        raise UserError(f"{path}: no rows; a data set needs at least one episode")
    metadata = file.schema_arrow.metadata or {}
    told = _info(path, metadata, info)
    return Recording(told, _blocks(file, path), _segments(path, metadata))


def _blocks(file: pq.ParquetFile, path: Path) -> Iterator[Rows]:
    """The rows of an open file, their order checked."""
    numbering = _Numbering()
    batches = file.iter_batches(ROW_GROUP, columns=list(_TYPES))
    before: tuple[int, int] | None = None  # episode_id and step of the row before
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as problem:
            raise _incomplete(path, problem) from problem
        if batch is None:
            break
        column = {name: _values(path, batch.column(name), name, numbering.rows) for name in _TYPES}
        rows = Rows(*(column[name] for name in Rows._fields))
        given = column["episode_id"], column["step"]
        _check_order(path, rows, given, before, numbering)
        before = int(given[0][-1]), int(given[1][-1])
        yield rows
    _check_ended(path, numbering)


def statistics(recording: Recording) -> dict[str, Any]:
    """What the data are and how good: counts, returns, score and success where known."""
    env_id = recording.info.env_id
    sums: list[float] = []
    lengths: list[int] = []
    successes: list[bool | None] = []
    terminated, low, high, widths = 0, np.inf, -np.inf, (0, 0)
    running, steps = 0.0, 0  # of the episode that goes on in the next block
    for rows in recording.rows:
        ends = np.flatnonzero(rows.terminated | rows.truncated)
        firsts = np.append(0, ends + 1)
        reward = np.append(rows.reward.astype(np.float64), 0.0)
        parts = np.add.reduceat(reward, firsts)
        counts = np.diff(np.append(firsts, len(rows.reward)))
        parts[0] += running
        counts[0] += steps
        running, steps = float(parts[-1]), int(counts[-1])
        sums += parts[:-1].tolist()
        lengths += counts[:-1].tolist()
        successes += [
            envs.success_at_end(env_id, float(rows.reward[end]), bool(rows.terminated[end]))
            for end in ends
        ]
        terminated += int(rows.terminated.sum())
        low, high = min(low, float(rows.action.min())), max(high, float(rows.action.max()))
        widths = rows.observation.shape[1], rows.action.shape[1]
    returns = np.array(sums)
    return {
        **asdict(recording.info),
        "episodes": len(returns),
        "steps": sum(lengths),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "score_mean": envs.score(env_id, float(returns.mean())),
        "success_rate": None if None in successes else float(np.mean([bool(s) for s in successes])),
        "terminated": terminated,
        "length_min": min(lengths),
        "length_max": max(lengths),
        "obs_dim": widths[0],
        "action_dim": widths[1],
        "action_min": low,
        "action_max": high,
    }


class _Numbering:
    """Counts episodes and their steps through consecutive blocks of rows."""

    def __init__(self) -> None:
        self.rows = 0  # in the blocks so far
        self.episode = 0  # of the next row
        self.step = 0  # of the next row

    def number(self, ended: Flags) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`episode_id` and `step` of the next rows, given which of them end their episode (N,)."""
        row = np.arange(len(ended))
        begins = np.append(False, ended[:-1])
        first = np.maximum.accumulate(np.where(begins, row, -self.step))
        episode_id = self.episode + np.cumsum(begins)
        step = row - first
        self.rows += len(ended)
        self.episode = int(episode_id[-1]) + int(ended[-1])
        self.step = 0 if ended[-1] else int(step[-1]) + 1
        return episode_id.astype(np.int32), step.astype(np.int32)


def _numbered(
    blocks: Iterable[Rows], path: Path
) -> Iterator[tuple[Rows, NDArray[np.int32], NDArray[np.int32]]]:
    """Blocks with their `episode_id` and `step`, in blocks long enough for a row group, checked."""
    numbering = _Numbering()
    for rows in gathered(blocks):
        start = numbering.rows
        episode_id, step = numbering.number(rows.terminated | rows.truncated)
        _check_finite(path, rows, start, episode_id, step)
        yield rows, episode_id, step
    if numbering.rows == 0:
        raise UserError(f"{path}: no rows; a data set needs at least one episode")
    _check_ended(path, numbering)


def gathered(blocks: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows in blocks of at least a row group (but the last): small ones cost time and space."""
    held: list[Rows] = []
    count = 0
    for rows in blocks:
        if len(rows.reward):
            held.append(rows)
            count += len(rows.reward)
        if count >= ROW_GROUP:
            yield Rows(*(np.concatenate(parts) for parts in zip(*held, strict=True)))
            held, count = [], 0
    if held:
        yield Rows(*(np.concatenate(parts) for parts in zip(*held, strict=True)))


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

_DTYPES = {"episode_id": np.int64, "step": np.int64, "reward": np.float32}
"""What the numbers of a file are read as; too large an id must not wrap."""


def _lists(rows: Float) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel(), pa.float32()), rows.shape[1])


def _values(path: Path, column: pa.Array, name: str, start: int) -> NDArray[Any]:
    """A column's values; `start` is its first row in the file."""
    if column.null_count:
        row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: column {name}, row {row} is null; remove or repair its episode")
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        matrix: Float = flat.reshape(len(column), column.type.list_size)
        return matrix
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values.astype(_DTYPES.get(name, values.dtype), copy=False)


def _incomplete(path: Path, problem: Exception) -> UserError:
    reason = str(problem).splitlines()[0]
    return UserError(f"{path}: not a complete Parquet file ({reason}); write or copy it again")


def _info(path: Path, metadata: dict[bytes, bytes], other: DatasetInfo | None) -> DatasetInfo:
    """What a file says of itself; where it says nothing, or something else, what `other` says."""
    try:
        told = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        told = None
    names = [field.name for field in fields(DatasetInfo)]
    found = told if isinstance(told, dict) else {}
    texts = {name: found[name] for name in names if isinstance(found.get(name), str)}
    if other is not None:
        return replace(other, **texts)
    if len(texts) < len(names):
        raise UserError(
            f"{path}: its metadata {METADATA_KEY.decode()} must be JSON with the texts {', '.join(names)}; "
            "write it with episodes.write"
        )
    return DatasetInfo(**texts)


def _segments(path: Path, metadata: dict[bytes, bytes]) -> tuple[Segment, ...]:
    try:
        return tuple(Segment(*one) for one in json.loads(metadata.get(SEGMENTS_KEY, "[]")))
    except (ValueError, TypeError) as problem:
        raise UserError(
            f"{path}: its metadata {SEGMENTS_KEY.decode()} must be JSON, a list of "
            f"[{', '.join(Segment._fields)}]; correct or remove it"
        ) from problem


def _check_finite(
    path: Path, rows: Rows, start: int, episode_id: NDArray[Any], step: NDArray[Any]
) -> None:
    for name in ("observation", "action", "reward"):
        values: Float = getattr(rows, name)
        if np.isfinite(values).all():
            continue
        bad = np.argwhere(~np.isfinite(values))[0]
        row, *component = bad.tolist()
        where = f"{name}[{component[0]}]" if component else name
        raise UserError(
            f"{path}: {where} is {values[tuple(bad)]} in row {start + row} (episode "
            f"{episode_id[row]}, step {step[row]}); remove or repair that episode"
        )


def _check_ended(path: Path, numbering: _Numbering) -> None:
    if numbering.step:
        raise UserError(
            f"{path}: row {numbering.rows - 1}, the last of episode {numbering.episode}, has neither "
            "terminated nor truncated; mark it"
        )


def _check_order(
    path: Path,
    rows: Rows,
    given: tuple[NDArray[Any], NDArray[Any]],
    before: tuple[int, int] | None,
    numbering: _Numbering,
) -> None:
    """Values are finite, and `episode_id` and `step` as they should be after the row `before`."""
    start = numbering.rows
    _check_finite(path, rows, start, *given)
    wanted_id, wanted_step = numbering.number(rows.terminated | rows.truncated)
    wrong = np.flatnonzero((given[0] != wanted_id) | (given[1] != wanted_step))
    if not len(wrong):
        return
    row = int(wrong[0])
    episode, step = int(given[0][row]), int(given[1][row])
    if row:
        before = int(given[0][row - 1]), int(given[1][row - 1])
    begins = wanted_step[row] == 0
    if before and episode == before[0] and begins:
        remedy = "the row before ended this episode; rows after the end must go"
    elif before and step == 0 and not begins:
        remedy = f"the row before ends episode {before[0]} but has neither terminated nor truncated; mark it"
    else:
        remedy = (
            f"expected episode_id {wanted_id[row]}, step {wanted_step[row]}; sort the rows by "
            "episode and step, both counted from 0 without gaps"
        )
    raise UserError(f"{path}: row {start + row} has episode_id {episode}, step {step}: {remedy}")
