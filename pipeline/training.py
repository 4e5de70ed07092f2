"""Drives anything that learns to its end, so that a kill at any moment changes nothing.

The resumable state lies in scratch/, in a folder named by the hash of everything the job depends on: a changed
parameter, input or line of code never continues an old run. A finished job's folder is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import modip
from modip import agents, checkpoint, envs
from modip.config import Cell, Params, unknown
from modip.data import episodes
from modip.envs import BatchedEnv
from modip.errors import UserError
from modip.loops import Fit, Interaction
from modip.replay import Replay
from modip.types import Spec
from pipeline import stage
from pipeline.convert import EPISODES
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)
ARTIFACTS = Path("data/artifacts")
SCRATCH = Path("scratch")
LOG_EVERY = 97
"""Updates between two rows of losses; prime, so that model, critics and policy take turns."""


@dataclass(frozen=True)
class Task:
    """One (dataset, seed) with its data loaded."""

    cell: Cell
    spec: Spec
    demos: Replay
    env_version: str
    source: str  # sha256 of the episode file: what the resumable state depends on
    seed: int
    agent: str  # as the parameters name it; nothing where what is made serves all agents

    @property
    def pretrained(self) -> Path:
        return ARTIFACTS / self.cell.dataset / "pretrained" / str(self.seed)

    @property
    def episodes(self) -> Path:
        return EPISODES / f"{self.cell.dataset}.parquet"

    def results(self, agent: str) -> Path:
        return ARTIFACTS / self.cell.dataset / agent / str(self.seed)

    def meta(self, **counts: Any) -> dict[str, Any]:
        """What a checkpoint says of its origin."""
        return {
            "seed": self.seed,
            "episodes_sha256": self.source,
            "env_version": self.env_version,
            **counts,
        }


def open_agents_task(params: Params, dataset: str, agent: str, seed: int) -> Task:
    """The same for one agent or variant, with its values and its rewards. Raises UserError for an unknown one too."""
    if agent not in agents.names(params):
        raise UserError(unknown("--agent", agent, agents.names(params)))
    offset = params.cell(dataset, agent).critics.reward_offset
    return open_task(params, dataset, seed, agent=agent, reward_offset=offset)


def open_task(
    params: Params, dataset: str, seed: int, *, agent: str = "", reward_offset: float = 0.0
) -> Task:
    """Read and check the data before any work; `reward_offset` is added to its rewards. Raises UserError."""
    cell = params.cell(dataset, agent)
    path = EPISODES / f"{dataset}.parquet"
    found = episodes.read(path)
    device = stage.device(cell.runtime)
    demos = Replay.from_episodes(found, reward_offset, device, envs.mirror(found.info.env_id))
    spec = Spec(dataset, found.info.env_id, demos.obs_dim, demos.action_dim)
    with path.open("rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    return Task(cell, spec, demos, found.info.env_version, source, seed, agent)


def scratch_folder(task: Task, name: str, reads: tuple[str, ...], *depends: object) -> Path:
    """The folder of a job's resumable state: named by the job and by the hash of all it depends on.

    `reads` are the sections of the parameters that the job reads, the same that its stage lists in dvc.yaml.
    """
    config = task.cell.model_dump(mode="json", include=set(reads))
    code = Path(modip.__file__).parent
    sources = [file.read_text() for file in sorted(code.rglob("*.py"))]
    key = json.dumps(
        [name, config, sources, task.source, task.seed, torch.__version__, *map(str, depends)],
        sort_keys=True,
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return (
        SCRATCH
        / f"{name.replace('/', '-')}-{task.cell.dataset.replace('/', '-')}-{task.seed}-{digest}"
    )


class DivergedError(UserError):
    """Training whose numbers are no longer finite."""


@dataclass
class Run:
    """A finished job: its training seconds, without evaluations, over all its resumptions; and its curve."""

    seconds: float
    update_seconds: float  # those of them that updates took
    curve: Path


def run(
    job: Fit | Interaction,
    task: Task,
    folder: Path,
    *,
    title: str,
    unit: str,
    total: int,
    done: Callable[[], int],
    points: list[int] | None = None,
    at_point: Callable[[], list[dict[str, Any]]] | None = None,
    at: Callable[[], int] | None = None,
) -> Run:
    """Advance `job` to its end, saving its state every `runtime.checkpoint_seconds`.

    `done` counts progress in `unit`s up to `total`; an agent's offline updates before its first step have a bar of their
    own. Whenever `at` (by default `job.env_steps`) passes one of `points` (ascending), those updates done, `at_point` gives
    rows for the curve. Raises DivergedError when the training diverges.
    """
    points = points or []
    reached = at or (lambda: job.env_steps)
    seconds, updating, passed, rows, logged = 0.0, 0.0, 0, 0, 0
    state_path = folder / "state"
    if checkpoint.exists(state_path):
        state, meta = checkpoint.load(state_path, "resume")
        job.load_state_dict(state)
        seconds, updating = meta["seconds"], meta["update_seconds"]
        passed, rows, logged = (meta[k] for k in ("passed", "rows", "logged"))
        log.info("%s: resumed at %d of %d %s", title, done(), total, unit)
    with (
        Tracker(
            folder / "curve.jsonl", folder.name, rows, task.cell.model_dump(mode="json")
        ) as tracker,
        ExitStack() as bars,
    ):
        saved = began = time.monotonic()

        def new_bar() -> stage.Bar:
            bars.close()
            if job.offline_left:
                made, goal = job.grad_steps, job.grad_steps + job.offline_left
                bar = stage.Bar(f"{title} (offline first)", goal, "updates", done=made)
            else:
                bar = stage.Bar(title, total, unit, done=done())
            return bars.enter_context(bar)

        bar, offline = new_bar(), job.offline_left > 0

        def head() -> dict[str, Any]:
            spent = seconds + time.monotonic() - began
            return {"env_steps": job.env_steps, "grad_steps": job.grad_steps, "seconds": spent}

        while True:
            if passed < len(points) and reached() >= points[passed] and not job.offline_left:
                seconds += time.monotonic() - began
                assert at_point is not None
                try:
                    found, began = at_point(), time.monotonic()
                except FloatingPointError as error:
                    raise _diverged(title, job, str(error)) from None
                for row in found:
                    tracker.log({"kind": "evaluation", **head(), **row})
                while passed < len(points) and reached() >= points[passed]:
                    passed += 1
            clock = time.perf_counter()
            try:
                metrics = job.advance()
            except FloatingPointError as error:
                raise _diverged(title, job, str(error)) from None
            if metrics is None:
                break
            if metrics:
                updating += time.perf_counter() - clock
            if metrics and job.grad_steps >= logged + LOG_EVERY:
                logged = job.grad_steps
                losses = {name: float(value) for name, value in metrics.items()}
                for name, value in losses.items():
                    if not math.isfinite(value):
                        raise _diverged(title, job, f"{name} is {value}")
                tracker.log({"kind": "train", **head(), **losses})
            now = job.grad_steps if offline else done()
            if now > bar.done:
                bar.advance(now - bar.done)
            if offline and not job.offline_left:
                bar, offline = new_bar(), False
            if time.monotonic() - saved > task.cell.runtime.checkpoint_seconds:
                meta = {"passed": passed, "rows": tracker.rows, "logged": logged}
                meta = {**meta, "seconds": head()["seconds"], "update_seconds": updating}
                checkpoint.save(state_path, "resume", job.state_dict(), meta)
                saved = time.monotonic()
        seconds = head()["seconds"]
    return Run(seconds, updating, folder / "curve.jsonl")


def _diverged(title: str, job: Fit | Interaction, what: str) -> DivergedError:
    return DivergedError(
        f"{title}: {what} after {job.grad_steps} updates; training has diverged: lower the learning rate "
        "or grad_clip of that part in params.yaml"
    )


def finish(folder: Path) -> None:
    """Forget a job whose results are written."""
    shutil.rmtree(folder, ignore_errors=True)


def check_env(task: Task, env: BatchedEnv) -> None:
    """Raises UserError if the environment does not give and take what the data set holds."""
    spec = env.spec
    if (spec.obs_dim, spec.action_dim) != (task.spec.obs_dim, task.spec.action_dim):
        raise UserError(
            f"{task.cell.dataset}: {spec.env_id} has observations of {spec.obs_dim} and actions of {spec.action_dim}, "
            f"the data {task.spec.obs_dim} and {task.spec.action_dim}; convert the data set again or correct its env"
        )
