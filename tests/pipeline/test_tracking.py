"""The JSON lines are complete and go on from any checkpoint; Weights & Biases can fail as it likes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modip.errors import UserError
from pipeline.tracking import Tracker, publish


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODIP_WANDB", raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scratch" / "curve.jsonl"


def write(path: Path, values: range, rows: int = 0) -> None:
    with Tracker(path, "toy/bc/0", rows, {"a": 1}) as tracker:
        for value in values:
            tracker.log({"env_steps": value, "success": 0.5, "policy": "dp"})
        assert tracker.rows == rows + len(values)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["env_steps"] for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(path: Path) -> None:
    with Tracker(path, "toy/bc/0", 0, {}) as tracker:
        tracker.log({"env_steps": 1, "success": None, "policy": "dp"})
        assert json.loads(path.read_text()) == {"env_steps": 1, "success": None, "policy": "dp"}


def test_every_line_is_strict_json(path: Path) -> None:
    with Tracker(path, "toy/bc/0", 0, {}) as tracker:
        tracker.log({"loss": float("nan"), "return": float("-inf"), "note": "a\nb", "ok": True})
    expected = {"loss": None, "return": None, "note": "a\nb", "ok": True}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [expected]


def test_resuming_drops_what_came_after_the_checkpoint(path: Path) -> None:
    write(path, range(5))
    with path.open("a") as file:
        file.write('{"env_steps": 5, "succ')  # the kill struck here
    write(path, range(3, 6), rows=3)
    assert steps(path) == [0, 1, 2, 3, 4, 5]


def test_a_new_run_starts_an_empty_file(path: Path) -> None:
    write(path, range(5))
    write(path, range(2))
    assert steps(path) == [0, 1]


def test_a_file_shorter_than_its_checkpoint_is_refused(path: Path) -> None:
    write(path, range(2))
    with path.open("a") as file:
        file.write('{"env_steps": 2}')  # no newline: not a whole row
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"curve.jsonl: 2 rows, .* counts 3; delete .*scratch"):
        Tracker(path, "toy/bc/0", 3, {})
    assert path.read_bytes() == before


class FakeRun:
    def __init__(self, fail: str) -> None:
        self.fail, self.rows, self.finished = fail, list[dict[str, Any]](), False
        self.used, self.made = list[str](), list[Any]()

    def use_artifact(self, name: str) -> None:
        self.used.append(name)

    def log_artifact(self, artifact: Any) -> None:
        self.made.append(artifact)

    def log(self, row: dict[str, Any], step: int = 0) -> None:
        if self.fail == "log":
            raise ConnectionError("no route")
        self.rows.append({**row, "at": step})

    def finish(self) -> None:
        if self.fail == "finish":
            raise ConnectionError("no route")
        self.finished = True


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fail: str) -> tuple[FakeRun, list[dict[str, Any]]]:
    run, given = FakeRun(fail), list[dict[str, Any]]()

    def init(**options: Any) -> FakeRun:
        given.append(options)
        if fail == "init":
            raise ConnectionError("no account")
        return run

    def artifact(name: str, kind: str, metadata: dict[str, Any]) -> Any:
        places: list[str] = []
        return SimpleNamespace(
            name=name, kind=kind, metadata=metadata, places=places, add_reference=places.append
        )

    module = SimpleNamespace(
        init=init,
        Settings=lambda **options: options,
        Artifact=artifact,
        Table=lambda columns, data: (columns, data),
        Video=lambda file, format: (file, format),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return run, given


def test_nothing_is_sent_unless_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = fake_wandb(monkeypatch, "")
    write(path, range(2))
    assert not given
    assert not run.rows


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_asked_for_it_gets_the_same_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    run, given = fake_wandb(monkeypatch, "")
    monkeypatch.setenv("MODIP_WANDB", mode)
    write(path, range(2))
    assert given[0]["mode"] == mode
    assert given[0]["id"] == "toy-bc-0"
    assert given[0]["config"] == {"a": 1}
    assert [(row["env_steps"], row["at"]) for row in run.rows] == [(0, 1), (1, 2)]
    assert run.finished


@pytest.mark.parametrize("fail", ["init", "log", "finish", "import"])
def test_its_failure_never_stops_a_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fail: str
) -> None:
    fake_wandb(monkeypatch, fail)
    if fail == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("MODIP_WANDB", "offline")
    write(path, range(3))
    assert steps(path) == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "Weights & Biases" in caplog.text


def test_an_unknown_mode_is_the_users_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODIP_WANDB", "yes")
    with pytest.raises(UserError, match=r"MODIP_WANDB \(value 'yes'\) is unknown: choose one of"):
        Tracker(path, "toy/bc/0", 0, {})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "manifest.json").write_text("{}")
    (tmp_path / "toy.parquet").write_text("rows")
    return tmp_path


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_what_a_stage_made_is_told_with_what_it_was_made_from(
    files: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    run, given = fake_wandb(monkeypatch, "")
    data, policy = Path("toy.parquet"), Path("policy")
    publish("a", made={policy: "policy"}, given=[data])
    assert not given  # nobody asked
    monkeypatch.setenv("MODIP_WANDB", mode)
    publish(
        "a/b: c", made={policy: "policy"}, given=[data], table=[{"x": 1}, {"y": 2}], videos={"v": data}
    )  # fmt: skip
    assert given[0]["id"] == "a-b-c"
    assert run.used == (["toy.parquet:latest"] if mode == "online" else [])  # offline nobody knows
    (artifact,) = run.made
    assert (artifact.name, artifact.kind) == ("policy", "policy")
    assert artifact.places == [(files / "policy").as_uri()]  # where it lies: it is not uploaded
    assert artifact.metadata["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert artifact.metadata["given"] == {"toy.parquet": hashlib.sha256(b"rows").hexdigest()}
    assert run.rows[0]["results"] == (["x", "y"], [[1, None], [None, 2]])
    assert run.rows[1]["v"] == ("toy.parquet", "mp4")
    assert run.finished


@pytest.mark.parametrize("fail", ["init", "log", "finish", "missing file"])
def test_what_cannot_be_told_stops_no_stage(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fail: str
) -> None:
    fake_wandb(monkeypatch, fail)
    monkeypatch.setenv("MODIP_WANDB", "offline")
    lost = Path("lost") if fail == "missing file" else Path("policy")
    publish("a", made={lost: "policy"}, table=[{"x": 1}])
    assert len(caplog.records) == 1
    assert "Weights & Biases" in caplog.text
