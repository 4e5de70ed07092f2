"""A Parquet file in the episode schema, observations and actions in the environment's units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from modip import envs
from modip.data import episodes
from modip.data.episodes import DatasetInfo, Episodes
from modip.data.sources import ParquetSource
from modip.errors import UserError


def convert(dataset: str, config: ParquetSource, path: Path, sha256: str) -> Episodes:
    """Reads the file, checks it against the environment, and normalises its actions."""
    env = envs.make(config.env)
    spec = envs.spec(config.env)
    told = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version="not stated",
        source=config.path,
        licence="not stated",
        sha256=sha256,
        description="a file given in params.yaml",
    )
    raw = episodes.read(path, told, Path(config.path))
    if raw.info.env_id != config.env:
        raise UserError(
            f"{config.path}: recorded in {raw.info.env_id}, but params.yaml, data.{dataset}.env "
            f"is {config.env}; set it to {raw.info.env_id}"
        )
    for name, width, wanted in (
        ("observation", raw.observation.shape[1], spec.obs_dim),
        ("action", raw.action.shape[1], spec.action_dim),
    ):
        if width != wanted:
            raise UserError(
                f"{config.path}: {name} has {width} numbers, but {config.env} has {wanted}; give "
                f"the file's own environment in params.yaml, data.{dataset}.env"
            )
    action = env.normalised(raw.action)
    env.close()
    outside = np.argwhere(np.abs(action) > 1.0 + 1e-4)
    if len(outside):
        row, component = outside[0].tolist()
        raise UserError(
            f"{config.path}: action[{component}] is {raw.action[row, component]} in row {row}, "
            f"outside the bounds of {config.env}; actions must be in the environment's units"
        )
    info = replace(raw.info, dataset=dataset, sha256=sha256)
    return replace(raw, info=info, action=np.clip(action, -1.0, 1.0))
