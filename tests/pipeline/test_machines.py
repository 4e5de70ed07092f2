"""Two machines, as far as one can have two: two clones, each with a cache and a worker of its own, an S3 server between
them; and everything that can die, killed in the middle of a matrix."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

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
        time.sleep(0.1)
    return found


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_matrix_on_two_machines_outlives_them(tmp_path: Path, s3: S3) -> None:
    params = small_tree({**TRAINED, "modip.env_steps": 1600, "modip.final_env_steps": 80})
    params["runtime"]["checkpoint_seconds"] = 0.1
    params["data"]["other"] = {**params["data"]["toy"], "seed": 8}
    folder = tmp_path / "a"
    served = Served(folder, params, "--cpu-slots", "1", env=s3.env, remote=s3_remote(s3))
    other = Machine(served, tmp_path / "b")
    run = served.submit(
        "benchmark/cpu",
        matrix={"dataset": ["toy", "other"], "agent": ["bc", "modip"], "seed": [0]},
        limits=LIMITS,
    )

    def there(kind: str) -> list[Path]:
        """Checkpoints of jobs of a kind that run on the other machine."""
        return list((other.folder / "scratch/prefect/states").glob(f"{kind}-*/state"))

    # The other machine is lost in the middle of its job, as soon as S3 has a checkpoint of it.
    def copied() -> bool:
        now = served.ask(f"flow_runs/{run['id']}")
        assert now["state_type"] not in ("COMPLETED", "FAILED"), now["state"]["message"]
        return bool(there("modip") or there("control")) and "/states/" in str(_objects(s3))

    _until(copied, 240)
    other.kill()
    # The server is killed, and S3 is away for a while.
    server = next(p for p in map(psutil.Process, alive_in(folder)) if "server" in p.cmdline())
    server.kill()
    s3.stop()
    time.sleep(8)
    s3.start()
    other.start()
    run = served.wait(run)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    said = served.said(run)
    ran = Counter(re.findall(r"Running stage '([^']+)'", said))
    cells = [f"{name}-{agent}-0" for name in ("toy", "other") for agent in ("bc", "modip")]
    assert ran.keys() >= {f"finetune@{cell}" for cell in cells}
    # Nothing is computed twice but the interrupted stage, and that goes on from its checkpoint.
    twice = [name for name, times in ran.items() if times > 1]
    assert len(twice) <= 1, twice
    assert "goes on from the state" in said or "resumed at" in said
    jobs = served.jobs(run)
    assert all(job["state_type"] == "COMPLETED" for job in jobs)
    assert max(job["run_count"] for job in jobs) >= 2
    # Whoever started it finds every stage computed.
    tree = served.git("show", f"runs/{served.name(run)}:params.yaml")
    (folder / "params.yaml").write_text(tree)
    ran_again, text = served.clone.repro()
    assert ran_again == set(), text
    served.stop()
    other.process.terminate()
    assert other.process.wait(60) == 0, other.log.read_text()[-3000:]


def _objects(s3: S3) -> list[str]:
    import requests

    names: list[str] = []
    buckets = re.findall(r"<Name>([^<]+)</Name>", requests.get(s3.endpoint, timeout=30).text)
    for bucket in buckets:
        page = requests.get(f"{s3.endpoint}/{bucket}?list-type=2", timeout=30).text
        names += re.findall(r"<Key>([^<]+)</Key>", page)
    return names
