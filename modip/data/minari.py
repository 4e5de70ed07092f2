"""Minari: a folder with data/metadata.json and the episodes, as HDF5 or as Arrow files.

HDF5 (minari/dataset/_storages/hdf5_storage.py): data/main_data.hdf5 with groups episode_0, episode_1, ...; each has
`observations` (T + 1 rows; a group of arrays for a Dict), `actions`, `rewards`, `terminations`, `truncations` (T rows).
Arrow (arrow_storage.py): data/0/*.arrow, data/1/..., columns of the same names, all T + 1 rows long, the last of
actions, rewards and flags being padding.

The observation after the last action is left out, as the episode schema has no row for it. A Dict is laid flat in the
order of its sorted keys, as modip.envs.custom does; a family that uses only some of them says so (`Family.keys`). An
episode whose last row has no flag (a recording that was broken off) is truncated there. Kitchen recordings get the
environment's own rewards and ends: modip.data.kitchen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from modip import envs
from modip.data import columns, episodes, hdf5, kitchen
from modip.data.episodes import DatasetInfo, Float, Recording, Rows
from modip.data.kitchen import Transitions
from modip.data.sources import MinariSource
from modip.data.units import check_widths, normalised
from modip.envs import fetch, pusht
from modip.envs import kitchen as kitchen_env
from modip.errors import UserError

PARTS = ("actions", "rewards", "terminations", "truncations")


class _Episode(NamedTuple):
    """One episode of T steps as it lies in the file."""

    name: str
    observations: dict[str, NDArray[Any]]  # (T + 1, width) by key; a Box has the one key ""
    actions: NDArray[Any]  # (T, Da)
    rewards: NDArray[Any]  # (T,)
    terminations: NDArray[Any]  # (T,)
    truncations: NDArray[Any]  # (T,)


def convert(dataset: str, config: MinariSource, root: Path, sha256: str) -> Recording:
    """Checks the metadata, and reads the episodes in their order."""
    field = f"data.{dataset}.env"
    kitchen.check_source(config.env, kitchen_env.MINARI_IDS, config.path, field)
    own = envs.family(config.env)
    if own in (fetch.FAMILY, pusht.FAMILY):
        raise UserError(
            f"{config.path}: params.yaml, {field} is {config.env}, whose observations modip makes over; "
            "a Minari recording of it cannot be read: write it as a Parquet file and use `source: parquet`"
        )
    folder = root / "data" if (root / "data").is_dir() else root
    metadata = _metadata(folder, config.path)
    recorded_in = _check_env(metadata, config.env, config.path, field)
    read = {"hdf5": _hdf5, "arrow": _arrow}.get(metadata["data_format"])
    if read is None:
        raise UserError(
            f"{config.path}: data_format is {metadata['data_format']}; only hdf5 and arrow can be "
            "read: convert it with Minari"
        )
    found = read(folder, config.path, metadata["total_episodes"], own.keys)
    transitions = _transitions(found, config.env, config.path, field)
    if config.env in kitchen_env.ENV_IDS:
        rows: Iterable[Rows] = kitchen.as_played(transitions, config.env, config.path, field)
    else:
        rows = (one.rows for one in transitions)
    info = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version=recorded_in,
        source=str(metadata.get("dataset_id", config.path)),
        licence=str(metadata.get("license", "not stated")),
        sha256=sha256,
        description=_description(metadata),
    )
    return Recording(info, normalised(episodes.gathered(rows), config.env, config.path, field))


def _metadata(folder: Path, origin: str) -> dict[str, Any]:
    path = folder / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
        if not (
            isinstance(metadata, dict)
            and isinstance(metadata.get("data_format"), str)
            and isinstance(metadata.get("total_episodes"), int)
        ):
            raise ValueError("no data_format or no total_episodes")
    except (OSError, ValueError) as problem:
        raise UserError(
            f"{origin}: no readable data/metadata.json ({problem}); a Minari data set of version 0.5 or "
            "later is a folder with one: download it again"
        ) from problem
    return metadata


def _check_env(metadata: dict[str, Any], env_id: str, origin: str, field: str) -> str:
    """What the data were recorded in, as text. Raises UserError where that is another environment."""
    text = metadata.get("env_spec")
    if not text:
        return "not stated"
    try:
        spec = json.loads(text)
        recorded, arguments = spec["id"], spec.get("kwargs") or {}
    except (TypeError, ValueError, KeyError) as problem:
        raise UserError(
            f"{origin}: env_spec in data/metadata.json is not an environment; download it again"
        ) from problem
    if env_id in kitchen_env.ENV_IDS:
        tasks = arguments.get("tasks_to_complete")
        if recorded != "FrankaKitchen-v1" or set(tasks or ()) != set(kitchen_env.ENV_IDS[env_id]):
            raise UserError(
                f"{origin}: recorded in {recorded} with the sub-tasks {tasks}, but params.yaml, {field} is "
                f"{env_id}; set it to the id of these sub-tasks ({', '.join(kitchen_env.MINARI_IDS)})"
            )
    elif recorded != env_id.rpartition(":")[2]:
        raise UserError(
            f"{origin}: recorded in {recorded}, but params.yaml, {field} is {env_id}; set it to {recorded}"
        )
    packages = metadata.get("requirements") or []
    return ", ".join([recorded, *map(str, packages)])


def _description(metadata: dict[str, Any]) -> str:
    authors = metadata.get("author") or []
    names = ", ".join(sorted(authors)) if isinstance(authors, list) else str(authors)
    text = str(metadata.get("description") or "Minari data set")
    return f"{text} (by {names})" if names else text


def _transitions(
    found: Iterable[_Episode], env_id: str, origin: str, field: str
) -> Iterator[Transitions]:
    """Each episode as rows, checked, with the observations after them."""
    for episode in found:
        where = f"{origin}: {episode.name}"
        for key, values in episode.observations.items():
            columns.check(
                "observation",
                values.shape,
                values.dtype,
                f"{where}/observations{key and '/' + key}",
            )
        for name, part in zip(("action", "reward", "terminated", "truncated"), PARTS, strict=True):
            values = getattr(episode, part)
            columns.check(name, values.shape, values.dtype, f"{where}/{part}")
        steps = len(episode.rewards)
        for part, values in (*episode.observations.items(), *zip(PARTS, episode[2:], strict=True)):
            wanted = steps if part in PARTS else steps + 1
            if len(values) != wanted:
                name = part if part in PARTS else f"observations {part}".strip()
                raise UserError(
                    f"{where}: {name} has {len(values)} rows, but {wanted} belong to {steps} rewards; "
                    "download it again"
                )
        flat = np.concatenate(
            [values for _, values in sorted(episode.observations.items())], axis=1
        )
        seen: Float = flat.astype(np.float32)
        rows = columns.as_rows(seen[:-1], *episode[2:])
        columns.end_last(rows)
        check_widths(rows, envs.spec(env_id).widths, env_id, where, field)
        if steps:
            yield Transitions(rows, seen[1:])


def _hdf5(
    folder: Path, origin: str, total: int, keys: tuple[str, ...] | None
) -> Iterator[_Episode]:
    with hdf5.opened(folder / "main_data.hdf5", f"{origin}/data/main_data.hdf5") as file:
        _check_total(len(file), total, origin)
        if total and "episode_0/observations" in file and keys is None:
            first = file["episode_0/observations"]
            keys = tuple(first) if isinstance(first, h5py.Group) else ("",)
        for name in (f"episode_{number}" for number in range(total)):
            yield _Episode(
                name,
                {
                    key: hdf5.array(file, f"{name}/observations/{key}".rstrip("/"), origin)
                    for key in keys or ("",)
                },
                *(hdf5.array(file, f"{name}/{part}", origin) for part in PARTS),
            )


def _arrow(
    folder: Path, origin: str, total: int, keys: tuple[str, ...] | None
) -> Iterator[_Episode]:
    _check_total(sum(child.is_dir() for child in folder.iterdir()), total, origin)
    for number in range(total):
        name = f"data/{number}"
        try:
            tables = []
            for file in sorted((folder / str(number)).glob("*.arrow")):
                with pa.memory_map(str(file)) as source:
                    tables.append(pa.ipc.open_file(source).read_all())
            table = pa.concat_tables(tables)
            column = {
                part: table.column(part).combine_chunks() for part in ("observations", *PARTS)
            }
            seen = column["observations"]
            if isinstance(seen, pa.StructArray):
                names = keys or tuple(part.name for part in seen.type)
                parts = {key: _matrix(seen.field(key)) for key in names}
            else:
                parts = {"": _matrix(seen)}
            yield _Episode(
                name,
                parts,
                _matrix(column["actions"])[:-1],
                *(column[part].to_numpy(zero_copy_only=False)[:-1] for part in PARTS[1:]),
            )
        except (pa.ArrowException, OSError, KeyError) as problem:
            reason = str(problem).splitlines()[0]
            raise UserError(
                f"{origin}: {name} is not a complete episode ({reason}); download it again"
            ) from problem


def _matrix(values: pa.Array) -> NDArray[Any]:
    """(rows, numbers) of a column of fixed-size lists; any other column as it is, to be refused."""
    if not pa.types.is_fixed_size_list(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(values), values.type.list_size))


def _check_total(found: int, total: int, origin: str) -> None:
    if found != total:
        raise UserError(
            f"{origin}: data/metadata.json tells of {total} episodes, but there are {found}; "
            "download it again"
        )
