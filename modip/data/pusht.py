"""Human PushT demonstrations: recorded states and absolute pixel targets to what the env takes.

Two forms: the official zip (https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip, a Zarr group of states,
actions and pictures, which are not read), and Parquet in the episode schema. The zip has no rewards. They are computed
from the poses as the environment would have: a row's reward is that of the pose it leads to, clip(coverage of the
next row / 0.95, 0, 1); an episode's last row repeats its own coverage, since where it led was not recorded. No
demonstration covers 0.95 in a recorded pose: all are truncated.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modip.data import episodes
from modip.data.episodes import DatasetInfo, Episodes, Float, Recording
from modip.data.sources import PushTSource
from modip.envs import pusht
from modip.errors import UserError

SUCCESS = 0.95
"""Coverage at which the environment ends an episode; its reward is coverage over this."""


def convert(dataset: str, config: PushTSource, path: Path, sha256: str) -> Recording:
    """Reads the recording and gives features and agent-relative actions."""
    with path.open("rb") as file:
        official = file.read(4) == b"PK\3\4"
    raw = _official(dataset, config, path) if official else episodes.read(path)
    shape = (raw.observation.shape[1], raw.action.shape[1])
    if shape != (5, 2):
        raise UserError(
            f"{config.path}: observation and action have {shape[0]} and {shape[1]} numbers; PushT "
            "recordings have 5 (agent xy, block xy, angle) and 2 (target xy)"
        )
    agent, first = raw.observation[:, :2], raw.starts[:-1]
    previous = np.roll(agent, 1, axis=0)
    previous[first] = agent[first]
    observation = pusht.features(raw.observation, previous)
    return replace(
        raw,
        info=replace(raw.info, dataset=dataset, sha256=sha256),
        observation=observation,
        action=pusht.relative_action(raw.action, agent, raw.observation[:, 4]),
        reward=_rewards(observation[:, -1], raw.truncated) if official else raw.reward,
    ).recording


def _rewards(coverage: Float, ends: episodes.Flags) -> Float:
    """Rewards (N,) of rows with these coverages (N,), given which are the last of their episode (N,)."""
    next_coverage = np.where(ends, coverage, np.roll(coverage, -1))
    rewards: Float = np.clip(next_coverage / SUCCESS, 0.0, 1.0).astype(np.float32)
    return rewards


def _official(dataset: str, config: PushTSource, path: Path) -> Episodes:
    """The zip's states and targets; rewards still 0. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            group = _group(archive)
            state, action = (
                _array(archive, group + name) for name in ("data/state", "data/action")
            )
            ends = _array(archive, group + "meta/episode_ends")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, OSError, EOFError) as problem:
        reason = problem.args[0] if problem.args else type(problem).__name__
        raise UserError(
            f"{config.path}: not the official PushT recording ({reason}); download it again"
        ) from problem
    rows = len(state)
    lengths = np.diff(ends, prepend=0)
    if action.shape[:1] != (rows,) or not len(ends) or (lengths < 1).any() or ends[-1] != rows:
        raise UserError(
            f"{config.path}: data/state has {rows} rows, data/action {len(action)}, and meta/episode_ends "
            f"ends at {ends[-1] if len(ends) else 'none'}; they must agree: download it again"
        )
    truncated = np.zeros(rows, np.bool_)
    truncated[ends - 1] = True
    return Episodes(
        info=DatasetInfo(
            dataset=dataset,
            env_id=config.env,
            env_version="not stated (the authors' own, of 2023)",
            source=config.path,
            licence="MIT, Columbia Artificial Intelligence and Robotics Lab",
            sha256="",
            description="Human PushT demonstrations of the diffusion-policy paper; rewards computed from the poses.",
        ),
        observation=state.astype(np.float32),
        action=action.astype(np.float32),
        reward=np.zeros(rows, np.float32),
        terminated=np.zeros(rows, np.bool_),
        truncated=truncated,
        episode_id=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        step=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
    )


def _group(archive: zipfile.ZipFile) -> str:
    """Where in the zip the group of arrays lies."""
    ending = "data/state/.zarray"
    found = [name for name in archive.namelist() if name.endswith(ending)]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} arrays data/state")
    return found[0].removesuffix(ending)


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """A whole array of Zarr format 2, split along its first axis only, compressed by Blosc or not at all.

    Not by numcodecs' registry of codecs: that has one which unpickles.
    """
    told = json.loads(archive.read(f"{name}/.zarray"))
    shape, chunks = tuple(told["shape"]), tuple(told["chunks"])
    dtype, compressor = np.dtype(told["dtype"]), (told["compressor"] or {}).get("id")
    if (told["zarr_format"], told["order"], told["filters"]) != (2, "C", None) or (
        chunks[1:] != shape[1:] or dtype.kind not in "fiu" or compressor not in (None, "blosc")
    ):
        raise ValueError(f"{name} is stored in a form that is not known")
    parts = []
    for chunk in range(math.ceil(shape[0] / chunks[0])):
        key = ".".join([str(chunk)] + ["0"] * (len(shape) - 1))
        data = archive.read(f"{name}/{key}")
        if compressor is not None:
            data = _decompressed(data, f"{name}/{key}")
        parts.append(np.frombuffer(data, dtype).reshape(chunks))
    return np.concatenate(parts)[: shape[0]]


def _decompressed(data: bytes, name: str) -> bytes:
    from numcodecs import blosc  # a third of a second, which only this form has to spend

    try:
        return bytes(blosc.decompress(data))
    except RuntimeError as problem:
        raise ValueError(f"{name} is damaged") from problem
