"""Checkpoints: a directory of manifest.json and tensors.safetensors, written atomically, read without pickle.

The state is a nested dict, list or tuple of tensors, numbers, strings and None. Tensors go to one safetensors
file; everything else stays readable in the manifest, where `{"$tensor": name}` stands for a tensor. The types
come back as they went in: integer keys (optimizer states), tuples (betas), every float bit for bit, NaN included.

The manifest holds `kind`, `schema_version`, `sha256` of the tensor file, `state` and `meta`. Write into `meta`
what a reader must know before it trusts the state: `spec`, the `config` section as used, `counts`, and `parent`,
the fingerprint of the checkpoint this one started from. No time stamp: equal contents give equal files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from modip.errors import UserError
from modip.files import MANIFEST, TENSORS
from modip.types import State

SCHEMA_VERSION = 1


def save(path: Path, kind: str, state: State, meta: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`; at every moment, a kill leaves the old one or the new one readable.

    One writer per path. Tensors on any device, with views and shared storage, are written as separate CPU
    tensors. Raises TypeError, naming the entry, for anything a manifest cannot hold exactly.
    """
    tensors: dict[str, Tensor] = {}
    tree = {"state": _pack(state, "state", tensors, set())}
    in_meta: dict[str, Tensor] = {}
    tree["meta"] = _pack(meta, "meta", in_meta, set())
    if in_meta:
        raise TypeError(f"{next(iter(in_meta))}: meta holds a tensor; put it into the state")
    new, old = _beside(path, "new"), _beside(path, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    safetensors.torch.save_file(tensors, new / TENSORS)
    manifest = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "sha256": _sha256(new / TENSORS),
        **tree,
    }
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False))
    for written in (new / TENSORS, new / MANIFEST, new):
        _sync(written)
    if (
        path.exists()
    ):  # else a kill struck between the two renames below: `old` is the only copy, keep it
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(path: Path, kind: str) -> tuple[State, dict[str, Any]]:
    """State (tensors on the CPU) and meta of the checkpoint at `path`.

    Raises UserError if there is none, or if it is of another kind or version, incomplete or damaged.
    """
    source = _source(path)
    try:
        manifest = json.loads((source / MANIFEST).read_bytes())
        actual = _sha256(source / TENSORS)
        found, version, sha256 = (manifest[k] for k in ("kind", "schema_version", "sha256"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: {Path(str(error.filename)).name} is missing, so this is no complete checkpoint; "
            f"run the stage that writes this {kind}, again if need be"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(source / MANIFEST, f"{type(error).__name__}: {error}") from None
    if found != kind:
        raise UserError(
            f"{path}: holds a {found!r} checkpoint where a {kind!r} one is needed; give the path of a {kind!r}"
        )
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version!r}, but this program reads version {SCHEMA_VERSION}; "
            "run the stage that writes it again, or use the release that wrote it"
        )
    if actual != sha256:
        raise _damaged(
            source / TENSORS, f"sha256 {actual[:12]}, but {MANIFEST} says {str(sha256)[:12]}"
        )
    try:
        loaded = safetensors.torch.load_file(source / TENSORS)
        # Cloned: these are windows into the mapped file, not aligned as torch aligns its own memory, and some
        # kernels round differently then. A resumed run must not differ from one that was never stopped.
        state = _unpack(
            manifest["state"], {name: tensor.clone() for name, tensor in loaded.items()}
        )
        meta = _unpack(manifest["meta"], {})
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise _damaged(source, f"{type(error).__name__}: {error}") from None
    return state, meta


def exists(path: Path) -> bool:
    """Whether `load` would find a checkpoint at `path`, the copy that a killed `save` set aside included."""
    return (_source(path) / MANIFEST).exists()


def fingerprint(path: Path) -> str:
    """sha256 of the manifest, and so of all contents: the `parent` entry of what starts from this checkpoint."""
    try:
        return hashlib.sha256((_source(path) / MANIFEST).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint here; run the stage that writes it") from None


def _beside(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}")


def _source(path: Path) -> Path:
    aside = _beside(path, "old")
    return path if path.exists() or not aside.exists() else aside


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"{file}: damaged ({what}); delete {file.parent} and run the stage that writes it again"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(value: Any, where: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """JSON tree of `value`; its tensors are added to `tensors`, their storages to `storages`."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:
            tensor = tensor.clone()
        storages.add(storage)
        name = where if where not in tensors else f"{where}~{len(tensors)}"
        tensors[name] = tensor
        return {"$tensor": name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):  # repr round trip: exact; JSON has no word for the others
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{where}/{i}", tensors, storages) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}; use str or int")
        pairs = {
            key: _pack(item, f"{where}/{key}", tensors, storages) for key, item in value.items()
        }
        if all(isinstance(key, str) and not key.startswith("$") for key in pairs):
            return pairs
        return {"$dict": [[key, item] for key, item in pairs.items()]}
    raise TypeError(
        f"{where}: a {type(value).__name__} cannot be stored; use tensors, numbers, strings, None, "
        "and dicts, lists or tuples of them"
    )


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `_pack`. Raises KeyError for a tensor that is not there."""
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$float" in tree:
        return float(tree["$float"])
    if "$tuple" in tree:
        return tuple(_unpack(item, tensors) for item in tree["$tuple"])
    if "$dict" in tree:
        return {key: _unpack(item, tensors) for key, item in tree["$dict"]}
    return {key: _unpack(item, tensors) for key, item in tree.items()}
