"""Recorded rows checked against their environment, their actions brought from its units into [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from modip import envs
from modip.data.episodes import Float, Rows
from modip.errors import UserError

TOLERANCE = 1e-4
"""How far rounding may carry a normalised action past its bound."""


def check_widths(rows: Rows, widths: tuple[int, int], env_id: str, origin: str, field: str) -> None:
    """Raises UserError where the rows' observations or actions are not as long as the environment's (Do, Da)."""
    found = rows.observation.shape[1], rows.action.shape[1]
    for name, width, wanted in zip(("observation", "action"), found, widths, strict=True):
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
    spec = envs.spec(env_id)
    yield from fitted(rows, spec.widths, spec.bounds.normalised, env_id, origin, field)


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
        check_widths(block, widths, env_id, origin, field)
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
