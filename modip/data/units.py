"""Recorded rows checked against their environment, their actions brought from its units into [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from modip import envs
from modip.data.episodes import Float, Rows
from modip.errors import UserError

TOLERANCE = 1e-4
"""How far rounding may carry a normalised action past its bound."""


def normalised(rows: Iterable[Rows], env_id: str, origin: str, field: str) -> Iterator[Rows]:
    """The same rows, their actions in [-1, 1]; `origin` and `field` (of params.yaml) name them in messages.

    Raises UserError where widths or bounds are not the environment's.
    """
    env, spec = envs.make(env_id), envs.spec(env_id)
    try:
        widths = (spec.obs_dim, spec.action_dim)
        yield from fitted(rows, widths, env.normalised, env_id, origin, field)
    finally:
        env.close()


def fitted(
    rows: Iterable[Rows],
    widths: tuple[int, int],
    scaled: Callable[[Float], Float],
    env_id: str,
    origin: str,
    field: str,
) -> Iterator[Rows]:
    """As `normalised`, for (Do, Da) and a scaling of actions that are known without the environment."""
    start = 0
    for block in rows:
        for name, width, wanted in (
            ("observation", block.observation.shape[1], widths[0]),
            ("action", block.action.shape[1], widths[1]),
        ):
            if width != wanted:
                raise UserError(
                    f"{origin}: {name} has {width} numbers, but {env_id} has {wanted}; give "
                    f"the file's own environment in params.yaml, {field}"
                )
        action = scaled(block.action)
        outside = np.abs(action) > 1.0 + TOLERANCE
        if outside.any():
            row, component = np.argwhere(outside)[0].tolist()
            raise UserError(
                f"{origin}: action[{component}] is {block.action[row, component]} in row {start + row}, "
                f"outside the bounds of {env_id}; actions must be in the environment's units"
            )
        yield block._replace(action=np.clip(action, -1.0, 1.0))
        start += len(action)
