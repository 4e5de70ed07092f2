"""Places and devices: no two holders of one, and none lost with its holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modip.errors import UserError
from pipeline import slots
from tests.helpers import ROOT


def test_a_place_is_held_once_and_free_again(tmp_path: Path) -> None:
    places = slots.gpu_places("cuda", ["0", "1"], 1)
    first, second = (slots.try_place(tmp_path, places) for _ in range(2))
    assert first is not None
    assert second is not None
    assert [first[0].env, second[0].env] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]  # fmt: skip
    assert slots.try_place(tmp_path, places) is None
    first[1].release()
    again = slots.try_place(tmp_path, places)
    assert again is not None
    assert again[0] == first[0]


def test_two_flows_share_a_gpu_only_if_the_user_says_so(tmp_path: Path) -> None:
    places = slots.gpu_places("cuda", ["0", "1"], 2)
    devices = [place.env["CUDA_VISIBLE_DEVICES"] for place in places]
    assert devices == ["0", "1", "0", "1"]  # the empty ones first
    held = [slots.try_place(tmp_path, places) for _ in range(5)]
    assert [one is None for one in held] == [False] * 4 + [True]


def test_a_named_gpu_is_the_only_one() -> None:
    (only,) = slots.gpu_places("cuda:1", ["4", "7"], 1)
    assert only.name == "gpu-7-0"  # so that cuda and cuda:1 do not meet on it
    assert only.env == {"CUDA_VISIBLE_DEVICES": "4,7"}  # in which cuda:1 is what it was
    for device, devices in (("cuda", []), ("cuda:2", ["4", "7"])):
        with pytest.raises(UserError, match=rf"runtime\.device \(value '{device}'\).*{len(devices)} GPU"):  # fmt: skip
            slots.gpu_places(device, devices, 1)


def test_a_killed_holder_leaves_its_place(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time; from pipeline import slots\n"
        "lock = slots.try_lock(pathlib.Path(sys.argv[1])); print(lock is not None, flush=True); time.sleep(60)"
    )
    path = tmp_path / "locks" / "gpu-0-0.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    assert slots.try_lock(path) is None
    holder.kill()
    holder.communicate()
    assert slots.try_lock(path) is not None


def test_devices_are_those_the_worker_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots.gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-abc"}) == ["2", "GPU-abc"]
    assert slots.gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 0\necho 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slots.gpus({}) == ["0", "1"]
    fake.unlink()
    assert slots.gpus({}) == []


def test_cpu_places_follow_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert len(slots.cpu_places(1, 0)) == cores
    assert len(slots.cpu_places(4 * cores, 0)) == 1
    assert [place.name for place in slots.cpu_places(1, 3)] == ["cpu-0", "cpu-1", "cpu-2"]
