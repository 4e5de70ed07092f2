"""What is lost and what is not by an injected clock; and a real server, whose flow runs, workers and self are killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import AwaitingRetry, Crashed, State

from modip.errors import UserError
from pipeline import serve
from pipeline.liveness import (
    ATTEMPTS,
    GAP_SECONDS,
    LOST_SECONDS,
    UNHEARD_SECONDS,
    Watch,
    beats,
    revive,
)
from tests.helpers import ROOT
from tests.web import free_ports

# Judging: no server.


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _run(kind: StateType, run_count: int = 1) -> FlowRun:
    state = State[Any](type=kind, id=uuid4())
    return FlowRun(flow_id=uuid4(), state=state, state_type=kind, run_count=run_count)


def _until_lost(watch: Watch, clock: Clock, run: FlowRun, beat: str | None) -> float:
    """Seconds of looks every ten until it is lost; infinity where it never is."""
    start = clock.now
    while clock.now - start < 2 * UNHEARD_SECONDS:
        if watch.look(run, beat):
            return clock.now - start
        clock.now += 10
    return float("inf")


def test_a_run_without_a_beat_is_lost_after_its_time() -> None:
    clock = Clock()
    running, pending = _run(StateType.RUNNING), _run(StateType.PENDING, 0)
    assert _until_lost(Watch(clock), clock, running, "a") == LOST_SECONDS[StateType.RUNNING]
    assert _until_lost(Watch(clock), clock, running, None) == UNHEARD_SECONDS
    assert _until_lost(Watch(clock), clock, pending, None) == LOST_SECONDS[StateType.PENDING]
    for kind in set(StateType) - set(LOST_SECONDS):
        assert _until_lost(Watch(clock), clock, _run(kind), "a") == float("inf")


def test_a_beat_or_a_state_starts_the_count_again() -> None:
    clock = Clock()
    watch, run = Watch(clock), _run(StateType.RUNNING)
    for i in range(100):
        assert not watch.look(run, f"beat {i // 5}")  # one beat in five looks
        clock.now += 10
    assert not watch.look(run.model_copy(update={"run_count": 2}), "beat 19")
    clock.now += 10
    other = run.model_copy(update={"state": State[Any](type=StateType.RUNNING, id=uuid4())})
    assert not watch.look(other, "beat 19")
    assert _until_lost(watch, clock, other, "beat 19") == 60


def test_a_pause_between_looks_is_nobodys_death() -> None:
    clock = Clock()
    watch, run = Watch(clock), _run(StateType.RUNNING)
    for _ in range(20):  # the server answers for 50 s, and is away for longer than the gap
        for _ in range(6):
            assert not watch.look(run, "a")
            clock.now += 10
        clock.now += GAP_SECONDS - 10 + 1
    assert _until_lost(watch, clock, run, "a") == 60


def test_places(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert serve.places(tmp_path, 3, 1)["cpu"] == 3
    assert serve.places(tmp_path, 0, 1)["cpu"] == len(os.sched_getaffinity(0))
    for slots, per_gpu, said in ((-1, 1, "--cpu-slots -1"), (0, 0, "--per-gpu 0")):
        with pytest.raises(UserError, match=said):
            serve.places(tmp_path, slots, per_gpu)


def test_only_one_in_a_clone(tmp_path: Path) -> None:
    lock = serve.only_one(tmp_path, "serve")
    serve.only_one(tmp_path, "worker").release()
    with pytest.raises(UserError, match="runs in .* already"):
        serve.only_one(tmp_path, "serve")
    lock.release()
    serve.only_one(tmp_path, "serve").release()


def test_a_taken_port_is_named() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be had"):
            serve.check_free("127.0.0.1", port)


def test_who_dies_is_started_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    running = serve.Processes({**os.environ})
    running.start("it", "timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)", asks=False)
    (one,) = running._children
    for i in range(1, serve.DEATHS):
        clock.now += 100
        one.process.kill()
        one.process.wait()
        running._died(one)
        assert one.due == clock.now + 2**i
        one.process = running._popen(one.command)
    one.process.kill()
    one.process.wait()
    with pytest.raises(UserError, match="it was killed by signal 9, 5 times in 10 minutes"):
        running._died(one)
    running.start("typo", "timeit", "-n", "1", "no such", asks=False)
    typo = running._children[1]
    typo.process.wait()
    with pytest.raises(UserError, match="typo ended with status 1 as soon as it was started"):
        running._died(typo)
    clock.now += serve.EARLY_SECONDS
    running._died(typo)
    assert typo.due == clock.now + 2


# The real thing, with a flow that sleeps.

FLOW = """
import os
import time
from pathlib import Path

from prefect import flow

from pipeline.liveness import Beat


@flow(persist_result=False)
def nap(seconds: float, name: str) -> None:
    file = Path(name)

    def say(what: str) -> None:
        with file.open("a") as out:
            print(what, os.getpid(), file=out)

    def lost() -> None:
        say("lost")
        os._exit(3)

    with Beat(lost) as beat:
        say("start")
        beat.say("asleep")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.1)
        say("end")
"""

DEPLOYMENT = """
name: nap
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: "{{ $MODIP_ROOT }}"
deployments:
  - name: nap
    entrypoint: nap.py:nap
    work_pool: {name: cpu, work_queue_name: default, job_variables: {}}
"""


class Served:
    """`python -m pipeline.serve` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "nap.py").write_text(FLOW)
        (folder / "prefect.yaml").write_text(DEPLOYMENT)
        shutil.copy(ROOT / "params.yaml", folder)
        self.port = free_ports()
        self.api = SyncPrefectClient(f"http://127.0.0.1:{self.port}/api")
        self.log = folder / "serve.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            out.truncate(0)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.serve", "--port", str(self.port), "--cpu-slots", "2"],
                cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out,
            )  # fmt: skip
        self.wait(lambda: "Prefect: http" in self.log.read_text())

    def wait(self, done: Callable[[], Any], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < end, self.log.read_text()[-5000:]
            time.sleep(0.2)

    def mine(self, what: str) -> list[psutil.Process]:
        """What it has started, by a word of the command line."""
        found = serve.marked(f"serve {self.folder}")
        return [one for one in found if what in one.cmdline()]

    def nap(self, seconds: float, name: str) -> FlowRun:
        """A flow run that has begun."""
        found = self.api.read_deployment_by_name("nap/nap")
        run = self.api.create_flow_run_from_deployment(
            found.id, parameters={"seconds": seconds, "name": name}
        )
        self.wait(lambda: self.said(name))
        return self.api.read_flow_run(run.id)

    def said(self, name: str) -> list[str]:
        file = self.folder / name
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []

    def state(self, run: FlowRun) -> StateType | None:
        return self.api.read_flow_run(run.id).state_type


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("liveness"))
    yield made
    made.process.terminate()
    assert made.process.wait(90) == 0, made.log.read_text()[-3000:]
    assert serve.marked(f"serve {made.folder}") == []


@pytest.mark.e2e
def test_kills_are_survived(served: Served) -> None:
    long, short = served.nap(600, "long"), served.nap(600, "short")
    served.wait(lambda: {long.id, short.id} <= beats(served.api, [long, short]).keys())
    # The worker and one of its flow runs die at once: nobody reports it. It is set back, and a new worker takes it.
    pids = [int(line.split()[1]) for line in (served.folder / "short").read_text().splitlines()]
    workers = [one for one in served.mine("worker") if "cpu" in one.cmdline()]
    for pid in (*(one.pid for one in workers), *pids):
        os.kill(pid, signal.SIGKILL)
    assert served.state(short) == StateType.RUNNING
    served.api.request("PATCH", f"/flow_runs/{short.id}", json={"parameters": {"seconds": 0, "name": "short"}})  # fmt: skip
    assert revive(served.api, served.api.read_flow_run(short.id), "killed by the test")
    # The server dies, too.
    (server,) = served.mine("server")
    server.kill()
    served.wait(lambda: served.said("short") == ["start", "start", "end"])
    served.wait(lambda: served.state(short) == StateType.COMPLETED)
    assert served.api.read_flow_run(short.id).run_count == 2
    assert "was killed by signal 9: it is started again in 2 s" in served.log.read_text()
    # The other one has outlived its worker and the server, and still beats.
    before = beats(served.api, [long])[long.id]
    served.wait(lambda: beats(served.api, [long])[long.id] != before, 60)
    assert served.said("long") == ["start"]
    # All of it dies but what serve had started; the next one ends that, and goes on with the flow run.
    served.process.kill()
    served.process.wait()
    assert served.mine("server")
    old = {one.pid for one in served.mine("-m")}
    served.start()
    assert "ending what is left of an earlier start" in served.log.read_text()
    assert not old & {one.pid for one in served.mine("-m")}
    served.wait(lambda: served.said("long") == ["start", "start"])
    # Whoever was set back by mistake notices, and stops.
    later = datetime.now(UTC) + timedelta(hours=1)
    again: State[Any] = AwaitingRetry(scheduled_time=later, message="by mistake")
    served.api.set_flow_run_state(long.id, again, force=True)
    served.wait(lambda: "lost" in served.said("long"), 30)


@pytest.mark.e2e
def test_a_run_is_given_up_at_last(served: Served) -> None:
    @flow
    def none() -> None: ...

    run = served.api.create_flow_run(none)  # in no work pool, so nobody else looks after it
    revived = []
    for _ in range(ATTEMPTS):
        served.api.set_flow_run_state(run.id, Crashed(), force=True)
        assert revive(served.api, run, "read before it crashed")
        assert served.state(run) == StateType.CRASHED
        revived.append(revive(served.api, served.api.read_flow_run(run.id), "it crashed"))
    assert revived == [True] * (ATTEMPTS - 1) + [False]
    state = served.api.read_flow_run(run.id).state
    assert state is not None
    assert state.is_failed()
    assert state.message == (
        "error: attempt 10 of 10 is lost too: it crashed; the logs of the run may say more"
    )
