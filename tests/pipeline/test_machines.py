"""Two machines, as far as one can have two: two clones, each with a cache and a worker of its own, an S3 server between
them; and everything that can die, killed in the middle of a matrix."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from pipeline import serve
from tests.helpers import small_tree
from tests.pipeline.served import Machine, Served, alive_in, s3_remote
from tests.pipeline.test_end_to_end import TRAINED
from tests.s3 import S3

LIMITS = {
    "minutes": 60, "minutes_by_stage": {}, "retries": 4, "retry_seconds": 2, "mirror_seconds": 0.5,
}  # fmt: skip


def _until(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)
    return found


@pytest.fixture
def machines(tmp_path: Path, s3: S3) -> Iterator[tuple[Served, Machine]]:
    """Each takes one job at a time."""
    params = small_tree({**TRAINED, "modip.env_steps": 1600, "modip.final_env_steps": 80})
    params["runtime"]["checkpoint_seconds"] = 0.1
    remote = s3_remote(s3)
    served = Served(tmp_path / "a", params, "--cpu-slots", "1", env=s3.env, remote=remote)
    other = Machine(served, tmp_path / "b")
    try:
        yield served, other
    finally:
        other.process.terminate()
        served.stop()
    assert other.process.wait(60) == 0, other.log.read_text()[-3000:]


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_matrix_outlives_a_machine_the_server_and_the_remote(
    machines: tuple[Served, Machine], s3: S3
) -> None:
    served, other = machines
    matrix = {"dataset": ["toy"], "agent": ["modip"], "seed": [0, 1]}
    run = served.submit("benchmark/cpu", matrix=matrix, limits=LIMITS)

    def begun() -> bool:
        """The other machine works on a cell, of which S3 has a checkpoint."""
        now = served.ask(f"flow_runs/{run['id']}")
        assert now["state_type"] not in ("COMPLETED", "FAILED"), now["state"]["message"]
        here = [
            state.parent.name for state in other.folder.glob("scratch/prefect/states/modip-*/state")
        ]
        return bool(here) and any(job in name for job in here for name in _objects(s3))

    _until(begun, 240)
    other.kill()
    server = next(
        process
        for process in map(psutil.Process, alive_in(served.clone.folder))
        if "server" in process.cmdline()
    )
    server.kill()
    s3.stop()
    time.sleep(8)
    s3.start()
    _until(lambda: serve.answers(f"http://127.0.0.1:{served.port}/api"), 60)
    other.start()  # without a server it would end at once
    run = served.wait(run)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    # Nothing is computed twice but the interrupted stage, and that goes on from its checkpoint.
    said = served.said(run)
    ran = Counter(re.findall(r"Running stage '([^']+)'", said))
    assert len(ran) == 3 + 2 * 2 + 2 * 2 + 1
    assert sum(times > 1 for times in ran.values()) <= 1, ran
    assert re.search(r"goes on from the state that|resumed at", said)
    jobs = served.jobs(run)
    assert {job["state_type"] for job in jobs} == {"COMPLETED"}
    assert max(job["run_count"] for job in jobs) >= 2
    # Whoever started it finds every stage computed.
    (served.clone.folder / "params.yaml").write_text(
        served.git("show", f"runs/{served.name(run)}:params.yaml")
    )
    again, text = served.clone.repro()
    assert again == set(), text


def _objects(s3: S3) -> list[str]:
    names: list[str] = []
    buckets = re.findall(r"<Name>([^<]+)</Name>", requests.get(s3.endpoint, timeout=30).text)
    for bucket in buckets:
        page = requests.get(f"{s3.endpoint}/{bucket}?list-type=2", timeout=30).text
        names += re.findall(r"<Key>([^<]+)</Key>", page)
    return names
