"""Human PushT demonstrations: recorded states and absolute pixel targets to what the env takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from modip.data import episodes
from modip.data.episodes import Recording
from modip.data.sources import PushTSource
from modip.envs import pusht
from modip.errors import UserError


def convert(dataset: str, config: PushTSource, path: Path, sha256: str) -> Recording:
    """Reads the recording and gives features and agent-relative actions."""
    raw = episodes.read(path)
    shape = (raw.observation.shape[1], raw.action.shape[1])
    if shape != (5, 2):
        raise UserError(
            f"{config.path}: observation and action have {shape[0]} and {shape[1]} numbers; PushT "
            "recordings have 5 (agent xy, block xy, angle) and 2 (target xy)"
        )
    agent, first = raw.observation[:, :2], raw.starts[:-1]
    previous = np.roll(agent, 1, axis=0)
    previous[first] = agent[first]
    return replace(
        raw,
        info=replace(raw.info, dataset=dataset, sha256=sha256),
        observation=pusht.features(raw.observation, previous),
        action=pusht.relative_action(raw.action, agent, raw.observation[:, 4]),
    ).recording
