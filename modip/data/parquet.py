"""A Parquet file in the episode schema, observations and actions in the environment's units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modip import envs
from modip.data import episodes
from modip.data.episodes import DatasetInfo, Recording
from modip.data.sources import ParquetSource
from modip.data.units import normalised
from modip.errors import UserError


def convert(dataset: str, config: ParquetSource, path: Path, sha256: str) -> Recording:
    """Checks the file against the environment, and normalises its actions."""
    told = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version="not stated",
        source=config.path,
        licence="not stated",
        sha256=sha256,
        description="a file given in params.yaml",
    )
    envs.spec(config.env)  # an unknown id is the first thing to say
    raw = episodes.stream(path, told, Path(config.path))
    if raw.info.env_id != config.env:
        raise UserError(
            f"{config.path}: recorded in {raw.info.env_id}, but params.yaml, data.{dataset}.env "
            f"is {config.env}; set it to {raw.info.env_id}"
        )
    rows = normalised(raw.rows, config.env, config.path, f"data.{dataset}.env")
    return raw._replace(info=replace(raw.info, dataset=dataset, sha256=sha256), rows=rows)
