"""Drops what a killed run left behind that would stop the next one: locks, and a dvc.lock that was cut off.

DVC drops the locks of processes that are gone. But one that was killed a moment ago, and that its parent has not waited
for yet, it takes for alive; and a file that the kill cut off while DVC wrote it, it cannot read. Without its dvc.lock it
restores what was computed from its cache of runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

LOCKS = Path(".dvc/tmp/rwlock")
LOCK = Path("dvc.lock")
PATIENCE = 1.0
"""Seconds after which a file that cannot be read is not just being written."""


def unlock(locks: Path = LOCKS, patience: float = PATIENCE) -> bool:
    """True if the file of locks was removed: no living process holds one."""
    try:
        held = _read(locks)
        if held is None:
            time.sleep(patience)
            held = _read(locks)
    except FileNotFoundError:
        return False
    if held is not None and any(_lives(pid) for pid in _holders(held)):
        return False
    locks.unlink()
    return True


def mend(lock: Path = LOCK, patience: float = PATIENCE) -> bool:
    """True if dvc.lock was removed: it does not end as DVC ends it, and nobody is about to."""
    if not _cut_off(lock):
        return False
    time.sleep(patience)
    if not _cut_off(lock):
        return False
    lock.unlink()
    return True


def _cut_off(lock: Path) -> bool:
    return lock.is_file() and not lock.read_bytes().endswith(b"\n")


def _read(locks: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(locks.read_text()))
    except ValueError:
        return None


def _holders(held: dict[str, Any]) -> set[int]:
    """{"read": {path: [{"pid", "cmd"}]}, "write": {path: {"pid", "cmd"}}} (dvc/rwlock.py)."""
    readers = [one for infos in held.get("read", {}).values() for one in infos]
    return {int(info["pid"]) for info in (*readers, *held.get("write", {}).values())}


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    unlock()
    mend()
    sys.exit(0)
