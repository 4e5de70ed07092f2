"""`make serve` and `make worker` in repositories of their own, asked over HTTP."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from tests.helpers import ROOT
from tests.pipeline.test_end_to_end import Clone
from tests.s3 import S3
from tests.web import free_ports


class Served:
    """`python -m pipeline.serve` in the clone `folder`, whose params.yaml is `params`."""

    def __init__(
        self,
        folder: Path,
        params: dict[str, Any],
        *options: str,
        env: Mapping[str, str] | None = None,
        remote: str = "",
    ) -> None:
        """`remote`: lines for .dvc/config."""
        self.clone = Clone(folder)
        with (folder / ".dvc/config").open("a") as config:
            config.write(remote)
        shutil.copy(ROOT / "prefect.yaml", folder)
        self.clone.params = params
        self.clone.env |= env or {}
        self.clone.save()
        self.git("add", "-A")
        self.git("-c", "user.name=t", "-c", "user.email=t@x", "commit", "-qm", "small")
        self.port = free_ports()
        self.log = folder.parent / f"{folder.name}.log"
        self._options = ("--port", str(self.port), *options)
        self.start()

    def start(self) -> None:
        """Until it has said its address."""
        self.process = serve(self.clone.folder, self.clone.env, self.log, *self._options)
        end = time.monotonic() + 120
        while "Prefect: http" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        """As Ctrl-C does; nothing survives it."""
        self.process.terminate()
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]
        assert alive_in(self.clone.folder) == []

    def git(self, *args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=self.clone.folder, check=True, capture_output=True, text=True
        )
        return done.stdout

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/{path}"
        end = time.monotonic() + 30
        while True:
            answer = requests.get(url, timeout=30) if body is None else requests.post(url, json=body, timeout=30)  # fmt: skip
            if answer.status_code != requests.codes.unavailable or time.monotonic() > end:
                break
            time.sleep(0.5)  # SQLite has one writer, and on a busy machine it takes long
        assert answer.ok, answer.text
        return answer.json()

    def submit(self, deployment: str, **parameters: Any) -> dict[str, Any]:
        """A new flow run."""
        found = self.ask(f"deployments/name/{deployment}")
        body = {"parameters": {**found["parameters"], **parameters}}
        return dict(self.ask(f"deployments/{found['id']}/create_flow_run", body))

    def wait(self, run: dict[str, Any], seconds: float = 300.0) -> dict[str, Any]:
        """A flow run to its final state. The server may be away meanwhile."""
        end = time.monotonic() + seconds
        while run["state_type"] not in ("COMPLETED", "FAILED", "CANCELLED"):
            assert time.monotonic() < end, self.log.read_text()[-5000:]
            time.sleep(1.0)  # each question costs the server more than it seems
            with contextlib.suppress(requests.RequestException, AssertionError):
                run = self.ask(f"flow_runs/{run['id']}")
        return run

    def run(self, deployment: str, **parameters: Any) -> dict[str, Any]:
        """A new flow run to its final state."""
        return self.wait(self.submit(deployment, **parameters))

    def name(self, run: dict[str, Any]) -> str:
        """Of its branch and worktree."""
        return f"{run['name']}-{run['id'][:8]}"

    def jobs(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """The flow runs that it made."""
        tag = {"tags": {"all_": [f"run:{self.name(run)}"]}}
        return list(self.ask("flow_runs/filter", {"flow_runs": tag}))

    def tasks(self, run: dict[str, Any]) -> dict[str, Any]:
        """The stages that it and its jobs ran, by name."""
        ids = [one["id"] for one in (run, *self.jobs(run))]
        found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": ids}}})
        return {task["name"]: task for task in found if task["tags"]}

    def said(self, run: dict[str, Any]) -> str:
        """All lines of its log and its jobs'; the last ones reach the server a moment after its end."""
        ids = [one["id"] for one in (run, *self.jobs(run))]
        body = {"logs": {"flow_run_id": {"any_": ids}}, "limit": 200}
        lines: list[str] = []
        while page := self.ask("logs/filter", {**body, "offset": len(lines), "sort": "TIMESTAMP_ASC"}):  # fmt: skip
            lines += [row["message"] for row in page]
        return "\n".join(lines)


class Machine:
    """Another clone of the same commit, with a worker for the same server."""

    def __init__(self, served: Served, folder: Path) -> None:
        subprocess.run(["git", "clone", "-q", str(served.clone.folder), str(folder)], check=True)
        self.folder, self.log = folder, folder.parent / f"{folder.name}.log"
        self.env = {
            **served.clone.env,
            "PREFECT_API_URL": f"http://127.0.0.1:{served.port}/api",
            "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "tmp" / "site"),
        }
        self.start()

    def start(self) -> None:
        self.process = serve(self.folder, self.env, self.log, "--worker", "--cpu-slots", "1")

    def kill(self) -> None:
        """As a power cut: all that works there, at once."""
        self.process.kill()
        self.process.wait()
        for pid in alive_in(self.folder):
            os.kill(pid, signal.SIGKILL)


def s3_remote(s3: S3) -> str:
    """Lines for .dvc/config, in whose section [core] they begin: a new bucket as the default remote."""
    return f"    remote = store\n['remote \"store\"']\n    url = {s3.bucket()}\n    endpointurl = {s3.endpoint}\n"


def serve(
    folder: Path, env: Mapping[str, str], log: Path, *options: str
) -> subprocess.Popen[bytes]:
    """`python -m pipeline.serve` with `options` in the clone `folder`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.serve", *options],
            cwd=folder, env={**env}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip


def alive_in(folder: Path) -> list[int]:
    """Processes that work in the folder or below it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve().is_relative_to(folder.resolve()):
                found.append(int(process.name))
    return found
