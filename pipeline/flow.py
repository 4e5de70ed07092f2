"""The stages as tasks of Prefect: which run, in what order and whether they are up to date is DVC's to say.

A flow run makes a worktree of its own (pipeline.workspace says why), reads the stages and their graph from DVC, and
runs each as one task, `dvc repro --single-item STAGE`, as soon as what it needs is done and a place is free
(pipeline.slots). A failed stage takes only what needs it with it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler

from modip.agents import AGENTS
from modip.config import Params, load, unknown
from modip.errors import UserError
from pipeline import slots, workspace
from pipeline.slots import Lock, Place
from pipeline.workspace import CurableError, Stage, StageError

POLL_SECONDS = 0.5
"""Between two looks at who holds a place."""


# What a user fills in.


@dataclass(frozen=True)
class OneOf:
    """Known names: a choice in Prefect's form, asked for when the form is made, checked when a run starts."""

    what: str
    known: Callable[[], Sequence[str]]

    def check(self, value: str) -> str:
        known = tuple(self.known())
        if value not in known:
            raise ValueError(unknown(self.what, value, known))
        return value

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(core), "enum": list(self.known())}


def _datasets() -> Sequence[str]:
    return tuple(load(workspace.PARAMS).data)


DATASET = OneOf("data set", _datasets)
AGENT = OneOf("agent", lambda: AGENTS)
Dataset = Annotated[str, AfterValidator(DATASET.check), DATASET]
Agent = Annotated[str, AfterValidator(AGENT.check), AGENT]
Seed = Annotated[int, Field(ge=0, le=2_000)]
Value = bool | int | float | str | list[Any] | dict[str, Any]
Overrides = dict[str, Value]


class Form(BaseModel):
    """A part of the form; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Where nothing is said, params.yaml as it stands when a run starts; the form shows it as it stood when it was made.


def _all(name: str) -> Callable[[], Any]:
    return lambda: list(getattr(load(workspace.PARAMS), name))


def _first(name: str) -> Callable[[], Any]:
    return lambda: getattr(load(workspace.PARAMS), name)[0]


def _show(default: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda schema: schema.update(default=default())


class Matrix(Form):
    """The cells: every data set with every agent and every seed."""

    dataset: list[Dataset] = Field(
        default_factory=_all("dataset"),
        json_schema_extra=_show(_all("dataset")),
        min_length=1,
        description="data sets, ids of params.yaml",
    )
    agent: list[Agent] = Field(
        default_factory=_all("agent"),
        json_schema_extra=_show(_all("agent")),
        min_length=1,
        description="agents; bc is the control",
    )
    seed: list[Seed] = Field(
        default_factory=_all("seed"),
        json_schema_extra=_show(_all("seed")),
        min_length=1,
        description="seeds",
    )


class Cell(Form):
    """One cell."""

    dataset: Dataset = Field(
        default_factory=_first("dataset"),
        json_schema_extra=_show(_first("dataset")),
        description="data set, an id of params.yaml",
    )
    agent: Agent = Field(
        default_factory=_first("agent"),
        json_schema_extra=_show(_first("agent")),
        description="agent; bc is the control",
    )
    seed: Seed = Field(
        default_factory=_first("seed"),
        json_schema_extra=_show(_first("seed")),
        description="seed of everything random",
    )


class Limits(Form):
    """How many stages run at once on the worker's machine, for how long, and how often a fault is met again."""

    cpu_slots: int = Field(
        default=0, ge=0, description="stages at once on CPUs; 0: cores divided by runtime.threads"
    )
    per_gpu: int = Field(default=1, ge=1, description="stages at once on one GPU")
    minutes: float = Field(default=1440.0, gt=0, description="timeout of a stage, in minutes")
    minutes_by_stage: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description='other timeouts, by stage: {"finetune": 600}'
    )
    retries: int = Field(
        default=4, ge=0, description="of a stage that was killed or whose remote did not answer"
    )
    retry_seconds: float = Field(
        default=10.0, gt=0, description="before the first retry; twice as long before each next"
    )


# One stage.


def curable(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry may succeed."""
    return isinstance(state.result(raise_on_failure=False), CurableError)


@task(
    task_run_name="{stage.name}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_condition_fn=curable,
)
def run_stage(stage: Stage, folder: Path, place: Place, minutes: float, remote: bool) -> None:
    """One stage by DVC. Raises StageError with what it said last; CurableError is tried again."""
    logger = get_run_logger()
    logger.info("%s on %s, %s", stage.name, socket.gethostname(), place.name)
    try:
        extra = ["--pull"] if remote else []
        # Weights & Biases' files are for later: they belong into the clone.
        env = {**place.env, "WANDB_DIR": os.environ.get("WANDB_DIR", os.getcwd())}
        workspace.repro(stage, folder, env, logger.info, 60 * minutes, extra)
        if remote:
            workspace.dvc(folder, ["push", "--run-cache", stage.name], {}, logger.info, 3600.0)
    except StageError as error:
        logger.error("%s: %s", stage.name, error)
        raise


# The graph.


@dataclass
class Progress:
    """What has become of the stages: who runs, and who has ended how."""

    waiting: dict[str, Stage]
    running: dict[str, tuple[PrefectFuture[Any], list[Lock]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ready(self) -> list[Stage]:
        """Those that may start now. What gathers waits until all it needs has ended in any way."""
        lost = self.failed.keys() | self.skipped.keys()
        return [
            stage
            for stage in self.waiting.values()
            if stage.needs <= self.done | (lost if stage.gathers else set())
            and (not stage.gathers or not lost or self.done)
        ]

    def end(self, name: str, error: str | None) -> None:
        """A running stage has ended, with `error` or without."""
        for lock in self.running.pop(name)[1]:
            lock.release()
        if error is None:
            self.done.add(name)
            return
        self.failed[name] = error
        causes = workspace.skipped(self.waiting.values(), self.failed)
        self.skipped |= causes
        for one in causes:
            del self.waiting[one]

    def summary(self) -> str:
        """One line: how many, and each failed one with its reason."""
        if not self.failed:
            return f"{len(self.done)} stages up to date"
        faults = "; ".join(f"{name}: {error}" for name, error in self.failed.items())
        return (
            f"{len(self.failed)} of {len(self.done) + len(self.failed) + len(self.skipped)} stages failed, "
            f"{len(self.skipped)} skipped for them: {faults}"
        )


def places(params: Params, limits: Limits) -> tuple[list[Place], list[Place]]:
    """Where stages that train run, and where the others do. Raises UserError where the GPU is not there."""
    runtime = next(iter(params.cells.values())).runtime
    cpus = slots.cpu_places(runtime.threads, limits.cpu_slots)
    if not runtime.device.startswith("cuda"):
        return cpus, cpus
    return slots.gpu_places(runtime.device, slots.gpus(os.environ), limits.per_gpu), cpus


def run_graph(root: Path, folder: Path, params: Params, limits: Limits, remote: bool) -> Progress:
    """Every stage of the worktree, in dependency order, as many at once as there are places."""
    logger = get_run_logger()
    progress = Progress(workspace.stages(folder))
    kinds = tuple(dict.fromkeys(stage.kind for stage in progress.waiting.values()))
    for kind in limits.minutes_by_stage:
        if kind not in kinds:
            raise UserError(unknown("limits.minutes_by_stage:", kind, kinds))
    training, other = places(params, limits)
    locks, ended = root / workspace.HOME / "locks", Queue[str]()
    logger.info("%d stages, %d places to train in", len(progress.waiting), len(training))
    while progress.waiting or progress.running:
        for stage in progress.ready():
            held = _start_locks(locks, params, stage, training if stage.trains else other)
            if held is None:
                continue
            place, own = held
            one = run_stage.with_options(
                tags=stage.tags,
                retries=limits.retries,
                retry_delay_seconds=exponential_backoff(limits.retry_seconds),
                retry_jitter_factor=0.3,
            )
            minutes = limits.minutes_by_stage.get(stage.kind, limits.minutes)
            future = one.submit(stage, folder, place, minutes, remote)
            del progress.waiting[stage.name]
            progress.running[stage.name] = (future, own)
            future.add_done_callback(partial(_tell, ended, stage.name))
        if not progress.running and not progress.ready():
            break  # nothing that gathers has anything to gather
        try:
            name = ended.get(timeout=POLL_SECONDS)
        except Empty:
            continue
        future = progress.running[name][0]
        future.wait()  # until then its state is the one before
        state = future.state
        progress.end(name, None if state.is_completed() else fault(state))
    return progress


def fault(state: State[Any]) -> str:
    """One line: what a task's final state says of its stage."""
    text = " ".join((state.message or state.name or "failed").split())
    return re.sub(r"^.*?\b(?:StageError|CurableError): ", "", text)


def _tell(ended: Queue[str], name: str, _future: PrefectFuture[Any]) -> None:
    ended.put(name)


def _start_locks(
    folder: Path, params: Params, stage: Stage, where: Sequence[Place]
) -> tuple[Place, list[Lock]] | None:
    """A place, and the right to be the only one at this stage with these values on this machine; or None."""
    own = slots.try_lock(folder / f"stage-{workspace.digest(params, stage)}.lock")
    if own is None:
        return None
    found = slots.try_place(folder, where)
    if found is None:
        own.release()
        return None
    return found[0], [own, found[1]]


# The flows.


def run(
    choice: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any], limits: Limits
) -> State[Any]:
    """The final state of the cells of `choice` with `overrides`; bad input is one line of it."""
    try:
        return _run(choice, overrides, limits)
    except UserError as error:
        return Failed(message="error: " + " ".join(str(error).split()))


def _run(
    choice: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any], limits: Limits
) -> State[Any]:
    logger = get_run_logger()
    root = Path.cwd()
    tree, params = workspace.choose(root / workspace.PARAMS, choice, overrides)
    places(params, limits)  # raises where the device is missing, before anything is made
    name = f"{flow_run.name}-{str(flow_run.id)[:8]}"
    folder = workspace.create(root, name, tree)
    logger.info("parameters: branch %s%s, worktree %s", workspace.BRANCH, name, folder)
    try:
        progress = run_graph(root, folder, params, limits, workspace.has_remote(folder))
    except BaseException:  # cancelled: Prefect waits for the tasks, and they for their children
        workspace.stop_all()
        raise
    workspace.commit(root, folder, name, progress.summary())
    publish(root, folder, name)
    text = progress.summary()
    logger.info("%s; git checkout %s%s && dvc checkout", text, workspace.BRANCH, name)
    if progress.failed:
        return Failed(message=text)
    workspace.remove(root, folder)
    return Completed(message=text)


def publish(root: Path, folder: Path, name: str) -> None:
    """The report as artifacts of the flow run: its table, its curves, and where its page lies."""
    source, target = folder / "report", root / workspace.HOME / "reports" / name
    if not (source / "index.html").is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    rows = json.loads((target / "summary.json").read_text())
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
        limits: how much at once, for how long
    """
    return run(matrix.model_dump(), overrides, limits)


@flow(task_runner=RUNNER, persist_result=False)
def finetune(cell: Cell, overrides: Overrides, limits: Limits) -> State[Any]:
    """One data set, agent and seed, from the data to the report.

    Args:
        cell: the cell to run
        overrides: other values than in params.yaml, by dotted name, checked before anything runs: {"modip.base.env_steps": 4000, "modip.by_dataset.toy.keep": 0.5, "runtime.device": "cuda"}
        limits: how much at once, for how long
    """
    return run({name: [value] for name, value in cell.model_dump().items()}, overrides, limits)


@flow(persist_result=False)
def tune(
    workers: Annotated[int, Field(ge=1)] = 1, minutes: Annotated[float, Field(gt=0)] = 1440.0
) -> State[Any]:
    """The study that the section `tune` of params.yaml describes; run again, it goes on.

    Args:
        workers: trials side by side on this machine
        minutes: timeout
    """
    root, logger = Path.cwd(), get_run_logger()
    command = ["pipeline.tune", "--workers", str(workers)]
    try:
        workspace.program(root, command, {}, logger.info, 60 * minutes)
    except StageError as error:
        return Failed(message=str(error))
    except BaseException:
        workspace.stop_all()
        raise
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
