"""A recording as arrays side by side: checked to fit together, and read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modip.data.episodes import Rows
from modip.errors import UserError

BLOCK = 16 * 1024
"""Rows read at a time."""


class Column(Protocol):
    """An array in a file: consecutive slices of rows are read as they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,) or (N, width)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """What its numbers are."""
        ...

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Some of its rows."""
        ...


def read(columns: Mapping[str, Column], keys: Mapping[str, str], origin: str) -> Iterator[Rows]:
    """Blocks of rows of arrays by the names of `Rows`; `terminated` and `truncated` may be missing.

    `keys` are the arrays' names in the file `origin`, for messages.

    The last row, if no flag ends its episode, is truncated: the file ends inside it.
    Raises UserError for shapes and lengths that do not fit together.
    """
    for name, column in columns.items():
        check(name, column.shape, column.dtype, f"{origin}: {keys[name]}")
    count = columns["reward"].shape[0]
    for name, column in columns.items():
        if column.shape[0] != count:
            raise UserError(
                f"{origin}: {keys[name]} has {column.shape[0]} rows, but {keys['reward']} has {count}; "
                "write or download the file again"
            )
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        part = {name: column[start:stop] for name, column in columns.items()}
        none = np.zeros(stop - start, np.bool_)
        rows = as_rows(
            *(part[name] for name in ("observation", "action", "reward")),
            *(part.get(name, none) for name in ("terminated", "truncated")),
        )
        if stop == count:
            end_last(rows)
        yield rows


def check(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
    """Raises UserError, about `what`, where an array is not what `Rows` has under this name."""
    flat = name in ("observation", "action")
    fits = len(shape) == 2 if flat else shape[1:] in ((), (1,)) and len(shape) > 0
    if not fits:
        wanted = "(rows, numbers)" if flat else "(rows,)"
        raise UserError(
            f"{what} has shape {shape}; as {name} it must be {wanted}: an array of numbers, no "
            "pictures and no single value"
        )
    if dtype.kind not in "biuf":
        raise UserError(f"{what} holds {dtype}; as {name} it must hold numbers")


def as_rows(
    observation: NDArray[Any],
    action: NDArray[Any],
    reward: NDArray[Any],
    terminated: NDArray[Any],
    truncated: NDArray[Any],
) -> Rows:
    """Numbers of any kind as rows; flags are what is not 0. What float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return Rows(
            observation.astype(np.float32, copy=False),
            action.astype(np.float32, copy=False),
            reward.reshape(len(reward)).astype(np.float32, copy=False),
            terminated.reshape(len(terminated)) != 0,
            truncated.reshape(len(truncated)) != 0,
        )


def end_last(rows: Rows) -> None:
    """Marks the last row as truncated, in place, unless a flag ends it."""
    if len(rows.truncated):
        rows.truncated[-1] |= ~rows.terminated[-1]
