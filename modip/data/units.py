"""Recorded rows checked against their environment, their actions brought from its units into [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from modip import envs
from modip.data.episodes import Rows
from modip.errors import UserError

TOLERANCE = 1e-4
"""How far rounding may carry a normalised action past its bound."""


def check_widths(rows: Rows, env_id: str, origin: str, field: str) -> None:
    """Raises UserError where the rows' observations or actions are not as long as the environment's."""
    spec = envs.spec(env_id)
    for name, width, wanted in (
        ("observation", rows.observation.shape[1], spec.obs_dim),
        ("action", rows.action.shape[1], spec.action_dim),
    ):
        if width != wanted:
            note = envs.family(env_id).obs_note if name == "observation" else ""
            raise UserError(
                f"{origin}: {name} has {width} numbers, but {env_id} has {wanted}; give "
                f"the file's own environment in params.yaml, {field}{note and f' ({note})'}"
            )


def normalised(rows: Iterable[Rows], env_id: str, origin: str, field: str) -> Iterator[Rows]:
    """The same rows, their actions in [-1, 1]; `origin` and `field` (of params.yaml) name them in messages.

    Raises UserError where widths or bounds are not the environment's.
    """
    env = envs.make(env_id)
    start = 0
    try:
        for block in rows:
            check_widths(block, env_id, origin, field)
            action = env.normalised(block.action)
            outside = np.abs(action) > 1.0 + TOLERANCE
            if outside.any():
                row, component = np.argwhere(outside)[0].tolist()
                raise UserError(
                    f"{origin}: action[{component}] is {block.action[row, component]} in row {start + row}, "
                    f"outside the bounds of {env_id}; actions must be in the environment's units"
                )
            yield block._replace(action=np.clip(action, -1.0, 1.0))
            start += len(action)
    finally:
        env.close()
