"""Compares agents: makes every cell that `compare` in params.yaml names, and writes report/compare.html.

What is made, in which order and whether it is up to date, is DVC's to say: the stages are those of `dvc repro`, run with
`dvc repro --single-item` in a copy of the tree under scratch/compare/ that has the comparison's lists and shares the DVC
cache. The user's own params.yaml, dvc.lock and results are left alone, and a cell that one of the two has computed the
other restores. Run again it goes on: what was killed from its last checkpoint. A stage that fails takes only what needs
it with it, and the page names what is missing.

Also puts the comparison's rows into report/summary.json, beside those of other cells (a `dvc repro` that writes the
report anew, or finds it changed and restores it, has its own rows alone), and its figures into report/compare/.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.text import Text

from modip.config import Params
from modip.errors import UserError
from pipeline import comparison, copied, report, slots, stage, travel, unlock, workspace
from pipeline.training import SCRATCH
from pipeline.workspace import Progress, Stage, StageError

log = logging.getLogger(__name__)
HOME = SCRATCH / "compare"
FOREVER = 1e6
"""Seconds that a stage may take: this program is not watched by a server that would start it elsewhere."""
CLOCK = re.compile(r"^\d\d:\d\d:\d\d ")
"""What a stage's program begins its lines with, as this one does."""


def needed(found: Mapping[str, Stage], cells: list[report.Cell]) -> dict[str, Stage]:
    """The stages that judge `cells` and all they need, each after what it needs."""
    wanted = {(dataset, agent, str(seed)) for dataset, agent, seed in cells}
    names = [
        name
        for name, one in found.items()
        if one.kind == "evaluate" and tuple(one.options.values()) in wanted
    ]
    for name in names:  # which grows as it goes
        names += [other for other in found[name].needs if other not in names]
    return {name: one for name, one in found.items() if name in names}


def make(home: Path, cells: list[report.Cell], jobs: int) -> Progress:
    """Bring the cells of the copy `home` up to date, `jobs` stages at once."""
    unlock.unlock(home / unlock.LOCKS)
    unlock.mend(home / unlock.LOCK)
    progress = Progress(needed(workspace.stages(home), cells))
    total = len(progress.waiting)
    for name in travel.restore(home, list(progress.waiting), False):
        progress.end(name, None)
    log.info("%d of %d stages are up to date", len(progress.done), total)
    running: dict[Future[str | None], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while running or progress.ready():
                # Judging first: an interrupted comparison has a row for every cell that it trained.
                ready = sorted(progress.ready(), key=lambda one: one.kind != "evaluate")
                for one in ready[: jobs - len(running)]:
                    log.info("%s begins", one.name)
                    progress.start(one.name)
                    running[pool.submit(_run, one, home)] = one.name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, error = running.pop(future), future.result()
                    progress.end(name, error)
                    ended = len(progress.done) + len(progress.failed) + len(progress.skipped)
                    log.info("%s %s; %d of %d", name, error or "is done", ended, total)
        except (
            BaseException
        ):  # interrupted: the pool waits for its threads, and they for their stages
            workspace.stop_all()
            raise
    return progress


def _run(one: Stage, home: Path) -> str | None:
    """Why a stage failed, or None."""

    def say(line: str) -> None:
        log.info("%s: %s", one.name, CLOCK.sub("", line))

    try:
        workspace.repro(one, home, {}, say, FOREVER)
    except StageError as error:
        return str(error)
    return None


def body(args: argparse.Namespace, params: Params) -> None:
    """The cells and the page, or with --page the page alone."""
    failed, place = "", Path.cwd()
    if args.jobs < 1:
        raise UserError(f"--jobs (value {args.jobs}): at least one stage must run; give 1 or more")
    if not args.page:
        cells = comparison.cells(params)
        lock = slots.try_lock(HOME / "lock")
        if lock is None:
            raise UserError(f"another comparison is at work in {HOME}; wait for it, or stop it")
        lists = {
            name: list(dict.fromkeys(values))
            for name, values in zip(workspace.CHOSEN, zip(*cells, strict=True), strict=True)
        }
        copied.bring(args.params, HOME, lists)
        place = HOME.resolve()
        progress = make(place, cells, args.jobs)
        failed = progress.summary() if progress.failed else ""
    rows, missing = comparison.write(params, place)
    console = Console()
    report.print_table(console, rows, missing)
    console.print(Text(f"{comparison.PAGE}", "dim"))
    if failed:
        raise UserError(failed)


def parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    result = stage.parser(__doc__)
    result.add_argument("--jobs", type=int, default=1, help="stages run side by side [1]")
    result.add_argument(
        "--page", action="store_true", help="run nothing; show what is in data/artifacts"
    )
    return result


if __name__ == "__main__":
    sys.exit(stage.run(parser(), body))
