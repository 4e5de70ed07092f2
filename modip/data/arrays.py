"""A user's own HDF5 or npz file: params.yaml names the arrays, see modip.data.sources.ArraysSource.

Episodes end where a flag says so, or where `episode_ends` does (the row numbers after each last row, as in zarr
recordings of diffusion_policy), or with each group where the names hold {episode}.
An npz file is read member by member as a stream, so that no array is ever whole in memory.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from modip import envs
from modip.data import columns, episodes, hdf5
from modip.data.columns import Column
from modip.data.episodes import DatasetInfo, Recording, Rows
from modip.data.sources import ArraysSource
from modip.data.units import check_widths, normalised
from modip.errors import UserError

EPISODE = "{episode}"


class _Store(NamedTuple):
    """An open file: an array by its name (None where there is none), and the names inside a group."""

    array: Callable[[str], Column | None]
    names: Callable[[str], list[str]]


def convert(dataset: str, config: ArraysSource, root: Path, sha256: str) -> Recording:
    """The arrays as rows, actions brought from the environment's bounds into [-1, 1]."""
    info = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version="not stated",
        source=config.path,
        licence="not stated",
        sha256=sha256,
        description="arrays given in params.yaml",
    )
    rows = episodes.gathered(_rows(config, root, f"data.{dataset}"))
    return Recording(info, normalised(rows, config.env, config.path, f"data.{dataset}.env"))


def _rows(config: ArraysSource, root: Path, section: str) -> Iterator[Rows]:
    keys = {
        name: key for name in Rows._fields if (key := getattr(config, name))
    }  # without the flags that are not there
    grouped = [name for name, key in keys.items() if EPISODE in key]
    if grouped and (len(grouped) < len(keys) or config.episode_ends):
        odd = next((name for name in keys if name not in grouped), "episode_ends")
        raise UserError(
            f"params.yaml, {section}.{odd}: {getattr(config, odd)!r} must hold {EPISODE} like "
            f"{section}.{grouped[0]}, or none of them (and no episode_ends beside it)"
        )
    if not (grouped or config.episode_ends or set(keys) & {"terminated", "truncated"}):
        raise UserError(
            f"params.yaml, {section}: where do episodes end? Name an array of flags as terminated or "
            f"truncated, or episode_ends, or put {EPISODE} into the names"
        )
    with _opened(root, config.path) as store:
        if grouped:
            for number in _numbers(store, keys["reward"], config.path, section):
                named = {name: key.replace(EPISODE, number) for name, key in keys.items()}
                for rows in columns.read(
                    _columns(store, named, config.path, section), named, config.path
                ):
                    where = f"{config.path}: {named['reward']}"
                    check_widths(
                        rows, envs.spec(config.env).widths, config.env, where, f"{section}.env"
                    )
                    yield rows
            return
        blocks = columns.read(_columns(store, keys, config.path, section), keys, config.path)
        if config.episode_ends:
            found = _columns(store, {"episode_ends": config.episode_ends}, config.path, section)
            blocks = _cut(blocks, found["episode_ends"], config.path, config.episode_ends)
        yield from blocks


def _columns(store: _Store, keys: dict[str, str], origin: str, section: str) -> dict[str, Column]:
    found = {}
    for name, key in keys.items():
        column = store.array(key)
        if column is None:
            group = key.rpartition("/")[0]
            while group and not store.names(group):
                group = group.rpartition("/")[0]
            there = ", ".join(store.names(group)[:20]) or "nothing"
            raise UserError(
                f"{origin}: no array {key}, which params.yaml, {section}.{name} names; "
                f"{group or 'the file'} has {there}"
            )
        found[name] = column
    return found


def _numbers(store: _Store, key: str, origin: str, section: str) -> list[str]:
    """What stands for {episode} in the file, in numeric order."""
    before, _, after = key.partition(EPISODE)
    group, _, head = before.rpartition("/")
    pattern = re.compile(re.escape(head) + r"(\d+)" + re.escape(after.partition("/")[0]))
    found = [match[1] for name in store.names(group) if (match := pattern.fullmatch(name))]
    if not found:
        raise UserError(
            f"{origin}: nothing in it is called {key}, with a number for {EPISODE}; correct "
            f"params.yaml, {section}.reward"
        )
    return sorted(found, key=int)


def _cut(blocks: Iterable[Rows], column: Column, origin: str, key: str) -> Iterator[Rows]:
    """The same rows, truncated before the row numbers of `column` unless a flag ends the episode."""
    shape, kind = column.shape, column.dtype.kind
    ends = column[0 : shape[0]] if len(shape) == 1 and kind in "iu" else np.zeros(0, np.int64)
    if not len(ends) or (np.diff(ends.astype(np.int64), prepend=0) <= 0).any():
        raise UserError(
            f"{origin}: {key} must be whole numbers that grow, the first above 0: the row after each "
            "episode's last"
        )
    start = 0
    for rows in blocks:
        here = ends[(ends > start) & (ends <= start + len(rows.reward))] - start - 1
        rows.truncated[here] |= ~rows.terminated[here]
        start += len(rows.reward)
        yield rows
    if ends[-1] != start:
        raise UserError(
            f"{origin}: {key} ends at {ends[-1]}, but there are {start} rows; write the file again"
        )


def _opened(path: Path, origin: str) -> contextlib.AbstractContextManager[_Store]:
    return _npz(path, origin) if zipfile.is_zipfile(path) else _hdf5(path, origin)


@contextlib.contextmanager
def _hdf5(path: Path, origin: str) -> Iterator[_Store]:
    with hdf5.opened(path, origin) as file:

        def names(group: str) -> list[str]:
            found = file.get(group or "/")
            return list(found) if isinstance(found, h5py.Group) else []

        yield _Store(lambda name: hdf5.column(file, name), names)


@contextlib.contextmanager
def _npz(path: Path, origin: str) -> Iterator[_Store]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy") for name in archive.namelist()}

            def array(name: str) -> Column | None:
                if name not in members:
                    return None
                return _Member(archive.open(f"{name}.npy"), f"{origin}: {name}")

            def names(group: str) -> list[str]:
                inside = f"{group}/" if group else ""
                found = (name.removeprefix(inside) for name in members if name.startswith(inside))
                return sorted({name.partition("/")[0] for name in found})

            yield _Store(array, names)
    except (
        OSError,
        EOFError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as problem:
        raise UserError(
            f"{origin}: not a complete npz file ({str(problem).splitlines()[0]}); write it again"
        ) from problem


class _Member:
    """One array of an npz file: consecutive slices, each read once.

    The format: numpy.lib.format (NEP 1). Raises UserError for arrays that are not rows of numbers.
    """

    def __init__(self, file: Any, what: str) -> None:
        self._file, self._what, self._next = file, what, 0
        try:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            self.shape, columnwise, self.dtype = header(file)
        except (ValueError, KeyError) as problem:
            raise UserError(f"{what} is not an array of numbers; write it with numpy") from problem
        if self.dtype.hasobject or (columnwise and len(self.shape) > 1):
            raise UserError(
                f"{what} must be an array of numbers in row order; write it with numpy.ascontiguousarray"
            )

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        assert rows.start == self._next  # a stream does not go back
        shape = (rows.stop - rows.start, *self.shape[1:])
        size = int(np.prod(shape)) * self.dtype.itemsize
        data = self._file.read(size)
        if len(data) < size:
            raise UserError(
                f"{self._what} ends early, in row {rows.stop - 1} or before; write it again"
            )
        self._next = rows.stop
        if rows.stop == self.shape[0]:
            self._file.close()
        return np.frombuffer(data, self.dtype).reshape(shape)
