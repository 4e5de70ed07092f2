"""Brings up Prefect on this machine: server, work pools, deployments and workers, until Ctrl-C.

Its files lie in scratch/prefect, in SQLite unless PREFECT_API_DATABASE_CONNECTION_URL names another database
(postgresql+asyncpg://user:password@host/name). With --worker only workers, for the server at PREFECT_API_URL.

What it has started it keeps running: whoever dies is started again. If it is itself killed, what it had started lives on,
and ends when it is started the next time. Flow runs that were interrupted go on then (pipeline.liveness).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from modip.config import load
from modip.errors import UserError
from pipeline import slots
from pipeline.slots import Lock
from pipeline.stage import QUIET
from pipeline.workspace import HOME, PARAMS

CONTROL = "control"
"""The pool of coordinators: flow runs that only wait for others. Its worker takes any number of them."""
POOLS = ("cpu", "gpu", CONTROL)
START_SECONDS = 120.0
EARLY_SECONDS = 20.0
"""Whoever ends by itself sooner after its first start will not do better the next time."""
STOP_SECONDS = 15.0
DEATHS, DEATHS_SECONDS = 5, 600.0
"""So many within so long, and nobody starts it again."""
MARK = "MODIP_SERVED_BY"
"""In the environment of all that was started here: what is to end with us, wherever it has moved."""
ASKING = ("worker", "prefect.engine", "pipeline.liveness")
"""In the command lines of workers, flow runs and the janitor."""
SILENT = {
    **QUIET,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # To wait for a free place is no fault; and SQLite has one writer.
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_LOGGING_LEVEL": "INFO",
    # A server that is away is asked again after 2, 4, ... 128 s, and one that has lost its data base answers 500. Whoever
    # was never connected gives up at once, so a wrong address still shows.
    "PREFECT_CLIENT_MAX_RETRIES": "7",
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
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


@dataclass
class Child:
    """A program that is kept running. `asks`: started again only when the server is there."""

    name: str
    command: Sequence[str]
    asks: bool
    process: subprocess.Popen[bytes]
    first: float
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS))
    due: float | None = None


class Processes:
    """Programs that are kept running, with `env`."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._children: list[Child] = []

    def start(self, name: str, *command: str, asks: bool = True) -> subprocess.Popen[bytes]:
        """A program of this interpreter, kept running from now on."""
        one = Child(name, command, asks, self._popen(command), time.monotonic())
        self._children.append(one)
        return one.process

    def _popen(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C reaches only us, and we end it in order."""
        return subprocess.Popen(
            [sys.executable, "-m", *command], env=self.env, start_new_session=True
        )

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
        """For ever; whoever dies is started again. Raises UserError when that does not help."""
        while True:
            for one in self._children:
                if one.due is None and one.process.poll() is not None:
                    self._died(one)
                elif one.due is not None and time.monotonic() >= one.due and self._may_start(one):
                    one.process, one.due = self._popen(one.command), None
            time.sleep(0.5)

    def _died(self, one: Child) -> None:
        """Raises UserError if it is not worth another start."""
        status, now = one.process.returncode, time.monotonic()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if status >= 0 and now - one.first < EARLY_SECONDS:
            raise UserError(f"{one.name} {how} as soon as it was started; see above")
        with suppress(ProcessLookupError):  # flow runs have groups of their own, and go on
            os.killpg(one.process.pid, signal.SIGKILL)
        one.deaths.append(now)
        if len(one.deaths) == DEATHS and now - one.deaths[0] < DEATHS_SECONDS:
            minutes = DEATHS_SECONDS / 60
            raise UserError(f"{one.name} {how}, {DEATHS} times in {minutes:.0f} minutes; see above")
        recent = sum(now - at < DEATHS_SECONDS for at in one.deaths)
        one.due = now + 2.0**recent
        print(f"{one.name} {how}: it is started again in {2**recent} s", flush=True)

    def _may_start(self, one: Child) -> bool:
        """Without a server a worker dies at once, however often it is started."""
        return not one.asks or answers(self.env["PREFECT_API_URL"])


def marked(mark: str) -> list[psutil.Process]:
    """The living processes of this user that have `mark` from whoever started them, directly or not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
    return found


def end(mark: str) -> None:
    """All of them: workers, flow runs and the janitor first, so that they can still report to the server, then the
    others; whoever stays is killed."""
    for first in (True, False):
        found = []
        for process in marked(mark):
            with suppress(psutil.Error):
                if not first or set(ASKING) & set(process.cmdline()):
                    process.terminate()
                    found.append(process)
        psutil.wait_procs(found, STOP_SECONDS)
    found = marked(mark)
    for process in found:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, STOP_SECONDS)


def answers(api: str) -> bool:
    """Whether the server is there."""
    try:
        return requests.get(f"{api}/health", timeout=5).ok
    except requests.RequestException:
        return False


def wait_healthy(api: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers. Raises UserError if it does not."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise UserError(f"the Prefect server ended with status {server.returncode}; see above")
        if answers(api):
            return
        time.sleep(0.3)
    raise UserError(f"{api} did not answer within {START_SECONDS:.0f} s")


def check_free(host: str, port: int) -> None:
    """Raises UserError if another program listens there."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--port: {host}:{port} cannot be had ({error.strerror}); end the program that has it, or choose another "
                "--port with a free one after it"
            ) from None


def bring_up(running: Processes, host: str, port: int, places: dict[str, int]) -> None:
    """Server, reports, pools, deployments, workers and the janitor."""
    api = running.env["PREFECT_API_URL"]
    reports = Path(running.env["MODIP_ROOT"]) / HOME / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    for one in (port, port + 1):
        check_free(host, one)
    server = running.start(
        "the Prefect server", "prefect", "server", "start", "--host", host, "--port", str(port),
        asks=False,
    )  # fmt: skip
    wait_healthy(api, server)
    running.start(
        "the reports' server", "http.server", "--bind", host, "--directory", str(reports), str(port + 1),
        asks=False,
    )  # fmt: skip
    running.run("pipeline.pools", *POOLS)
    running.run("prefect", "--no-prompt", "deploy", "--all")
    workers(running, places)
    worker(running, CONTROL)
    running.start("the janitor", "pipeline.liveness", *POOLS)


def workers(running: Processes, places: dict[str, int]) -> None:
    """A worker for each pool that this machine has places for; it takes as many flow runs at once."""
    for pool, number in places.items():
        if number:
            worker(running, pool, "--limit", str(number))


def worker(running: Processes, pool: str, *options: str) -> None:
    """One worker. Its flow runs do not die with it: they finish, and the next worker takes others."""
    command = ("prefect", "worker", "start", "--pool", pool, *options)
    running.start(f"the worker for {pool}", *command)


def places(root: Path, cpu_slots: int, per_gpu: int) -> dict[str, int]:
    """How many flow runs at once this machine has places for, by work pool. Raises UserError, also as `load` does."""
    for name, value, least in (("--cpu-slots", cpu_slots, 0), ("--per-gpu", per_gpu, 1)):
        if value < least:
            raise UserError(f"{name} {value} is less than {least}")
    threads = next(iter(load(root / PARAMS).cells.values())).runtime.threads
    return {
        "cpu": len(slots.cpu_places(threads, cpu_slots)),
        "gpu": len(slots.gpus(os.environ)) * per_gpu,
    }


def only_one(root: Path, kind: str) -> Lock:
    """The right to be the only one in this clone on this machine. Raises UserError if another lives."""
    lock = slots.try_lock(root / HOME / f"{kind}-{socket.gethostname()}.lock")
    if lock is None:
        raise UserError(f"`make {kind}` runs in {root} already: end that one first")
    return lock


def parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    result.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    result.add_argument("--port", type=int, default=4200, help="port; the next one too [4200]")
    result.add_argument(
        "--cpu-slots", type=int, default=0,
        help="flow runs at once on CPUs; 0: cores divided by runtime.threads of params.yaml [0]",
    )  # fmt: skip
    result.add_argument("--per-gpu", type=int, default=1, help="flow runs at once on one GPU [1]")
    result.add_argument("--worker", action="store_true", help="workers only, for PREFECT_API_URL")
    return result


def serve(args: argparse.Namespace) -> None:
    """Until a signal. Raises UserError."""
    root = Path.cwd()
    kind = "worker" if args.worker else "serve"
    if args.worker:
        env = worker_settings(root)
        api = env.get("PREFECT_API_URL")
        if api is None:
            raise UserError("PREFECT_API_URL is not set: name the server, http://HOST:4200/api")
        if not answers(api):
            raise UserError(
                f"PREFECT_API_URL: no Prefect server answers at {api}; start it, or name another, http://HOST:4200/api"
            )
    else:
        env = settings(root, args.host, args.port)
    env |= {"MODIP_CPU_SLOTS": str(args.cpu_slots), "MODIP_PER_GPU": str(args.per_gpu)}
    found = places(root, args.cpu_slots, args.per_gpu)
    lock = only_one(root, kind)
    mark = f"{kind} {root}"
    running = Processes({**env, MARK: mark})
    try:
        if marked(mark):
            print("ending what is left of an earlier start, which was killed", flush=True)
            end(mark)
        if args.worker:
            workers(running, found)
        else:
            bring_up(running, args.host, args.port, found)
            address = env["PREFECT_UI_API_URL"].removesuffix("/api")
            print(f"\nPrefect: {address}   (Ctrl-C ends it)\n", flush=True)
        running.watch()
    finally:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)
        end(mark)
        lock.release()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after Ctrl-C or SIGTERM, 2 after one line `error: ...`."""
    args = parser().parse_args(arguments)
    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.default_int_handler)
    try:
        serve(args)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
