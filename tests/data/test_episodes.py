"""The episode file: round trip, every refusal, statistics."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modip.data import episodes
from modip.data.episodes import DatasetInfo, Episodes, Recording, Rows
from modip.errors import UserError
from modip.files import write_atomically
from tests.helpers import table

INFO = DatasetInfo("toy", "modip/Toy-v0", "gymnasium 1.4.0", "a test", "none", "ab12", "made up")


def make(lengths: list[int], seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    last = np.zeros(count, np.bool_)
    last[np.cumsum(lengths) - 1] = True
    terminated = last & (rng.uniform(size=count) < 0.5)
    return Episodes(
        info=INFO,
        observation=rng.normal(size=(count, 4)).astype(np.float32),
        action=rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        reward=rng.normal(size=count).astype(np.float32),
        terminated=terminated,
        truncated=last & ~terminated,
        episode_id=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        step=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
    )


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_what_is_written_is_read(
    lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = make(lengths, seed)
    path = tmp_path_factory.mktemp("round") / "new" / "d.parquet"
    episodes.write(path, data.recording)
    again = episodes.read(path)
    assert again.info == data.info
    for name in (
        "observation",
        "action",
        "reward",
        "terminated",
        "truncated",
        "episode_id",
        "step",
    ):
        before, after = getattr(data, name), getattr(again, name)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)
    assert again.num_episodes == len(lengths)
    assert again.lengths.tolist() == lengths
    bounds = np.cumsum([0, *lengths])
    sums = [data.reward[a:b].sum(dtype=np.float64) for a, b in itertools.pairwise(bounds)]
    np.testing.assert_allclose(again.returns, sums)
    assert [p.name for p in path.parent.iterdir()] == ["d.parquet"]  # no temporary file stays


def test_a_file_written_by_pyarrow_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "user.parquet"
    pq.write_table(table(make([3, 4])), path)
    assert episodes.read(path).num_episodes == 2


@pytest.mark.parametrize(
    "told", ["", "{", "[1]", '{"name": "x", "licence": 3}', '{"licence": "MIT", "goal": [0]}']
)
def test_a_users_file_says_what_it_says(told: str, tmp_path: Path) -> None:
    """Descriptions of another kind are no error where params.yaml describes the file."""
    path = tmp_path / "user.parquet"
    metadata = {"modip_dataset": told} if told else None
    pq.write_table(table(make([3])).replace_schema_metadata(metadata), path)
    found = episodes.stream(path, INFO).info
    assert found == (replace(INFO, licence="MIT") if "MIT" in told else INFO)


def test_the_schema_is_as_documented(tmp_path: Path) -> None:
    episodes.write(tmp_path / "d.parquet", make([3]).recording)
    schema = pq.read_schema(tmp_path / "d.parquet")
    assert schema.field("observation").type == pa.list_(pa.float32(), 4)
    assert schema.field("action").type == pa.list_(pa.float32(), 2)
    kinds = {n: str(schema.field(n).type) for n in schema.names if not n.endswith("ion")}
    assert kinds == {
        "episode_id": "int32",
        "step": "int32",
        "reward": "float",
        "terminated": "bool",
        "truncated": "bool",
    }
    assert json.loads(schema.metadata[b"modip_dataset"]) == asdict(INFO)
    assert (
        pq.ParquetFile(tmp_path / "d.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    )


def with_value(name: str, row: int, value: Any) -> Callable[[Episodes], Episodes]:
    def change(data: Episodes) -> Episodes:
        column = getattr(data, name).copy()
        column[row] = value
        return replace(data, **{name: column})

    return change


def mark(row: int) -> Callable[[Episodes], Episodes]:
    return with_value("truncated", row, True)


def unmark(row: int) -> Callable[[Episodes], Episodes]:
    def change(data: Episodes) -> Episodes:
        return with_value("terminated", row, False)(with_value("truncated", row, False)(data))

    return change


BROKEN = [  # episodes of 3 and 4 rows; what is done to them; what the message must name
    (
        with_value("observation", (4, 2), np.nan),
        ["observation[2] is nan", "row 4", "episode 1, step 1"],
    ),
    (with_value("action", (6, 0), np.inf), ["action[0] is inf", "row 6"]),
    (with_value("reward", 0, np.nan), ["reward is nan", "row 0"]),
    (unmark(6), ["row 6", "the last of episode 1", "neither"]),
]
DISORDERED = [
    (with_value("episode_id", slice(0, 3), 7), ["row 0 has episode_id 7", "expected episode_id 0"]),
    (with_value("step", 5, 9), ["row 5", "step 9", "expected episode_id 1, step 2"]),
    (
        lambda d: replace(d, **{n: getattr(d, n)[::-1] for n in ("episode_id", "step")}),
        ["row 0 ", "sort"],
    ),
    (mark(1), ["row 2", "rows after the end must go"]),
    (unmark(2), ["row 3", "neither terminated nor truncated"]),
]


@pytest.mark.parametrize(("change", "named"), [*BROKEN, *DISORDERED])
@pytest.mark.parametrize("block", [episodes.ROW_GROUP, 3, 1])
def test_broken_rows_are_named(
    change: Callable[[Episodes], Episodes],
    named: list[str],
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the rows fall into blocks."""
    monkeypatch.setattr(episodes, "ROW_GROUP", block)
    path = tmp_path / "bad.parquet"
    pq.write_table(table(change(make([3, 4]))), path)
    with pytest.raises(UserError) as refusal:
        episodes.read(path)
    for words in [str(path), *named]:
        assert words in str(refusal.value)


@pytest.mark.parametrize(("change", "named"), BROKEN)
def test_broken_rows_are_not_written(
    change: Callable[[Episodes], Episodes], named: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.parquet"
    with pytest.raises(UserError) as refusal:
        episodes.write(path, change(make([3, 4])).recording, Path("raw.hdf5"))
    for words in ["raw.hdf5", *named]:
        assert words in str(refusal.value)
    assert not list(tmp_path.iterdir())


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), block=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_blocks_make_no_difference(
    lengths: list[int], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows in blocks of any length, empty ones among them: the same file, the same statistics."""
    data = make(lengths)
    whole = next(iter(data.recording.rows))
    parts = [Rows(*(c[i : i + block] for c in whole)) for i in range(0, len(whole.reward), block)]
    cut = Recording(
        INFO, [parts[0]._replace(**{n: c[:0] for n, c in parts[0]._asdict().items()}), *parts]
    )
    folder = tmp_path_factory.mktemp("blocks")
    for name, told in (("whole", data.recording), ("cut", cut)):
        episodes.write(folder / name, told)
    assert (folder / "whole").read_bytes() == (folder / "cut").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes, "ROW_GROUP", block)
        episodes.write(folder / "small", cut)
        again = episodes.read(folder / "small")
        found = episodes.statistics(episodes.stream(folder / "small"))
    np.testing.assert_array_equal(again.step, data.step)
    np.testing.assert_array_equal(again.episode_id, data.episode_id)
    assert found == pytest.approx(episodes.statistics(data.recording))
    assert found["return_mean"] == pytest.approx(data.returns.mean())
    assert (found["length_min"], found["length_max"]) == (min(lengths), max(lengths))


def test_a_recording_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        episodes.write(tmp_path / "d.parquet", Recording(INFO, []))


def cast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(t: pa.Table) -> pa.Table:
        return t.set_column(t.column_names.index(name), name, t.column(name).cast(kind))

    return change


def with_null(t: pa.Table) -> pa.Table:
    column = pa.array([None, *t.column("reward").to_pylist()[1:]], pa.float32())
    return t.set_column(t.column_names.index("reward"), "reward", column)


BAD_TABLES = [
    (lambda t: t.drop_columns(["reward"]), ["column reward is missing", "episode_id"]),
    (lambda t: t.slice(0, 0), ["no rows"]),
    (
        cast("observation", pa.list_(pa.float32())),
        ["column observation has type list", "fixed-size"],
    ),
    (cast("observation", pa.list_(pa.int32(), 4)), ["observation holds int32"]),
    (cast("step", pa.float32()), ["column step has type float", "int32"]),
    (cast("terminated", pa.int32()), ["column terminated has type int32", "bool"]),
    (with_null, ["column reward, row 0 is null"]),
    (lambda t: t.replace_schema_metadata(None), ["modip_dataset must be JSON", "episodes.write"]),
    (lambda t: t.replace_schema_metadata({"modip_dataset": "{"}), ["modip_dataset must be JSON"]),
    (
        lambda t: t.replace_schema_metadata({"modip_dataset": json.dumps({"dataset": "x"})}),
        ["modip_dataset must be JSON", "licence"],
    ),
]


@pytest.mark.parametrize(("change", "named"), BAD_TABLES)
def test_bad_schemas_are_named(
    change: Callable[[pa.Table], pa.Table], named: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.parquet"
    data = make([3, 4])
    if "int32" in named[0] and "observation" in named[0]:
        data = replace(data, observation=np.round(data.observation))
    pq.write_table(change(table(data)), path)
    with pytest.raises(UserError) as refusal:
        episodes.read(path)
    for words in [str(path), *named]:
        assert words in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 3, 200, -9])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    episodes.write(path, make([30]).recording)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        episodes.read(path)


def test_damage_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    episodes.write(path, make([300]).recording)
    damaged = bytearray(path.read_bytes())
    damaged[40:400] = bytes(360)
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"d\.parquet"):
        episodes.read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("episode_id,step\n0,0\n" * 9)
    with pytest.raises(UserError, match="not a complete Parquet file"):
        episodes.read(tmp_path / "table.csv")
    with pytest.raises(UserError, match="no such file"):
        episodes.read(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no such file"):
        episodes.read(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; free disk space") as refusal:
        write_atomically(path, half)
    assert str(path) in str(refusal.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        episodes.write(tmp_path / "file" / "d.parquet", make([2]).recording)


def test_statistics() -> None:
    data = replace(
        make([2, 3]),
        reward=np.array([0.5, 0.95, 0.1, 0.2, 0.3], np.float32),
        info=replace(INFO, dataset="a"),
    )
    facts = episodes.statistics(data.recording)
    assert facts["dataset"] == "a"
    assert (facts["episodes"], facts["steps"], facts["obs_dim"], facts["action_dim"]) == (
        2,
        5,
        4,
        2,
    )
    assert facts["return_mean"] == pytest.approx((1.45 + 0.6) / 2)
    assert facts["return_std"] == pytest.approx((1.45 - 0.6) / 2)
    assert (facts["return_min"], facts["return_max"]) == pytest.approx((0.6, 1.45))
    assert facts["success_rate"] == 0.5  # the toy's rule: the last reward is above 0.9
    assert facts["score_mean"] is None
    assert facts["action_min"] == data.action.min()
    json.dumps(facts, allow_nan=False)
    hopper = episodes.statistics(replace(data, info=replace(INFO, env_id="Hopper-v5")).recording)
    assert hopper["success_rate"] is None
    assert hopper["score_mean"] == pytest.approx(100 * (1.025 + 20.272305) / (3234.3 + 20.272305))
