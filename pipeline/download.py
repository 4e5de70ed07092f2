"""Gets a data set's source: collects scripted demonstrations, or copies or downloads what params.yaml names.

Writes data/raw/DATASET/: the file or folder under its own name (a local folder stays where it is), and source.json
with the path to it and its sha256. Downloads lie in scratch/downloads/, unfinished ones too, and data/raw/ has hard links
to them (copies on another file system): DVC removes data/raw/DATASET/ before the stage runs again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modip.config import Params
from modip.data import episodes, fetch, remote, toy
from modip.errors import UserError
from modip.files import write_atomically, write_json
from pipeline import stage

log = logging.getLogger(__name__)
RAW = Path("data/raw")
CHECKSUMS = Path("data/checksums.json")
SCRATCH = Path("scratch/downloads")
WATCHED = (Path("data/own"), Path("data/samples"))
"""Folders that the stage depends on in dvc.yaml."""
PARTS = {"lerobot": ("meta/", "data/")}
"""By `source`: how what its converter reads of a repository begins, where that holds far more (videos)."""
MEGABYTE = 1_000_000


def body(args: argparse.Namespace, params: Params) -> None:
    """One data set."""
    source = params.data[args.dataset]
    into = RAW / args.dataset
    found: dict[str, Any]
    if source.source == "fetch" or source.source == "toy":
        shutil.rmtree(into, ignore_errors=True)
        root = into / "source.parquet"
        with stage.Bar(f"{args.dataset}: demonstrations", source.episodes, "episodes") as bar:
            if source.source == "fetch":
                made = fetch.collect(args.dataset, source, lambda: bar.advance(1))
            else:
                made = toy.collect(args.dataset, source, lambda: bar.advance(1))
        episodes.write(root, made.recording)
        found = {"root": str(root), "sha256": remote.file_sha256(root)}
    elif (origin := remote.local(source.path)) is not None:
        found = _local(args.dataset, origin, into)
        root = Path(found["root"])
    else:
        with _Megabytes(f"{args.dataset}: download") as progress:
            root, sha256 = remote.download(
                source.path,
                into,
                SCRATCH,
                CHECKSUMS,
                field=f"data.{args.dataset}.path",
                parts=PARTS.get(source.source, ()),
                progress=progress,
            )
        found = {"root": str(root), "sha256": sha256}
    if root == into / "source.json":
        raise UserError(
            f"params.yaml: data.{args.dataset}.path: the file may not be named source.json"
        )
    write_json(into / "source.json", {**source.model_dump(), **found})
    log.info("%s: %s, sha256 %s", args.dataset, found["root"], found["sha256"])


def _local(dataset: str, origin: Path, into: Path) -> dict[str, Any]:
    """A file of the user, copied, or a folder, which is read in place as it is now."""
    if not origin.exists():
        raise UserError(
            f"params.yaml: data.{dataset}.path: no file or folder {origin}; correct the path"
        )
    if not any(origin.resolve().is_relative_to(folder.resolve()) for folder in WATCHED):
        log.warning(
            "%s: a change there will not be seen; keep it under data/own/, or force a new start after a change "
            "with `dvc repro -f download@%s`",
            origin,
            dataset,
        )
    shutil.rmtree(into, ignore_errors=True)
    if origin.is_file():
        root = into / origin.name
        write_atomically(root, lambda path: shutil.copyfile(origin, path))
        return {"root": str(root), "sha256": remote.file_sha256(root)}
    files = listing(origin)
    if not files:
        raise UserError(
            f"params.yaml: data.{dataset}.path: the folder {origin} is empty; correct the path"
        )
    sha256 = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {"root": str(origin), "sha256": sha256, "files": files}


def listing(root: Path) -> dict[str, str]:
    """{relative path: "BYTES NANOSECONDS", the time of its last change} of all files below a folder, sorted."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            facts = path.stat()
            found[str(path.relative_to(root))] = f"{facts.st_size} {facts.st_mtime_ns}"
    return dict(sorted(found.items()))


def check_unchanged(dataset: str, root: Path, files: dict[str, str]) -> None:
    """Raises UserError where a folder read in place is no longer as `listing` found it."""
    now = listing(root)
    for name in sorted(files.keys() | now.keys()):
        if files.get(name) != now.get(name):
            what = (
                "is new" if name not in files else "is gone" if name not in now else "has changed"
            )
            raise UserError(
                f"{root}: {name} {what} since the data set was taken in; put it back, or take the folder as it is now "
                f"with `dvc repro -f download@{dataset}`"
            )


class _Megabytes:
    """A bar of the megabytes there are; a new one where a download starts again from its first byte."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: stage.Bar | None = None

    def __call__(self, size: int, total: int | None) -> None:
        done = math.ceil(size / MEGABYTE)
        if self._bar is not None and done < self._bar.done:
            self.__exit__(None, None, None)
        if self._bar is None:
            whole = None if total is None else math.ceil(total / MEGABYTE)
            self._bar = stage.Bar(self._title, whole, "MB", done=done).__enter__()
        elif done > self._bar.done:
            self._bar.advance(done - self._bar.done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
            self._bar = None


if __name__ == "__main__":
    sys.exit(stage.run(stage.parser(__doc__, "dataset"), body))
