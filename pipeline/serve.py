"""Brings up Prefect on this machine: server, work pools, deployments and workers, until Ctrl-C.

Its files lie in scratch/prefect, in SQLite unless PREFECT_API_DATABASE_CONNECTION_URL names another database
(postgresql+asyncpg://user:password@host/name). With --worker only workers, for the server at PREFECT_API_URL.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import requests

from modip.errors import UserError
from pipeline import slots
from pipeline.stage import QUIET
from pipeline.workspace import HOME

POOLS = ("cpu", "gpu")
START_SECONDS = 120.0
STOP_SECONDS = 15.0
SILENT = {
    **QUIET,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_LOGGING_LEVEL": "INFO",
}


def settings(root: Path, host: str, port: int) -> dict[str, str]:
    """The environment of the server on `host`:`port`, of its workers and of their runs."""
    seen, here = (socket.gethostname(), "127.0.0.1") if host == "0.0.0.0" else (host, host)
    address = {
        "PREFECT_API_URL": f"http://{here}:{port}/api",
        # The page asks port 4200 otherwise, whatever the server's.
        "PREFECT_UI_API_URL": f"http://{seen}:{port}/api",
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "MODIP_REPORTS_URL": f"http://{seen}:{port + 1}",
    }
    return {**worker_settings(root), **address}


def worker_settings(root: Path) -> dict[str, str]:
    """The environment of workers in the clone `root`, and of their runs."""
    return {
        **SILENT,
        "PREFECT_HOME": str(root / HOME / "home"),
        **os.environ,
        "MODIP_ROOT": str(root),
    }


class Processes:
    """What was started; all of it ends with this program."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A program of this interpreter, in a session of its own: Ctrl-C reaches only us, and we end it in order."""
        one = subprocess.Popen(
            [sys.executable, "-m", *command], env=self.env, start_new_session=True
        )
        self._running.append(one)
        return one

    def run(self, *command: str) -> None:
        """A program to its end. Raises UserError with what it said."""
        env = {name: value for name, value in self.env.items() if name != "MODIP_ROOT"}
        done = subprocess.run(
            [sys.executable, "-m", *command], env=env, capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()
            raise UserError(f"{' '.join(command)}: {said[-1][:500] if said else 'failed'}")

    def watch(self) -> None:
        """Until one of them ends. Raises UserError then."""
        while True:
            for one in self._running:
                if one.poll() is not None:
                    raise UserError(f"{one.args!r} ended with status {one.returncode}; see above")
            time.sleep(0.5)

    def stop(self) -> None:
        """Workers first, so that they can still report; whoever stays is killed."""
        for one in reversed(self._running):
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGTERM)
                try:
                    one.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(one.pid, signal.SIGKILL)
                    one.wait()


def wait_healthy(api: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers. Raises UserError if it does not."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise UserError(f"the Prefect server ended with status {server.returncode}; see above")
        try:
            if requests.get(f"{api}/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.3)
    raise UserError(f"{api} did not answer within {START_SECONDS:.0f} s")


def bring_up(running: Processes, host: str, port: int, limit: int) -> None:
    """Server, reports, pools, deployments and workers."""
    api = running.env["PREFECT_API_URL"]
    reports = Path(running.env["MODIP_ROOT"]) / HOME / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    server = running.start("prefect", "server", "start", "--host", host, "--port", str(port))
    wait_healthy(api, server)
    running.start(
        "http.server", "--bind", host, "--directory", str(reports), str(port + 1)
    )  # the reports' pages
    for pool in POOLS:
        running.run("prefect", "work-pool", "create", "--type", "process", "--overwrite", pool)
    running.run("prefect", "--no-prompt", "deploy", "--all")
    workers(running, limit)


def workers(running: Processes, limit: int) -> None:
    """A worker for CPUs, and one for GPUs where there are any; each takes `limit` flow runs at once."""
    for pool in POOLS if slots.gpus(os.environ) else POOLS[:1]:
        running.start("prefect", "worker", "start", "--pool", pool, "--limit", str(limit))


def parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    result.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    result.add_argument("--port", type=int, default=4200, help="port; the next one too [4200]")
    result.add_argument("--limit", type=int, default=4, help="flow runs at once per worker [4]")
    result.add_argument("--worker", action="store_true", help="workers only, for PREFECT_API_URL")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after Ctrl-C or SIGTERM, 2 after one line `error: ...`."""
    args = parser().parse_args(arguments)
    root = Path.cwd()
    if args.worker and "PREFECT_API_URL" not in os.environ:
        print(
            "error: PREFECT_API_URL is not set: name the server, http://HOST:4200/api",
            file=sys.stderr,
        )
        return 2
    env = worker_settings(root) if args.worker else settings(root, args.host, args.port)
    running = Processes(env)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.worker:
            workers(running, args.limit)
        else:
            bring_up(running, args.host, args.port, args.limit)
            print(
                f"\nPrefect: {env['PREFECT_UI_API_URL'].removesuffix('/api')}   (Ctrl-C ends it)\n",
                flush=True,
            )
        running.watch()
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        running.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
