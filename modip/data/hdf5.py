"""HDF5 files: opened and read with one clear line for whatever is wrong with them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from modip.errors import UserError

CACHE = 16 * 1024 * 1024
"""Bytes of unpacked chunks kept per array: a band of them across two slices is unpacked once."""
CACHE_SLOTS = 1009
METADATA = 1024 * 1024
"""Bytes of its file's structure that the library remembers."""
SMALL = 256 * 1024
"""Bytes of an array that is read at once: the upper level's slices cost more than such a read."""


@contextlib.contextmanager
def opened(path: Path, origin: str) -> Iterator[h5py.File]:
    """The file, for reading; `origin` is its name in messages.

    Raises UserError where it is no HDF5 file, or cut off, or damaged where it is read.
    """
    try:
        with h5py.File(path, "r") as file:
            # Left to itself, what the library remembers of thousands of small arrays fills 200 MiB.
            config = file.id.get_mdc_config()
            config.set_initial_size = True
            config.initial_size = config.min_size = config.max_size = METADATA
            file.id.set_mdc_config(config)
            yield file
    except (OSError, RuntimeError, KeyError) as problem:
        reason = str(problem.args[-1] if problem.args else problem).splitlines()[0]
        raise UserError(
            f"{origin}: not a complete HDF5 file ({reason}); download or copy it again"
        ) from problem


def column(file: h5py.File, name: str) -> h5py.Dataset | NDArray[Any] | None:
    """One array, to be read in slices, or read if it is small; None where there is none of this name."""
    found = _open(file, name)
    if found is None:
        return None
    if math.prod(found.shape or ()) * found.dtype.itemsize <= SMALL:
        return _whole(found)
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(CACHE_SLOTS, CACHE, 1.0)
    return h5py.Dataset(h5py.h5d.open(file.id, name.encode(), access))


def array(file: h5py.File, name: str, origin: str) -> NDArray[Any]:
    """All of one array. Raises UserError where there is none of this name."""
    found = _open(file, name)
    if found is None:
        raise UserError(f"{origin}: no array {name}; download or write the file again")
    return _whole(found)


def _open(file: h5py.File, name: str) -> Any:
    """By the library's lower level, for the sake of files with many small arrays."""
    try:
        return h5py.h5d.open(file.id, name.encode())
    except KeyError:  # nothing there, or a group
        return None


def _whole(found: Any) -> NDArray[Any]:
    values = np.empty(found.shape or (), found.dtype)
    if values.size:
        found.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values
