"""What Prefect costs over plain DVC, and what a second worker brings: python -m benchmarks.flows

A matrix of 2 data sets x 2 agents x 2 seeds of the toy task at its usual size, four times from nothing: by `dvc repro`,
as a `benchmark` flow on one worker with one place, the same with an S3 server between the clones, and with a second clone
and worker. Takes some ten minutes and wants four cores to itself.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.helpers import ROOT
from tests.pipeline.served import Machine, Served, s3_remote
from tests.pipeline.test_end_to_end import Clone
from tests.s3 import S3

MATRIX = {"dataset": ["toy", "other"], "agent": ["bc", "modip"], "seed": [0, 1]}
STAGES = 31


def params() -> dict[str, Any]:
    """params.yaml with a second toy data set."""
    tree: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    tree["data"]["other"] = {**tree["data"]["toy"], "seed": 8}
    for section in tree.values():
        if isinstance(section, dict) and "by_dataset" in section and "toy" in section["by_dataset"]:
            section["by_dataset"]["other"] = section["by_dataset"]["toy"]
    return tree


def plain(folder: Path) -> float:
    """Seconds of `dvc repro`."""
    clone = Clone(folder)
    clone.params = params() | MATRIX
    clone.save()
    began = time.perf_counter()
    ran, _ = clone.repro()
    assert len(ran) == STAGES, ran
    return time.perf_counter() - began


def flows(folder: Path, machines: int, s3: S3 | None) -> tuple[float, float]:
    """Seconds from the submission to the first task, and to the end."""
    remote = "" if s3 is None else s3_remote(s3)
    env = {} if s3 is None else s3.env
    served = Served(folder / "a", params(), "--cpu-slots", "1", env=env, remote=remote)
    others = [Machine(served, folder / f"b{i}") for i in range(machines - 1)]
    try:
        began = time.time()
        run = served.wait(served.submit("benchmark/cpu", matrix=MATRIX), 1200.0)
        seconds = time.time() - began
        assert run["state_type"] == "COMPLETED", run["state"]["message"]
        ran = re.findall(r"Running stage '([^']+)'", served.said(run))
        assert len(ran) == len(set(ran)) == STAGES, sorted(ran)
        first = min(datetime.fromisoformat(task["start_time"]) for task in served.tasks(run).values())  # fmt: skip
        return first.timestamp() - began, seconds
    finally:
        for other in others:
            other.process.terminate()
            other.process.wait()
        served.stop()


def main() -> None:
    """Prints the figures."""
    s3 = S3()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_dvc = plain(folder / "plain")
        first, one = flows(folder / "one", 1, None)
        _, one_s3 = flows(folder / "one_s3", 1, s3)
        _, two_s3 = flows(folder / "two_s3", 2, s3)
    s3.stop()
    print(
        json.dumps(
            {
                "dvc_repro_s": round(by_dvc, 1),
                "one_worker_s": round(one, 1),
                "overhead_s_per_stage": round((one - by_dvc) / STAGES, 2),
                "submission_to_first_task_s": round(first, 1),
                "one_worker_s3_s": round(one_s3, 1),
                "two_workers_s3_s": round(two_s3, 1),
                "two_over_one": round(two_s3 / one_s3, 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
