"""The stages as flows and tasks of Prefect: which run, in what order and whether they are up to date is DVC's to say.

`benchmark` and `finetune` make a worktree of their own (pipeline.workspace says why), read the stages and their graph
from DVC, take from DVC's cache and remote what any run has computed before, and get the data themselves: the files are
where the run was started. What trains or judges a cell is a job, a flow run of `stages`, which any worker of the pool
takes, on this machine or another; one that loses its worker goes to the next. Each stage is one task, `dvc repro
--single-item STAGE`. A failed stage takes only what needs it with it.

Where this flow was killed itself, it begins again: what is computed is restored, and its jobs' flow runs are found again
by their names.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Annotated, Any, TypeVar
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    WorkerFilter,
    WorkerFilterStatus,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.deployments import run_deployment
from prefect.flow_engine import run_flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Completed, Failed, Pending
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from pydantic import Field

from modip.config import Params, load, unknown
from modip.errors import UserError
from pipeline import liveness, slots, travel, workspace
from pipeline.exchange import Exchange
from pipeline.form import Cell, Limits, Matrix, Overrides
from pipeline.liveness import AWAY, Beat, Watch, beats, revive, why_lost
from pipeline.mirror import Mirror, jobs
from pipeline.slots import Lock, Place
from pipeline.workspace import CurableError, Job, Progress, Stage, StageError

POLL_SECONDS = 1.0
"""Between two looks at what has ended, and at who holds a place."""
JOB_SECONDS = 2.0
"""Between two looks at the jobs' flow runs."""
LINGER_SECONDS = 8.0
"""How long a process whose job has ended waits for the next: as long as it takes to see the end and hand out what follows."""
PAGE = 100
"""Flow runs asked for at once; the server gives at most 200."""

LIVING = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]

T = TypeVar("T")


# One stage.


def curable(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry may succeed."""
    return isinstance(state.result(raise_on_failure=False), CurableError)


@dataclass(frozen=True)
class Here:
    """Where a flow run works: its clone, its worktree of the run `name`, and what it says as it goes."""

    root: Path
    folder: Path
    name: str
    exchange: Exchange
    limits: Limits
    beat: Beat

    @property
    def locks(self) -> Path:
        """Of this machine: on places, and on stages."""
        return self.root / workspace.HOME / "locks"

    def path(self, what: str) -> str:
        """The name of something of this run in the exchange."""
        return f"runs/{self.name}/{what}"


@task(
    task_run_name="{stage.name}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_condition_fn=curable,
)
def run_stage(stage: Stage, here: Here, place: Place) -> None:
    """One stage by DVC. Raises StageError with what it said last; CurableError is tried again."""
    logger = get_run_logger()
    logger.info("%s on %s, %s", stage.name, socket.gethostname(), place.name)

    def say(line: str) -> None:
        logger.info("%s", line)
        here.beat.say(f"{stage.name}: {line}")

    # Weights & Biases' files are for later: they belong into the clone.
    env = {**place.env, "WANDB_DIR": os.environ.get("WANDB_DIR", str(here.root))}
    minutes = here.limits.minutes_by_stage.get(stage.kind, here.limits.minutes)
    try:
        key = here.name if stage.gathers else travel.key(here.folder, stage.name)
        states = here.folder / "scratch"
        with (
            _alone(here, f"{stage.kind}-{key}", say),
            Mirror(here.exchange, f"states/{key}", states, jobs(stage), here.limits.mirror_seconds, say),
        ):  # fmt: skip
            workspace.repro(stage, here.folder, env, say, 60 * minutes)
            if here.exchange.shared:
                travel.give(here.folder, stage.name)
    except StageError as error:
        logger.error("%s: %s", stage.name, error)
        raise


@contextmanager
def _alone(here: Here, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """No other run on this machine is at the same stage with the same inputs: it would write the same states."""
    path = here.locks / f"{name}.lock"
    lock = slots.try_lock(path)
    if lock is None:
        say("waits for another run, which computes the same")
    while lock is None:
        time.sleep(POLL_SECONDS)
        lock = slots.try_lock(path)
    try:
        yield
    finally:
        lock.release()


def attempts(limits: Limits) -> dict[str, Any]:
    """Options of a task: how often it is tried again."""
    return {
        "retries": limits.retries,
        "retry_delay_seconds": exponential_backoff(limits.retry_seconds),
        "retry_jitter_factor": 0.3,
    }


def patiently(limits: Limits, action: Callable[[], T]) -> T:
    """The same for what is no task."""
    for wait in exponential_backoff(limits.retry_seconds)(limits.retries):
        try:
            return action()
        except CurableError as error:
            get_run_logger().warning("%s; trying again in %.0f s", error, wait)
            time.sleep(wait)
    return action()


# The graph.


class Fleet:
    """The flow runs of the jobs, wherever they run."""

    def __init__(self, client: SyncPrefectClient, here: Here, cuda: bool) -> None:
        self._client, self._here = client, here
        self._pool = "gpu" if cuda else "cpu"
        self._jobs: dict[UUID, Job] = {}
        self._watch, self._looked = Watch(), 0.0
        online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE.value]))
        if not client.read_workers_for_work_pool(self._pool, worker_filter=online):
            get_run_logger().warning(
                "no worker of the pool %s is there: jobs wait for one (make serve or make worker, on a machine with a GPU "
                "for the pool gpu)",
                self._pool,
            )

    def submit(self, job: Job, names: Sequence[str], done: set[str]) -> None:
        """Hand a job out, or find the flow run that an earlier life of this one made for it."""
        here = self._here
        lock = here.path(f"{job.key}.lock")
        if here.exchange.read(lock) is None:
            # A lock that the user keeps in git may hold entries of other values: only of what is done here.
            known = {one: found for one, found in travel.own(here.folder).items() if one in done}
            here.exchange.write(lock, travel.text(known).encode())
        run = run_deployment(
            f"stages/{self._pool}",
            parameters={
                "run": here.name,
                "job": job.key,
                "names": list(names),
                "limits": here.limits.model_dump(),
            },
            flow_run_name=job.name.partition("@")[2],
            tags=[_tag(here.name), *job.stages[-1].tags[1:]],
            idempotency_key=f"{here.name}/{job.key}",
            timeout=0,
        )
        assert isinstance(run, FlowRun)
        if run.state is not None and run.state.is_final() and not run.state.is_completed():
            revive(self._client, run, "the matrix was started again")
        self._jobs[run.id] = job

    def ended(self) -> list[tuple[Job, State[Any]]]:
        """Jobs that have come to their end since the last look; lost ones start again."""
        if not self._jobs or time.monotonic() < self._looked + JOB_SECONDS:
            return []
        try:
            return self._look()
        except AWAY:  # its heartbeats and ours go on when it is back
            return []
        finally:
            self._looked = time.monotonic()

    def _look(self) -> list[tuple[Job, State[Any]]]:
        found, wanted = [], list(self._jobs)
        for i in range(0, len(wanted), PAGE):
            which = FlowRunFilter(id=FlowRunFilterId(any_=wanted[i : i + PAGE]))
            runs = self._client.read_flow_runs(flow_run_filter=which)
            known = beats(self._client, runs)
            for run in runs:
                if self._watch.look(run, known.get(run.id)) or run.state_type == StateType.CRASHED:
                    get_run_logger().warning("%s: %s", run.name, why_lost(run))
                    revive(self._client, run, why_lost(run))
                elif run.state is not None and run.state.is_final():
                    found.append((self._jobs.pop(run.id), run.state))
        return found


def _tag(name: str) -> str:
    """What the jobs' flow runs of the run `name` are found by."""
    return f"run:{name}"


def _cancel_jobs(identifier: UUID, name: str) -> None:
    """Those of the flow run `identifier`, if it was cancelled itself."""
    with suppress(*AWAY), liveness.client() as api:
        if api.read_flow_run(identifier).state_type not in (
            StateType.CANCELLING,
            StateType.CANCELLED,
        ):
            return
        which = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[_tag(name)]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=LIVING)),
        )
        while runs := api.read_flow_runs(flow_run_filter=which):
            for run in runs:
                api.set_flow_run_state(run.id, Cancelling())


def _leave() -> None:
    """End this process and what it started, and say nothing: its flow run was cancelled, or runs elsewhere by now."""
    workspace.stop_all()
    os._exit(0)  # another status would be reported as a crash


def _leave_job(identifier: UUID) -> None:
    """The same; its worker may know only of the job that this process began with, and not see it cancelled."""
    with suppress(*AWAY), liveness.client() as api:
        if api.read_flow_run(identifier).state_type == StateType.CANCELLING:
            api.set_flow_run_state(identifier, Cancelled(), force=True)
    _leave()


def run_graph(client: SyncPrefectClient, here: Here, params: Params) -> Progress:
    """Every stage of the worktree: data and report here, the rest as jobs."""
    logger, limits = get_run_logger(), here.limits
    found = workspace.stages(here.folder)
    kinds = tuple(dict.fromkeys(stage.kind for stage in found.values()))
    for kind in limits.minutes_by_stage:
        if kind not in kinds:
            raise UserError(unknown("limits.minutes_by_stage:", kind, kinds))
    runtime = next(iter(params.cells.values())).runtime
    progress, tried = Progress(dict(found)), set[str]()
    todo = workspace.jobs(found)
    fleet = Fleet(client, here, runtime.device.startswith("cuda"))
    local: dict[str, tuple[PrefectFuture[Any], Lock]] = {}
    places = slots.cpu_places(runtime.threads, 0, "data")
    logger.info("%d stages, %d jobs", len(found), len(todo))
    while progress.waiting or progress.running:
        _restore(here, progress, tried)
        for stage in progress.ready():
            if not stage.trains and (held := slots.try_place(here.locks, places)):
                one = run_stage.with_options(tags=stage.tags, **attempts(limits))
                local[stage.name] = (one.submit(stage, here, held[0]), held[1])
                progress.start(stage.name)
        for job in todo:
            names = [stage.name for stage in job.stages if stage.name in progress.waiting]
            if names and job.needs <= progress.done:
                patiently(limits, partial(fleet.submit, job, names, progress.done))
                for name in names:
                    progress.start(name)
        if not progress.running and not progress.ready():
            break  # nothing that gathers has anything to gather
        time.sleep(POLL_SECONDS)
        for name, (future, lock) in list(local.items()):
            if future.state.is_final():
                del local[name]
                lock.release()
                state = future.state
                progress.end(name, None if state.is_completed() else fault(state))
        for job, state in fleet.ended():
            entries = patiently(limits, partial(_take, here, job))
            progress.end_job(job, entries, fault(state))
        here.beat.say(
            f"{len(progress.done)} of {len(found)} stages; running: {', '.join(sorted(progress.running))}"
        )
    return progress


def _restore(here: Here, progress: Progress, tried: set[str]) -> None:
    """What any run has computed from the same inputs. Each is tried once, when all it needs is there."""
    known = set(progress.done)
    wanted = []
    for name, stage in progress.waiting.items():
        if name not in tried and not stage.gathers and stage.needs <= known:
            wanted.append(name)
            known.add(name)
    if not wanted:
        return
    restored = patiently(
        here.limits, lambda: travel.restore(here.folder, wanted, here.exchange.shared)
    )
    for name in restored:
        progress.end(name, None)
    tried |= {name for name in wanted if name in {stage.name for stage in progress.ready()}}
    if restored:
        get_run_logger().info("restored: %s", ", ".join(restored))


def _take(here: Here, job: Job) -> travel.Entries:
    """What a job that has ended left, into this worktree: {stage: its entry of dvc.lock}."""
    text = here.exchange.read(here.path(f"{job.key}.lock")) or b""
    known = travel.entries(text.decode())
    found = {stage.name: known[stage.name] for stage in job.stages if stage.name in known}
    travel.take(here.folder, found, found, here.exchange.shared)
    return found


def fault(state: State[Any]) -> str:
    """One line: what a final state says of its stage."""
    text = " ".join((state.message or state.name or "failed").split())
    return re.sub(r"^.*?\b(?:StageError|CurableError|UserError): ", "", text)


# The flows.


def _guarded(body: Callable[[], State[Any]]) -> State[Any]:
    """The final state of a flow: bad input and a fault that stays are one line of it."""
    try:
        return body()
    except UserError as error:
        return Failed(message="error: " + " ".join(str(error).split()))
    except StageError as error:
        return Failed(message=str(error))
    except BaseException:  # cancelled: Prefect waits for the tasks, and they for their children
        workspace.stop_all()
        raise


def run(
    choice: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any], limits: Limits
) -> State[Any]:
    """The final state of the cells of `choice` with `overrides`."""
    return _guarded(lambda: _run(choice, overrides, limits))


def _run(
    choice: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any], limits: Limits
) -> State[Any]:
    logger = get_run_logger()
    root, identifier = Path.cwd(), UUID(str(flow_run.id))
    name = f"{flow_run.name}-{str(identifier)[:8]}"
    if not workspace.has_branch(root, name):
        tree, _ = workspace.choose(root / workspace.PARAMS, choice, overrides)
        workspace.create(root, name, workspace.text_of(tree))
    folder = root / workspace.HOME / "runs" / name
    workspace.enter(root, name, folder)
    params = load(folder / workspace.PARAMS)
    logger.info("parameters: branch %s%s, worktree %s", workspace.BRANCH, name, folder)
    exchange = Exchange.open(root)

    def lost() -> None:
        _cancel_jobs(identifier, name)
        _leave()

    with liveness.client() as api, Beat(lost) as beat:
        here = Here(root, folder, name, exchange, limits, beat)
        bundle = workspace.bundle(root, name)
        patiently(limits, lambda: exchange.write(here.path("bundle"), bundle))
        try:
            progress = run_graph(api, here, params)
        except BaseException:
            _cancel_jobs(identifier, name)
            raise
    text = progress.summary()
    workspace.commit(root, folder, name, text)
    try:
        publish(root, folder, name)
    except AWAY as error:  # everything is computed and committed: not a reason to fail
        logger.warning("the report's artifacts are not complete, the server is away: %s", error)
    logger.info("%s; git checkout %s%s && dvc checkout", text, workspace.BRANCH, name)
    if progress.failed:
        return Failed(message=text)
    workspace.remove(root, folder)
    patiently(limits, lambda: exchange.remove(f"runs/{name}"))
    return Completed(message=text)


def publish(root: Path, folder: Path, name: str) -> None:
    """The report as artifacts of the flow run: its table, its curves, and where its page lies."""
    source, target = folder / "report", root / workspace.HOME / "reports" / name
    if not (source / "index.html").is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    found = json.loads((target / "summary.json").read_text())
    rows = [
        {name: round(one, 3) if isinstance(one, float) else one for name, one in row.items()}
        for row in found
    ]
    create_table_artifact(rows, key="report", description="Every policy of every cell")
    page = target / "index.html"
    served = os.environ.get("MODIP_REPORTS_URL")
    if served:
        create_link_artifact(
            f"{served}/{name}/index.html", "the report, with curves and videos", key="report-page"
        )
    create_markdown_artifact(
        f"The report, one file with curves and videos: `{page}`\n\nParameters and results: "
        f"`git checkout {workspace.BRANCH}{name} && dvc checkout`",
        key="report-files",
    )
    for picture in sorted((target / "plots").glob("*_env_steps.png")):
        uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        key = "".join(c if c.isalnum() else "-" for c in picture.stem.lower())
        create_image_artifact(uri, key=key, description=picture.stem.replace("_", " "))


RUNNER: Any = ThreadPoolTaskRunner(max_workers=256)  # places, not threads, decide how many run


@flow(task_runner=RUNNER, persist_result=False)
def benchmark(matrix: Matrix, overrides: Overrides, limits: Limits) -> State[Any]:
    """Every data set with every agent and seed, from the data to the report.

    Args:
        matrix: the cells to run
        overrides: other values than in params.yaml, by dotted name, checked before anything runs: {"modip.base.env_steps": 4000, "modip.by_dataset.toy.keep": 0.5, "runtime.device": "cuda"}
        limits: for how long, how often again
    """
    return run(matrix.model_dump(), overrides, limits)


@flow(task_runner=RUNNER, persist_result=False)
def finetune(cell: Cell, overrides: Overrides, limits: Limits) -> State[Any]:
    """One data set, agent and seed, from the data to the report.

    Args:
        cell: the cell to run
        overrides: other values than in params.yaml, by dotted name, checked before anything runs: {"modip.base.env_steps": 4000, "modip.by_dataset.toy.keep": 0.5, "runtime.device": "cuda"}
        limits: for how long, how often again
    """
    return run({name: [value] for name, value in cell.model_dump().items()}, overrides, limits)


def _go_on(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """When a job has ended: the next ones of its pool, in this process. To start another costs seconds."""
    if _going_on.is_set():
        return
    _going_on.set()
    with suppress(*AWAY), liveness.client() as api:
        for run in _following(api, flow_run):
            Context().run(run_flow, stages, flow_run=run)  # nothing of the first one's context


_going_on = Event()


def _following(api: SyncPrefectClient, after: FlowRun) -> Iterator[FlowRun]:
    """Flow runs whose turn it is in the pool of `after`, taken as a worker takes them. Until nothing comes for a while,
    or it is the turn of another flow."""
    pool = after.work_pool_name or ""
    waiting = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    end = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < end and not api.read_work_pool(pool).is_paused:
        found = api.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=waiting),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
            limit=1,
        )
        if found and found[0].deployment_id != after.deployment_id:
            return
        # Refused where another was faster, or its time has not come.
        if found and api.set_flow_run_state(found[0].id, Pending()).status == SetStateStatus.ACCEPT:
            yield api.read_flow_run(found[0].id)
            end = time.monotonic() + LINGER_SECONDS
        else:
            time.sleep(POLL_SECONDS)


@flow(persist_result=False, on_completion=[_go_on], on_failure=[_go_on])
def stages(run: str, job: str, names: list[str], limits: Limits) -> State[Any]:
    """Some stages of one cell, on whichever worker takes them; `benchmark` and `finetune` ask for it.

    Args:
        run: the run they belong to
        job: the last of them, as a file's name
        names: the stages
        limits: for how long, how often again
    """
    return _guarded(lambda: _stages(run, job, names, limits))


def _stages(run: str, job: str, names: Sequence[str], limits: Limits) -> State[Any]:
    root = Path.cwd()
    folder = root / workspace.HOME / "runs" / f"{run}.{job}"
    identifier = UUID(str(flow_run.id))
    with Beat(lambda: _leave_job(identifier)) as beat:
        here = Here(root, folder, run, Exchange.open(root), limits, beat)
        try:
            params, found, known = patiently(limits, lambda: _prepare(here, job, names))
            with _place(here, params, beat) as place:
                for stage in found:
                    if stage.name not in known:
                        _run_one(stage, here, place)
                        known[stage.name] = travel.own(folder)[stage.name]
                        patiently(limits, lambda: _tell(here, job, known))
        finally:
            if folder.exists():  # not where the run itself could not be had
                workspace.remove(root, folder)
    return Completed(message=f"{len(names)} stages up to date")


def _prepare(
    here: Here, job: str, names: Sequence[str]
) -> tuple[Params, list[Stage], travel.Entries]:
    """The worktree with all that the stages need: its parameters, the stages, and what is known of them."""
    name, exchange = here.name, here.exchange
    if not workspace.has_branch(here.root, name):
        found = exchange.read(here.path("bundle"))
        if found is None:
            raise UserError(
                f"{socket.gethostname()}:{here.root}: no run {name} here nor in DVC's remote; set one that the clones of "
                "all workers share (dvc remote add --default NAME URL)"
            )
        workspace.unbundle(here.root, name, found)
    workspace.enter(here.root, name, here.folder)
    stages = workspace.stages(here.folder)
    own = [stages[one] for one in names]
    known = travel.entries((exchange.read(here.path(f"{job}.lock")) or b"").decode())
    needed = set().union(*(stage.needs for stage in own)) - (set(names) - known.keys())
    wanted = [one for one in stages if one in needed or (one in known and one in names)]
    travel.take(here.folder, known, wanted, exchange.shared)
    return load(here.folder / workspace.PARAMS), own, known


def _tell(here: Here, job: str, known: travel.Entries) -> None:
    """Whoever waits for the job, or goes on with it, what is done."""
    here.exchange.write(here.path(f"{job}.lock"), travel.text(known).encode())


def _run_one(stage: Stage, here: Here, place: Place) -> None:
    """One stage, as a task. Raises StageError."""
    one = run_stage.with_options(tags=stage.tags, **attempts(here.limits))

    def run() -> State[Any]:
        try:
            return one(stage, here, place, return_state=True)
        except ConcurrencySlotAcquisitionError as error:
            # Prefect asks the server for a slot of each tag, and a task that it cannot ask for is not tried again.
            raise CurableError(str(error)) from error

    state = patiently(here.limits, run)
    if not state.is_completed():
        raise StageError(fault(state))


@contextmanager
def _place(here: Here, params: Params, beat: Beat) -> Iterator[Place]:
    """A GPU's place or a CPU's, of those that this worker hands out. Raises UserError where the GPU is not there."""
    runtime = next(iter(params.cells.values())).runtime
    if runtime.device.startswith("cuda"):
        per_gpu = int(os.environ.get("MODIP_PER_GPU", "1"))
        places = slots.gpu_places(runtime.device, slots.gpus(os.environ), per_gpu)
    else:
        places = slots.cpu_places(runtime.threads, int(os.environ.get("MODIP_CPU_SLOTS", "0")), "cpu")  # fmt: skip
    while (held := slots.try_place(here.locks, places)) is None:
        beat.say("waits for a place on this machine")
        time.sleep(POLL_SECONDS)
    try:
        yield held[0]
    finally:
        held[1].release()


@flow(persist_result=False)
def tune(
    workers: Annotated[int, Field(ge=1)] = 1, minutes: Annotated[float, Field(gt=0)] = 1440.0
) -> State[Any]:
    """The study that the section `tune` of params.yaml describes; run again, it goes on.

    Args:
        workers: trials side by side on this machine
        minutes: timeout
    """
    return _guarded(lambda: _tune(workers, minutes))


def _tune(workers: int, minutes: float) -> State[Any]:
    root, logger = Path.cwd(), get_run_logger()
    command = ["pipeline.tune", "--workers", str(workers)]
    with Beat(_leave) as beat:

        def say(line: str) -> None:
            logger.info("%s", line)
            beat.say(line)

        workspace.program(root, command, {}, say, 60 * minutes)
    record = json.loads((root / "report" / "study.json").read_text())
    rows = [{**row, "params": json.dumps(row["params"])} for row in record["trials"]]
    create_table_artifact(rows, key="study", description="Every trial")
    page = root / "report" / "study.html"
    create_markdown_artifact(
        f"{record['verdict']}\n\nThe study, one file: `{page}`. `python -m pipeline.tune --apply` writes the winner into "
        "params.yaml.",
        key="study-files",
    )
    return Completed(message=record["verdict"])
