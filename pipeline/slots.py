"""Who may run now: devices and places handed out by locks on files, which end with the process that holds them.

A lock on a file, and not a limit of Prefect's: it holds between two flows on one machine, whichever server they
belong to, and a worker that is killed leaves nothing behind that somebody must clear.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modip.errors import UserError


class Lock:
    """A held lock on one file, for as long as the object is not released and the process lives."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def release(self) -> None:
        self._file.close()


def try_lock(path: Path) -> Lock | None:
    """The lock on `path`, or None while another process, or another holder in this one, has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return Lock(file)


@dataclass(frozen=True)
class Place:
    """One place to run in: its name, which is also its file's, and what its processes find in their environment."""

    name: str
    env: Mapping[str, str]


def try_place(folder: Path, places: Iterable[Place]) -> tuple[Place, Lock] | None:
    """The first free one of `places`, or None."""
    for place in places:
        lock = try_lock(folder / f"{place.name}.lock")
        if lock is not None:
            return place, lock
    return None


def gpus(environ: Mapping[str, str]) -> list[str]:
    """This machine's GPUs: those of CUDA_VISIBLE_DEVICES where it is set, else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split()


def cpu_places(threads: int, slots: int, name: str = "cpu") -> list[Place]:
    """`slots` places, or with 0 as many as this process's cores carry at `threads` each, at least one."""
    number = slots or max(1, len(os.sched_getaffinity(0)) // threads)
    return [Place(f"{name}-{i}", {}) for i in range(number)]


def gpu_places(device: str, devices: list[str], per_gpu: int) -> list[Place]:
    """`per_gpu` places on each of `devices`, the empty ones first; of a `device` cuda:N, those on the Nth alone.

    Raises UserError where there is no such GPU.
    """
    index = device.partition(":")[2]
    chosen = devices if not index else devices[int(index) : int(index) + 1]
    if not chosen:
        raise UserError(
            f"params.yaml: runtime.device (value {device!r}) is not on this machine, which has "
            f"{len(devices)} GPU(s); set it to cpu, or run on a worker that has one"
        )
    # cuda:N counts among the visible ones: with one visible it would be 0, so its process sees them all.
    seen = {name: name if not index else ",".join(devices) for name in chosen}
    return [
        Place(f"gpu-{name}-{i}", {"CUDA_VISIBLE_DEVICES": seen[name]})
        for i in range(per_gpu)
        for name in chosen
    ]
