"""Locks of runs that were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import travel
from pipeline.unlock import mend, unlock


def held(path: Path, *pids: int) -> Path:
    infos = [{"pid": pid, "cmd": "dvc repro"} for pid in pids]
    path.write_text(json.dumps({"read": {"a": infos[1:]}, "write": {"b": infos[0]}}))
    return path


def test_a_zombies_locks_are_dropped(tmp_path: Path) -> None:
    """A killed child that nobody has waited for: DVC takes it for alive."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    locks = held(tmp_path / "rwlock", child.pid, child.pid)
    assert not unlock(locks)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still there
    assert unlock(locks)
    assert not locks.exists()
    child.wait()


def test_one_living_holder_keeps_all(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    locks = held(tmp_path / "rwlock", gone.pid, os.getpid())
    assert not unlock(locks)
    assert locks.exists()
    assert unlock(held(tmp_path / "rwlock", gone.pid))


@pytest.mark.parametrize("text", ["", '{"read": {"/a": [{"pid"'])
def test_a_file_that_was_cut_off_is_dropped(text: str, tmp_path: Path) -> None:
    locks = tmp_path / "rwlock"
    locks.write_text(text)
    assert unlock(locks, patience=0.0)
    assert not locks.exists()


def test_without_locks_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert not unlock(tmp_path / "rwlock")


@pytest.mark.parametrize("text", ["", "schema: '2.0'\nstages:\n  a:\n    cmd: pyth"])
def test_a_dvc_lock_that_was_cut_off_is_dropped(text: str, tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    lock.write_text(text)
    assert mend(lock, patience=0.0)
    assert not lock.exists()


@pytest.mark.parametrize("text", ["schema: '2.0'\n", "<<<<<<< HEAD\n", travel.text({"a": {}})])
def test_any_other_dvc_lock_is_left_alone(text: str, tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    lock.write_text(text)
    assert not mend(lock, patience=0.0)
    assert lock.read_text() == text
    assert not mend(tmp_path / "none")


def test_a_dvc_lock_that_is_being_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "dvc.lock"
    lock.touch()
    monkeypatch.setattr("time.sleep", lambda _: lock.write_text("schema: '2.0'\n"))
    assert not mend(lock)
