"""Results between two clones with caches of their own and a folder as their remote; branches without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from modip.errors import UserError
from pipeline import travel, workspace
from pipeline.workspace import CurableError

PIPELINE = """
stages:
  first:
    cmd: echo ran >> {ran}; cat given > one
    deps: [given]
    outs: [one]
  second:
    cmd: echo ran >> {ran}; mkdir -p two; cat one one > two/both
    deps: [one]
    outs: [two]
"""


class Clones:
    """The clone `a`, and `b` made from it; `ran` has a line for each stage that was run in either."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b, self.ran, self.remote = (folder / n for n in ("a", "b", "ran", "remote"))
        self.a.mkdir()
        self.remote.mkdir()
        self.git(self.a, "init", "-q")
        Repo.init(str(self.a)).close()
        (self.a / ".dvc/config").write_text(
            f"[core]\n    remote = store\n    analytics = false\n['remote \"store\"']\n    url = {self.remote}\n"
        )
        (self.a / "dvc.yaml").write_text(PIPELINE.format(ran=self.ran))
        (self.a / "given").write_text("4\n")
        (self.a / "params.yaml").write_text("value: 1\n")
        (self.a / ".gitignore").write_text("/scratch\n/one\n/two\n")
        self.git(self.a, "add", "-A")
        self.git(self.a, "commit", "-qm", "first")
        self.git(folder, "clone", "-q", str(self.a), str(self.b))

    def git(self, folder: Path, *args: str) -> str:
        given = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        return subprocess.run(
            ["git", *given, *args], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def runs(self) -> int:
        return len(self.ran.read_text().splitlines()) if self.ran.exists() else 0


@pytest.fixture
def clones(tmp_path: Path) -> Clones:
    return Clones(tmp_path)


def _run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with Repo(str(folder)) as repo:
        repo.reproduce()


def test_what_one_clone_computed_another_restores(
    clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert travel.restore(clones.b, ["first", "second"], remote=True) == []
    _run(clones.a, monkeypatch)
    assert clones.runs() == 2
    travel.give(clones.a, "first")
    assert travel.restore(clones.b, ["first", "second"], remote=True) == ["first"]
    travel.give(clones.a, "second")
    assert travel.restore(clones.b, ["first", "second"], remote=True) == ["first", "second"]
    assert (clones.b / "two/both").read_text() == "4\n4\n"
    assert travel.key(clones.a, "second") == travel.key(clones.b, "second")
    _run(clones.b, monkeypatch)
    assert clones.runs() == 2
    # Other inputs are other results.
    (clones.b / "given").write_text("5\n")
    assert travel.restore(clones.b, ["first", "second"], remote=True) == []


def test_a_worker_gets_what_its_stages_need_and_no_more(
    clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(clones.a, monkeypatch)
    travel.give(clones.a, "first")
    known = travel.entries((clones.a / "dvc.lock").read_text())
    assert known.keys() == {"first", "second"}
    with pytest.raises(UserError, match=r"first was computed elsewhere.*dvc remote add"):
        travel.take(clones.b, known, ["first"], remote=False)
    travel.take(clones.b, known, ["first"], remote=True)
    assert (clones.b / "one").read_text() == "4\n"
    assert not (clones.b / "two").exists()
    assert travel.own(clones.b).keys() == {"first"}
    _run(clones.b, monkeypatch)
    assert clones.runs() == 3  # the second stage alone
    shutil.rmtree(clones.b / ".dvc/cache/files")
    with pytest.raises(CurableError, match="second: fetching its outputs"):  # nobody has sent them
        travel.take(clones.b, known, ["second"], remote=True)


def test_a_run_has_its_own_parameters_in_any_clone(clones: Clones) -> None:
    (clones.a / "more.py").write_text("not committed\n")
    before = clones.git(clones.a, "rev-parse", "HEAD")
    workspace.create(clones.a, "wise-owl", "value: 2\n")
    workspace.create(clones.a, "wise-owl", "value: 3\n")  # begun before: as it was
    assert clones.git(clones.a, "rev-parse", "HEAD") == before
    assert clones.git(clones.a, "status", "--porcelain") == "?? more.py"
    assert clones.git(clones.a, "show", "runs/wise-owl:params.yaml") == "value: 2"
    assert clones.git(clones.a, "show", "runs/wise-owl:more.py") == "not committed"
    assert not workspace.has_branch(clones.b, "wise-owl")
    found = workspace.bundle(clones.a, "wise-owl")
    workspace.unbundle(clones.b, "wise-owl", found)
    folder = clones.b / "scratch/prefect/runs/wise-owl"
    for _ in range(2):  # one that was killed left a worktree there
        workspace.enter(clones.b, "wise-owl", folder)
    assert (folder / "params.yaml").read_text() == "value: 2\n"
    assert (folder / "more.py").read_text() == "not committed\n"
    with Repo(str(folder)) as repo, Repo(str(clones.b)) as origin:
        assert repo.cache.legacy.path == origin.cache.legacy.path
        assert repo.config["remote"]["store"]["url"] == str(clones.remote)
    workspace.remove(clones.b, folder)
    assert not folder.exists()


def test_a_clone_that_is_too_old_is_named(clones: Clones) -> None:
    clones.git(clones.a, "commit", "-q", "--allow-empty", "-m", "second")
    workspace.create(clones.a, "wise-owl", "value: 2\n")
    with pytest.raises(UserError, match=r"lacks the commit that the run wise-owl started from; git pull"):  # fmt: skip
        workspace.unbundle(clones.b, "wise-owl", workspace.bundle(clones.a, "wise-owl"))
