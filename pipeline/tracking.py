"""Curves: one JSON object per line, always; Weights & Biases too, if the environment asks for it.

`MODIP_WANDB=offline` (files under wandb/, to upload later with `wandb sync`) or `MODIP_WANDB=online`; unset, nothing
of it is imported. It is an environment variable and not a parameter because it changes no result. A failure of
Weights & Biases is a warning: it never stops a run, and the JSON lines are complete without it.

A stage that trains sends its curve and its parameters while it runs (`Tracker`), and every stage, when it is done, what
it made and from what (`publish`): data set, checkpoints, tables, videos. What lies on disk is referred to by its place
and its sum, never uploaded, but for videos and tables.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modip.errors import UserError
from modip.files import MANIFEST

log = logging.getLogger(__name__)

Value = bool | int | float | str | None
MODES = ("offline", "online")


class Tracker:
    """Appends rows to a file of JSON lines, from a known number of rows on.

    A resumed run passes the `rows` its checkpoint counted: what a killed run wrote after that checkpoint is cut
    off, half a line included. So the file belongs beside the checkpoint, not among DVC's outputs (which DVC
    removes before a stage starts); the stage copies it there when it is done.
    """

    def __init__(self, path: Path, name: str, rows: int, config: Mapping[str, Any]) -> None:
        """`rows` to keep, 0 for a new run; `name` and `config` of the run in Weights & Biases.

        Raises UserError if the file holds fewer than `rows`, or for an unknown MODIP_WANDB.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        lines = self._file.readlines(-1)
        kept = [line for line in lines[:rows] if line.endswith(b"\n")]
        if len(kept) < rows:
            self._file.close()
            raise UserError(
                f"{path}: {len(kept)} rows, but the checkpoint beside it counts {rows}; "
                f"delete {path.parent} to start this stage over"
            )
        self._file.truncate(sum(map(len, kept)))
        self._rows = rows
        self._wandb = _wandb_run(name, config)

    @property
    def rows(self) -> int:
        """Rows in the file, for the checkpoint. They are on disk: no kill takes them back."""
        os.fsync(self._file.fileno())
        return self._rows

    def log(self, row: Mapping[str, Value]) -> None:
        """Append one row. A value that is not finite becomes null, which every JSON reader takes."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(
            json.dumps(clean, allow_nan=False).encode() + b"\n"
        )  # one write: whole lines only
        self._rows += 1
        self._tell(lambda run: run.log(dict(row), step=self._rows))

    def close(self) -> None:
        self._file.close()
        self._tell(lambda run: run.finish())
        self._wandb = None

    def _tell(self, call: Callable[[Any], object]) -> None:
        if self._wandb is not None and not _safely(self._wandb, call):
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def publish(
    name: str,
    *,
    made: Mapping[Path, str],
    given: Sequence[Path] = (),
    table: Sequence[Mapping[str, Value]] = (),
    videos: Mapping[str, Path] | None = None,
) -> None:
    """What a finished stage made, {path: kind}, and from what; nothing unless asked.

    The lineage is in each artifact's metadata, and as edges of the graph too where there is a server to ask.
    """
    run = _wandb_run(name, {})
    if run is None:
        return
    wandb: Any = importlib.import_module("wandb")

    def tell(run: Any) -> None:
        if os.environ["MODIP_WANDB"] == "online":
            for path in given:
                run.use_artifact(f"{_identifier(str(path))}:latest")
        parents = {_identifier(str(path)): _sum(path) for path in given}
        for path, kind in made.items():
            about = {"path": str(path), "sha256": _sum(path), "given": parents}
            artifact = wandb.Artifact(_identifier(str(path)), kind, metadata=about)
            artifact.add_reference(path.resolve().as_uri())
            run.log_artifact(artifact)
        if table:
            columns = list(dict.fromkeys(key for row in table for key in row))
            rows = [[row.get(key) for key in columns] for row in table]
            run.log({"results": wandb.Table(columns=columns, data=rows)})
        for title, file in (videos or {}).items():
            run.log({title: wandb.Video(str(file), format="mp4")})

    if _safely(run, tell):
        _safely(run, lambda run: run.finish())


def _safely(run: Any, call: Callable[[Any], object]) -> bool:
    """Whether it worked; if not, one warning."""
    try:
        call(run)
    except Exception as error:  # noqa: BLE001  whatever another service does must not end a run
        log.warning("Weights & Biases failed and is off for the rest of this run: %s", error)
        return False
    return True


def _sum(path: Path) -> str:
    """A file's sha256, or a checkpoint's fingerprint: that of its manifest."""
    with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identifier(name: str) -> str:
    """A name as W&B takes it for runs and artifacts: letters, digits, and - _ ."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _wandb_run(name: str, config: Mapping[str, Any]) -> Any:
    mode = os.environ.get("MODIP_WANDB", "")
    if not mode:
        return None
    if mode not in MODES:
        raise UserError(
            f"MODIP_WANDB (value {mode!r}) is unknown: choose one of {', '.join(MODES)}, or unset it"
        )
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError:
        log.warning("Weights & Biases is off for this run: pip install wandb")
        return None
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "modip"),
            name=name,
            id=_identifier(name),
            resume="allow",
            mode=mode,
            config=dict(config),
            # The terminal is the stage's own.
            settings=wandb.Settings(init_timeout=30, console="off"),
        )
    except Exception as error:  # noqa: BLE001  no account, no network: the run goes on
        log.warning("Weights & Biases is off for this run: %s", error)
        return None
