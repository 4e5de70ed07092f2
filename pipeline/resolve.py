"""Checks params.yaml whole, and writes out each section's values for one data set.

Writes data/cells/DATASET/SECTION.json, and agents/AGENT.json with the sections that training this agent reads. The
other stages depend on those files that hold what they read, so a change in params.yaml makes stale what it changes,
whichever pattern of data sets it was made under.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modip.agents import AGENTS
from modip.config import SECTIONS, Params
from modip.files import write_json
from pipeline import stage

CELLS = Path("data/cells")


def body(args: argparse.Namespace, params: Params) -> None:
    """One data set."""
    values = params.cell(args.dataset).model_dump(include={"source", *SECTIONS})
    for section, found in values.items():
        write_json(CELLS / args.dataset / f"{section}.json", found)
    for agent, reads in AGENTS.items():
        found = {section: values[section] for section in reads}
        write_json(CELLS / args.dataset / "agents" / f"{agent}.json", found)


if __name__ == "__main__":
    sys.exit(stage.run(stage.parser(__doc__, "dataset"), body))
