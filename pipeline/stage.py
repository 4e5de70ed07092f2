"""What every stage's program shares: its arguments, how it starts, how it reports, how it fails.

def body(args: argparse.Namespace, params: Params) -> None: ...

if __name__ == "__main__":
    sys.exit(stage.run(stage.parser(__doc__, "dataset", "agent", "seed"), body))
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from modip import agents
from modip.config import Params, RuntimeConfig, load
from modip.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
console = Console(stderr=True)

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal to draw a bar on."""

ARGUMENTS = {
    "dataset": (str, "data set id, a key of `data` in the parameters"),
    "agent": (str, "agent id"),
    "seed": (int, "seed of everything random in this cell"),
}

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "WANDB_ERROR_REPORTING": "false",
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    "MPLBACKEND": "Agg",
}
"""For the libraries a stage uses and the processes it starts, where the user has not said otherwise."""


def parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """Required arguments `names` (of dataset, agent, seed), and --params. Description: the first paragraph."""
    first = (description or "").strip().split("\n\n")[0]
    result = argparse.ArgumentParser(description=first)
    for name in names:
        kind, text = ARGUMENTS[name]
        result.add_argument(f"--{name}", required=True, type=kind, help=text)
    result.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="parameters [params.yaml]"
    )
    return result


def run(
    arguments: argparse.ArgumentParser, body: Callable[[argparse.Namespace, Params], None]
) -> int:
    """Exit status of a stage: 0, 2 after one line `error: ...` for bad input, 130 if interrupted."""
    args = arguments.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _log_to_terminal()
    try:
        params = agents.check(load(args.params), str(args.params))
        if "dataset" in args:
            cell = params.cell(args.dataset)
            if "seed" in args:
                use(cell.runtime)
        body(args, params)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run it again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def use(runtime: RuntimeConfig) -> None:
    """Threads of torch. Imported here: a program that computes nothing must not wait for it."""
    import torch

    torch.set_num_threads(runtime.threads)


def device(runtime: RuntimeConfig) -> torch.device:
    """The device to run on. Raises UserError if this machine does not have it."""
    import torch

    try:
        found = torch.device(runtime.device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"params.yaml: runtime.device (value {runtime.device!r}) is not usable here ({reason}); set it to cpu"
        ) from None
    return found


class Bar:
    """Progress with rate and time left: a bar on a terminal, otherwise a log line every ten seconds.

    `done` counts what an earlier, killed run did; the rate is this run's alone. `total` is None where nobody knows.
    """

    def __init__(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._first = self.done = done
        self._start = self._said = time.monotonic()
        self._note = ""
        self._rich: Progress | None = None
        if console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Pace(self),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._rich.add_task(title, total=total, completed=done, note="")

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` (a loss, a success rate) stays until the next one."""
        self.done += count
        self._note = note or self._note
        if self._rich is not None:
            self._rich.update(self._task, advance=count, note=self._note)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._say()

    def pace(self) -> str:
        """Rate and time left."""
        seconds = time.monotonic() - self._start
        rate = (self.done - self._first) / max(seconds, 1e-9)
        if rate == 0 or self.total is None or self.done >= self.total:
            return f"{rate:.3g} {self.unit}/s"
        left = timedelta(seconds=round((self.total - self.done) / rate))
        return f"{rate:.3g} {self.unit}/s, {left} left"

    def _say(self) -> None:
        self._said = time.monotonic()
        note = f", {self._note}" if self._note else ""
        total = "?" if self.total is None else self.total
        log.info("%s %d/%s %s, %s%s", self.title, self.done, total, self.unit, self.pace(), note)

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif error is None:
            self._say()


class _Pace(ProgressColumn):
    """rich's own rate jumps with every burst of updates; this is the run's mean."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> Text:
        return Text(self._bar.pace())


def _log_to_terminal() -> None:
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, show_level=False, markup=False, log_time_format="%X"
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("modip", "pipeline", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
