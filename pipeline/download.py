"""Gets a data set's source: collects scripted demonstrations, or copies the file params.yaml names.

Writes data/raw/DATASET/: source.parquet, and source.json with its sha256 and where it is from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path

from modip.config import Params
from modip.data import episodes, fetch, toy
from modip.errors import UserError
from modip.files import write_atomically
from pipeline import stage

log = logging.getLogger(__name__)
RAW = Path("data/raw")
WATCHED = (Path("data/own"), Path("data/samples"))
"""Folders that the stage depends on in dvc.yaml."""


def body(args: argparse.Namespace, params: Params) -> None:
    """One data set."""
    source = params.data[args.dataset]
    target = RAW / args.dataset / "source.parquet"
    if source.source == "fetch" or source.source == "toy":
        with stage.Bar(f"{args.dataset}: demonstrations", source.episodes, "episodes") as bar:
            if source.source == "fetch":
                found = fetch.collect(args.dataset, source, lambda: bar.advance(1))
            else:
                found = toy.collect(args.dataset, source, lambda: bar.advance(1))
        episodes.write(target, found.recording)
    else:
        origin = Path(source.path)
        if not origin.is_file():
            raise UserError(
                f"params.yaml: data.{args.dataset}.path: no file {origin}; correct the path"
            )
        if not any(origin.resolve().is_relative_to(folder.resolve()) for folder in WATCHED):
            log.warning(
                "%s: a change of this file will not be seen; keep it under data/own/, or force a new start "
                "after a change with `dvc repro -f download@%s`",
                origin,
                args.dataset,
            )
        write_atomically(target, lambda path: shutil.copyfile(origin, path))
    with target.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = (
        json.dumps({**source.model_dump(), "root": str(target), "sha256": sha256}, indent=2) + "\n"
    )
    write_atomically(target.with_name("source.json"), lambda path: path.write_text(record))
    log.info("%s: %s, sha256 %s", args.dataset, target, sha256)


if __name__ == "__main__":
    sys.exit(stage.run(stage.parser(__doc__, "dataset"), body))
