"""Turns a source into episodes: flat observations, actions in [-1, 1], checked and described.

Writes data/episodes/DATASET.parquet, DATASET.about.json (what it is, its statistics, and how far its steps are from
today's simulator's) and DATASET.json (of those, the figures of `dvc metrics show`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from modip import envs
from modip.config import Params
from modip.data import (
    arrays,
    calvin,
    d4rl,
    episodes,
    fidelity,
    lerobot,
    minari,
    parquet,
    pusht,
    robomimic,
)
from modip.data.episodes import Recording
from modip.errors import UserError
from modip.files import write_json
from pipeline import stage, tracking
from pipeline.download import RAW, check_unchanged

log = logging.getLogger(__name__)
EPISODES = Path("data/episodes")
Convert = Callable[[str, Any, Path, str], Recording]
CONVERTERS: dict[str, Convert] = {
    "arrays": arrays.convert,
    "calvin": calvin.convert,
    "d4rl": d4rl.convert,
    "lerobot": lerobot.convert,
    "minari": minari.convert,
    "parquet": parquet.convert,
    "pusht": pusht.convert,
    "robomimic": robomimic.convert,
}
"""By the `source` of params.yaml: (data set id, its source, file or folder, sha256) to rows of the environment."""

METRICS = (
    "episodes",
    "steps",
    "return_mean",
    "return_std",
    "score_mean",
    "success_rate",
    "fidelity_obs_error_median",
    "fidelity_obs_error_p95",
)


def about(dataset: str) -> Path:
    """The file that says all there is to know of a data set."""
    return EPISODES / f"{dataset}.about.json"


def body(args: argparse.Namespace, params: Params) -> None:
    """One data set."""
    source = params.data[args.dataset]
    record = RAW / args.dataset / "source.json"
    if not record.is_file():
        raise UserError(f"{record}: no such file; run pipeline.download first (or `dvc repro`)")
    told = json.loads(record.read_text())
    root, sha256 = Path(told["root"]), told["sha256"]
    if "files" in told:
        check_unchanged(args.dataset, root, told["files"])
    if source.source in CONVERTERS:
        found = CONVERTERS[source.source](args.dataset, source, root, sha256)
    else:
        scripted = episodes.stream(root)
        found = scripted._replace(info=replace(scripted.info, sha256=sha256))
    target = EPISODES / f"{args.dataset}.parquet"
    episodes.write(target, found)
    facts = episodes.statistics(episodes.stream(target))
    if source.source == "robomimic":
        # Its observations do not show the simulator's state, but the file has it.
        replayed = list(robomimic.samples(source, root, fidelity.STEPS))
    else:
        replayed = fidelity.sample(episodes.stream(target), facts["steps"], facts["terminated"])
    facts |= fidelity.one_step_error(facts["env_id"], replayed)
    write_json(about(args.dataset), facts)
    write_json(target.with_suffix(".json"), {name: facts[name] for name in METRICS})
    success = facts["success_rate"]
    log.info(
        "%s: %d episodes, %d steps, return %.4g ± %.4g, %s",
        args.dataset,
        facts["episodes"],
        facts["steps"],
        facts["return_mean"],
        facts["return_std"],
        "success unknown" if success is None else f"success {success:.2f}",
    )
    log.info("%s: %s", args.dataset, fidelity.summary(facts))
    doubt = fidelity.doubt(facts)
    if doubt is not None:
        here = envs.spec(facts["env_id"]).version
        log.warning(
            "%s: %s (recorded with %s; here: %s)", args.dataset, doubt, facts["env_version"], here
        )
    tracking.publish(f"convert-{args.dataset}", made={target: "dataset"}, table=[facts])


if __name__ == "__main__":
    sys.exit(stage.run(stage.parser(__doc__, "dataset"), body))
