"""Curves: one JSON object per line, always; Weights & Biases too, if the environment asks for it.

`MODIP_WANDB=offline` (files under wandb/, to upload later with `wandb sync`) or `MODIP_WANDB=online`; unset, nothing
of it is imported. It is an environment variable and not a parameter because it changes no result. A failure of
Weights & Biases is a warning: it never stops a run, and the JSON lines are complete without it.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modip.errors import UserError

log = logging.getLogger(__name__)

Value = bool | int | float | str | None
MODES = ("offline", "online")


class Tracker:
    """Appends rows to a file of JSON lines, from a known number of rows on.

    A resumed run passes the `rows` its checkpoint counted: what a killed run wrote after that checkpoint is cut
    off, half a line included. So the file belongs beside the checkpoint, not among DVC's outputs (which DVC
    removes before a stage starts); the stage copies it there when it is done.
    """

    def __init__(self, path: Path, name: str, rows: int) -> None:
        """`rows` to keep, 0 for a new run; `name` of the run in Weights & Biases.

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
        self._wandb = _wandb_run(name)

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

    def _tell(self, call: Any) -> None:
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # noqa: BLE001  whatever another service does must not end a run
            log.warning("Weights & Biases failed and is off for the rest of this run: %s", error)
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


def _wandb_run(name: str) -> Any:
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
            id=name.replace("/", "-"),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(init_timeout=30),
        )
    except Exception as error:  # noqa: BLE001  no account, no network: the run goes on
        log.warning("Weights & Biases is off for this run: %s", error)
        return None
