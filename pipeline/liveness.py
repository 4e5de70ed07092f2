"""Which flow runs still live: each holds a heartbeat, an observer judges it, and a lost run is started again.

A worker or a machine that dies tells nobody, so its flow runs would be Running for ever. `Beat` shows life in the run's
own artifact, `Watch` judges by it, `revive` puts the run back into its queue, where any worker takes it again: the same
run, counted once more. Whoever was lost by mistake sees that at its next beat and stops. `make serve` runs this file as
a program, for flow runs that no other flow run looks after.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import AwaitingRetry, Failed

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Between two beats, and between two looks at them."""
LOST_SECONDS = {StateType.RUNNING: 60.0, StateType.PENDING: 120.0}
"""Without a new beat or state: a flow that runs; one that a worker has taken, until it runs."""
UNHEARD_SECONDS = 600.0
"""For one that runs and has never beaten: killed in its first moment, or a flow without a heartbeat."""
GAP_SECONDS = 30.0
"""A longer pause between two looks: the server or the observer was away, and judges from new."""
SETTLE_SECONDS = 30.0
"""After a crash: a worker that gets a run again while it still cleans up after it dies (Prefect 3.8)."""
ATTEMPTS = 10
ANSWER_SECONDS = 20.0
KEY = "progress"

AWAY = (httpx.HTTPError, ObjectNotFound, ValueError)
"""What a client raises while the server or its data base is away, or answers nonsense while it comes up."""


def client() -> SyncPrefectClient:
    """A client that never waits and tries again by itself: whoever looks every few seconds does that."""
    return get_client(sync_client=True, httpx_settings={"timeout": ANSWER_SECONDS})


class Beat:
    """While it is entered, the flow run around it shows life, and its newest line of progress, in one artifact.

    `on_lost` is called once, from another thread, when the run has ended, is being cancelled, was deleted or was started
    again elsewhere: the flow then ends what it started. A server that is away changes nothing.
    """

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._text = "started"
        self._ended = threading.Event()
        self._artifact: UUID | None = None
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def say(self, text: str) -> None:
        """The newest line of progress; the next beat takes it along."""
        self._text = text

    def __enter__(self) -> Self:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            raise RuntimeError("a Beat is of a flow run: enter it inside a flow")
        # From the context, not asked for: by the first answer it may have been started again.
        self._id, self._count = context.flow_run.id, context.flow_run.run_count
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()  # not joined: it may be waiting for a server that is away

    def _run(self) -> None:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), client() as api:
            while True:
                try:
                    self._beat(api)
                    mine = self._mine(api)
                except AWAY as error:
                    log.debug("no beat: %s", error)
                    mine = True
                if not mine and not self._ended.is_set():
                    self._on_lost()
                    return
                if self._ended.wait(BEAT_SECONDS):
                    return

    def _beat(self, api: SyncPrefectClient) -> None:
        # By bare requests: the client's own methods also send an event, for good, with each beat.
        text = f"{self._text}\n\n{datetime.now():%H:%M:%S}, attempt {self._count}"
        if self._artifact is None:
            found = _artifacts(
                api, [self._id]
            )  # an earlier attempt's, or one whose answer was lost
            self._artifact = next(iter(found), None)
        if self._artifact is None:
            new = {"type": "markdown", "key": KEY, "data": text, "flow_run_id": str(self._id)}
            made = api.request("POST", "/artifacts/", json=new)
            self._artifact = UUID(made.json()["id"])
            return
        path = {"id": self._artifact}
        try:
            api.request("PATCH", "/artifacts/{id}", json={"data": text}, path_params=path)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                self._artifact = None  # someone deleted it: the next beat makes another
            raise

    def _mine(self, api: SyncPrefectClient) -> bool:
        """Whether this process is still the one that runs it."""
        try:
            run = api.read_flow_run(self._id)
        except ObjectNotFound:
            return False
        return run.state_type == StateType.RUNNING and run.run_count == self._count


def _artifacts(api: SyncPrefectClient, runs: Sequence[UUID]) -> dict[UUID, tuple[UUID, str]]:
    """The artifacts with progress of `runs`: flow run and text, by their own ids."""
    which = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=list(runs)), key=ArtifactFilterKey(any_=[KEY])
    )
    found = api.read_artifacts(artifact_filter=which) if runs else []
    return {one.id: (one.flow_run_id, str(one.data)) for one in found if one.flow_run_id}


def beats(api: SyncPrefectClient, runs: Iterable[FlowRun]) -> dict[UUID, str]:
    """The newest beat of each of `runs` that has beaten, by its id: another text with every beat."""
    result: dict[UUID, str] = {}
    for run, text in _artifacts(api, [run.id for run in runs]).values():
        result[run] = result.get(run, "") + text  # two, if an answer was lost: either shows life
    return result


@dataclass(frozen=True)
class _Look:
    shown: Hashable
    since: float
    at: float


class Watch:
    """An observer's judgement, by its own looks and its own clock. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks: dict[UUID, _Look] = {}

    def look(self, run: FlowRun, beat: str | None) -> bool:
        """Whether `run` is lost. To be called with what the server just answered, some seconds apart, and not when it
        did not answer: a pause of more than GAP_SECONDS starts the count again."""
        now = self._clock()
        self._looks = {
            key: look for key, look in self._looks.items() if now - look.at <= GAP_SECONDS
        }
        limit = LOST_SECONDS.get(run.state_type) if run.state_type else None
        if limit is None:
            self._looks.pop(run.id, None)
            return False
        if run.state_type == StateType.RUNNING and beat is None:
            limit = UNHEARD_SECONDS
        shown = (run.run_count, run.state and run.state.id, beat)
        before = self._looks.get(run.id)
        since = now if before is None or before.shown != shown else before.since
        self._looks[run.id] = _Look(shown, since, now)
        return now - since >= limit


def revive(api: SyncPrefectClient, run: FlowRun, why: str) -> bool:
    """Put a lost or crashed `run` back into its queue, unless it has moved on since it was read. False: after ATTEMPTS
    attempts it was set to Failed instead."""
    now = api.read_flow_run(run.id)
    if now.state is None or run.state is None or now.state.id != run.state.id:
        return True
    # One that never came to run is not counted by run_count.
    put_back = [
        state for state in api.read_flow_run_states(run.id) if state.name == "AwaitingRetry"
    ]
    attempts = max(now.run_count, 1 + len(put_back))
    if attempts < ATTEMPTS:
        message = f"attempt {attempts} of {ATTEMPTS} is lost: {why}"
        again = now.state.timestamp + timedelta(seconds=SETTLE_SECONDS * now.state.is_crashed())
        state: State[Any] = AwaitingRetry(message=message, scheduled_time=again)
        api.set_flow_run_state(run.id, state, force=True)
        return True
    message = f"error: attempt {attempts} of {ATTEMPTS} is lost too: {why}; the logs of the run may say more"
    api.set_flow_run_state(run.id, Failed(message=message), force=True)
    return False


def why_lost(run: FlowRun) -> str:
    """One line: what is known of the end of a lost or crashed run."""
    if run.state_type == StateType.CRASHED:
        said = run.state.message if run.state else None
        return " ".join((said or "crashed").split())
    if run.state_type == StateType.PENDING:
        return "its worker took it and did not start it"
    return "its process shows no life"


# The janitor: flow runs of deployments that no other flow run has started.

_STATES = [StateType.RUNNING, StateType.PENDING, StateType.CRASHED]


def tend(api: SyncPrefectClient, watch: Watch, pools: Sequence[str]) -> Iterator[str]:
    """One look at all of them in the work pools `pools`; a line for each that was revived or given up."""
    runs = api.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_STATES)),
            parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True),
        ),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=list(pools))),
    )
    known = beats(api, runs)
    for run in runs:
        lost = watch.look(run, known.get(run.id))
        if lost or run.state_type == StateType.CRASHED:
            why = why_lost(run)
            what = "is started again" if revive(api, run, why) else "is not started again"
            yield f"flow run {run.name} {what}: {why}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Looks until it is stopped."""
    parser = argparse.ArgumentParser(description="Starts lost flow runs again.")
    parser.add_argument("pools", nargs="+", help="work pools whose flow runs are looked after")
    pools = parser.parse_args(arguments).pools
    watch = Watch()
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), client() as api:
        while True:
            try:
                for line in tend(api, watch, pools):
                    print(line, flush=True)
            except AWAY as error:
                log.debug("no look: %s", error)
            time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
