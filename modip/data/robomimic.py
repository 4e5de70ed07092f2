"""RoboMimic's low-dimensional demonstrations (robosuite 1.5) to episodes that end as the environment's do.

Layout: `data` with the attribute `env_args` (JSON: env_name, env_version, env_kwargs); for every
demonstration `data/demo_N`, with attributes num_samples and model_file (the scene as XML), its arrays
actions, rewards and states (the flattened simulator state before each action) and the group obs;
`mask/KEY` lists the demonstrations of a filter key. A reward is that of the state after its action.

Ends. People go on for some ten steps after success, machines to their time limit, while the environment
ends an episode at its first success. So a demonstration is cut after the first row with reward 1, which
is `terminated`; one without success is `truncated` at its last row. RoboMimic's `dones` are not read: they
also mark the last row of a failure. In the dense forms, whose environment goes on to its time limit,
nothing is cut and every demonstration ends `truncated`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from modip.data.episodes import DatasetInfo, Recording, Rows
from modip.data.fidelity import Transition
from modip.data.sources import RobomimicSource
from modip.data.units import fitted
from modip.envs import robosuite
from modip.envs.family import Array
from modip.envs.robosuite import Task
from modip.errors import UserError

RENAMED = {
    "damping": "damping_ratio",
    "damping_limits": "damping_ratio_limits",
    "control_delta": "input_type",
}
"""Controller settings whose name is another one since robosuite 1.5; files keep the old ones."""
STEPS_PER_SCENE = 10
"""Recorded steps that share a scene in `samples`: to load one takes as long as some dozen steps."""


def convert(dataset: str, config: RobomimicSource, root: Path, sha256: str) -> Recording:
    """The demonstrations of one file, or of one of its filter keys, in the order of their numbers.

    Raises UserError for a file that is incomplete, of another task, robosuite or controller, and for
    a filter key that it does not have.
    """
    task = robosuite.task(config.env)
    with _open(config, root) as file:
        version = _check_environment(file, config, task)
        names = _demonstrations(file, config)
    installed = robosuite.installed()
    checked = "not checked: it is not installed" if installed is None else f"{installed} installed"
    which = f"filter key {config.filter_key}" if config.filter_key else "all"
    info = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version=f"robosuite {version} ({checked})",
        source=config.path,
        licence="MIT",
        sha256=sha256,
        description=f"RoboMimic, {len(names)} demonstrations ({which})",
    )
    widths = (task.obs_dim, task.action_dim)
    rows = _rows(config, root, task, names)
    # Commands are in [-1, 1] already; the simulator is not needed to say so.
    field = f"data.{dataset}.env"
    return Recording(info, fitted(rows, widths, np.asarray, config.env, config.path, field))


def samples(config: RobomimicSource, root: Path, count: int) -> Iterator[Transition]:
    """At most `count` recorded steps, from demonstrations drawn at random, always the same, to be taken once more.

    Raises UserError as `convert` does, and where the file has no simulator states.
    """
    rng = np.random.default_rng(0)
    task = robosuite.task(config.env)
    with _open(config, root) as file:
        _check_environment(file, config, task)
        left = count
        for name in rng.permutation(_demonstrations(file, config)):
            demo = _Demonstration(file, str(name), config, task)
            obs, action = demo.observation(), demo.array("actions", 2)
            states = demo.array("states", 2)
            model = demo.attribute("model_file")
            rows = 1 + rng.permutation(max(len(action) - 2, 0))[: min(left, STEPS_PER_SCENE)]
            reward = demo.array("rewards", 1)
            for row in np.sort(rows):
                place = functools.partial(
                    robosuite.place,
                    model=model,
                    before=states[row - 1],
                    state=states[row],
                    past=action[:row],
                )
                yield Transition(
                    restore=place,
                    obs=obs[row],
                    action=action[row].astype(np.float32),
                    reward=float(reward[row]),
                    terminated=not task.dense and bool(robosuite.reached(reward[row])),
                    next_obs=obs[row + 1],
                )
            left -= len(rows)
            if not left:
                return


def _rows(config: RobomimicSource, root: Path, task: Task, names: list[str]) -> Iterator[Rows]:
    with _open(config, root) as file:
        for name in names:
            demo = _Demonstration(file, name, config, task)
            reward = demo.array("rewards", 1)
            solved = np.flatnonzero(robosuite.reached(reward))
            ended = len(solved) > 0 and not task.dense
            length = int(solved[0]) + 1 if ended else len(reward)
            last = np.arange(length) == length - 1
            yield Rows(
                demo.observation()[:length],
                demo.array("actions", 2)[:length].astype(np.float32),
                reward[:length].astype(np.float32),
                last & ended,
                last & (not ended),
            )


class _Demonstration:
    """One demonstration of an open file, its arrays checked when they are read."""

    def __init__(self, file: h5py.File, name: str, config: RobomimicSource, task: Task) -> None:
        self._origin = f"{config.path}: data/{name}"
        self._group, self._task = file["data"][name], task
        self._length = int(self.attribute("num_samples"))

    def attribute(self, name: str) -> Any:
        """An attribute of the demonstration."""
        try:
            return self._group.attrs[name]
        except KeyError as problem:
            raise UserError(
                f"{self._origin} has no attribute {name}; download the file again"
            ) from problem

    def array(self, key: str, dimensions: int) -> NDArray[Any]:
        """All rows of an array: (N,) or (N, width)."""
        try:  # HDF5's own calls: of small arrays, h5py's objects cost three times the reading
            item = h5py.h5d.open(self._group.id, key.encode())
        except (KeyError, ValueError) as problem:
            raise UserError(
                f"{self._origin}/{key} is missing; RoboMimic's low_dim files have it, its raw "
                "files (demo_v15.hdf5) have no obs and rewards: give a low_dim file"
            ) from problem
        shape, kind = item.shape, item.dtype
        if len(shape) != dimensions or shape[0] != self._length or kind.kind not in "fiub":
            raise UserError(
                f"{self._origin}/{key} has shape {shape} of {kind}; num_samples is "
                f"{self._length}: it must be numbers, {dimensions}-dimensional, of that length"
            )
        if self._length == 0:
            raise UserError(
                f"{self._origin} has no rows; remove it, or name others by a filter key"
            )
        rows = np.empty(shape, kind)
        item.read(h5py.h5s.ALL, h5py.h5s.ALL, rows)
        return rows

    def observation(self) -> Array:
        """(N, Do) in the order of the environment."""
        keys = self._task.obs_keys("object")
        parts = [self.array(f"obs/{key}", 2) for key in keys]
        return np.concatenate(parts, axis=1, dtype=np.float32)


@contextlib.contextmanager
def _open(config: RobomimicSource, root: Path) -> Iterator[h5py.File]:
    """The file; what HDF5 finds wrong in it while it is read becomes a UserError."""
    if not root.is_file():
        raise UserError(f"{config.path}: a RoboMimic data set is one HDF5 file; give its path")
    try:
        with h5py.File(root, "r") as file:
            if not isinstance(file.get("data"), h5py.Group):
                raise UserError(f"{config.path}: no group data; this is no RoboMimic file")
            yield file
    except (OSError, RuntimeError) as problem:
        raise UserError(
            f"{config.path}: not a complete HDF5 file ({problem}); download it again"
        ) from problem


def _demonstrations(file: h5py.File, config: RobomimicSource) -> list[str]:
    """Names of the demonstrations asked for, in the order of their numbers."""
    there = {name for name, item in file["data"].items() if isinstance(item, h5py.Group)}
    chosen = there
    if config.filter_key:
        masks = file.get("mask", {})
        if config.filter_key not in masks:
            keys = ", ".join(masks) or "none"
            raise UserError(
                f"{config.path}: no filter key {config.filter_key}; it has {keys}; "
                'set filter_key to one of them, or to "" for all demonstrations'
            )
        chosen = {name.decode() for name in masks[config.filter_key][()]}
    unknown = sorted(chosen - there)
    if unknown:
        raise UserError(
            f"{config.path}: mask/{config.filter_key} names {unknown[0]}, which data does not have; "
            "download the file again"
        )
    if not chosen:
        raise UserError(f"{config.path}: no demonstrations; choose another file or filter key")
    odd = [name for name in chosen if not name.rpartition("_")[2].isdecimal()]
    if odd:
        raise UserError(f"{config.path}: data/{min(odd)} is no demo_NUMBER; rename or remove it")
    return sorted(chosen, key=lambda name: int(name.rpartition("_")[2]))


def _check_environment(file: h5py.File, config: RobomimicSource, task: Task) -> str:
    """Compares `env_args` with the environment of params.yaml; gives the version of robosuite."""
    try:
        told = json.loads(file["data"].attrs["env_args"])
        name, kwargs = told["env_name"], told["env_kwargs"]
        version = str(told.get("env_version", "older than 1.4"))
        settings = _settings(kwargs)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise UserError(
            f"{config.path}: the attribute env_args of data does not describe an environment "
            f"({problem!r}); give a file of RoboMimic's v1.5 release"
        ) from problem
    if name != task.name:
        ids = [env_id for env_id, one in robosuite.TASKS.items() if one.name == name]
        raise UserError(
            f"{config.path}: recorded in {name}, but params.yaml asks for {config.env}; "
            f"set env to {' or '.join(ids) or 'no robosuite task that modip has'}"
        )
    installed = robosuite.installed()
    if not robosuite.of_release(version):
        raise UserError(
            f"{config.path}: recorded in robosuite {version}, but {config.env} is a task of "
            f"robosuite {robosuite.RELEASE} ({installed or 'none'} installed), whose observations "
            "and dynamics differ; give the low_dim_v15 file of this task"
        )
    if installed is not None and not robosuite.of_release(installed):
        raise UserError(
            f"{config.path}: recorded in robosuite {version}, but robosuite {installed} is "
            "installed; `make robosuite` gives an environment with the right one"
        )
    wanted = {
        "control_freq": robosuite.CONTROL_HZ,
        "reward_shaping": task.dense,
        **robosuite.CONTROLLER,
    }
    for key, value in settings:
        if key in wanted and value != wanted[key]:
            raise UserError(
                f"{config.path}: recorded with {key} {value}, but {config.env} has {wanted[key]}; "
                + (
                    "its dense and sparse forms are ids of their own: set env to the other one"
                    if key == "reward_shaping"
                    else "give a file with RoboMimic's own settings"
                )
            )
    return version


def _settings(kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """What robosuite was told of the environment and of every arm's controller, by today's names."""
    given = kwargs["controller_configs"]
    found = list(kwargs.items())
    for controller in given if isinstance(given, list) else [given]:
        arm = controller.get("body_parts", {}).get("right", controller)
        for key, value in arm.items():
            named = RENAMED.get(key, key)
            absolute = named == "input_type" and value is False
            delta = named == "input_type" and value is True
            found.append((named, "absolute" if absolute else "delta" if delta else value))
    return found
