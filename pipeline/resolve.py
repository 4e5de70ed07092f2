"""Checks params.yaml whole, and writes out each section's values for one data set.

Writes data/cells/DATASET/SECTION.json, and agents/AGENT.json for every agent, and every variant that fits: the values that its
training reads, and the sha256 of each file of modip that it imports, directly or not. The other stages depend on those files that
hold what they read, so a change in params.yaml or in an agent's code makes stale what it changes, and nothing else.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import logging
import sys
from pathlib import Path

import modip
from modip import agents
from modip.agents import AGENTS
from modip.config import SECTIONS, Params
from modip.errors import UserError
from modip.files import write_json
from pipeline import stage

log = logging.getLogger(__name__)
CELLS = Path("data/cells")
SOURCES = Path(modip.__file__).parent
LEFT_OUT = ("config.py", "agents/__init__.py", "__init__.py")
"""Files whose effect on a result is in the values that are written out, and the one that only hands on names."""


def body(args: argparse.Namespace, params: Params) -> None:
    """One data set."""
    folder = CELLS / args.dataset
    values = params.cell(args.dataset).model_dump(include={"source", *SECTIONS})
    for section, found in values.items():
        write_json(folder / f"{section}.json", found)
    for agent in agents.names(params):
        kind = params.base(agent)
        try:
            cell = params.cell(args.dataset, agent).model_dump(include=set(AGENTS[kind].reads))
        except (
            UserError
        ) as error:  # one that the matrix asked for was refused when params were read
            log.info("left out: %s", error)
            continue
        code = {
            str(file): hashlib.sha256((SOURCES / file).read_bytes()).hexdigest()
            for file in imported(Path("agents") / f"{kind}.py")
        }
        write_json(folder / "agents" / f"{agent}.json", {"agent": kind, **cell, "code": code})


def imported(start: Path) -> list[Path]:
    """`start` and every file of modip that it imports, inside functions too, relative to modip/ and in order."""
    found, todo = set(), [start]
    while todo:
        file = todo.pop()
        if file not in found and str(file) not in LEFT_OUT:
            found.add(file)
            todo += _imports(file)
    return sorted(found)


@functools.cache  # of all agents' files, most are shared
def _imports(file: Path) -> list[Path]:
    names: list[str] = []
    for node in ast.walk(ast.parse((SOURCES / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [path for name in names for path in _files(name)]


def _files(name: str) -> list[Path]:
    """The file of a module of modip, by its dotted name; none for what is no module, or not modip's."""
    first, *rest = name.split(".")
    inner = Path(*rest)
    both = (inner.with_suffix(".py") if rest else inner, inner / "__init__.py")
    return [path for path in both if first == "modip" and (SOURCES / path).is_file()]


if __name__ == "__main__":
    sys.exit(stage.run(stage.parser(__doc__, "dataset"), body))
