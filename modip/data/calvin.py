"""CALVIN's play data: one .npz per time step, from the folder or straight from the official zip.

Layout (mees/calvin, dataset/README.md; written by calvin_env/datarenderer.py): SPLIT/episode_0000000.npz with
robot_obs (15), scene_obs (24), rel_actions (7) and pictures, which are never read; SPLIT/ep_start_end_ids.npy, first
and last frame of every recording; SPLIT/lang_annotations/auto_lang_ann.npy, what was done from frame to frame.

Observation: robot_obs, then scene_obs, as calvin_env resets from them. Action: rel_actions, already in [-1, 1].
Play has no reward. The reward is 1 at the last frame of a stretch annotated with the environment's task, 0 elsewhere.
The annotations come from the task oracle itself, so there the task is done; it may have been done up to 16 frames
before. `take: play` keeps whole recordings, which are all truncated: play goes on after a task. `take: task` makes
every stretch of the task an episode that ends in success, terminated.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from modip.data import pickles, zips
from modip.data.episodes import DatasetInfo, Float, Recording, Rows, Segment
from modip.data.sources import CalvinSource
from modip.data.zips import Member
from modip.errors import UserError

BLOCK = 4096
ROBOT, SCENE, ACTION = 15, 24, 7
_ARRAYS = {b"robot_obs.npy": ROBOT, b"scene_obs.npy": SCENE, b"rel_actions.npy": ACTION}
_STEP = struct.Struct("<LQLLHL")
"""A time step in a zip: its number, then Member without the name. 26 bytes, for there may be millions."""
_RECORDINGS = "ep_start_end_ids.npy"
_LANGUAGE = "lang_annotations/auto_lang_ann.npy"


class _Stretch(NamedTuple):
    """Frames of one episode; `reward` has those with reward 1."""

    first: int
    last: int  # inclusive
    reward: frozenset[int]


class _Annotation(NamedTuple):
    first: int
    last: int  # inclusive
    task: str
    text: str


class _Split(Protocol):
    """The files of training/ or validation/."""

    def file(self, name: str) -> bytes | None:
        """A whole small file, None where there is none."""

    def frame(self, number: int) -> dict[bytes, bytes]:
        """The .npy files of one time step. Raises OSError or zipfile.BadZipFile."""


def convert(dataset: str, config: CalvinSource, root: Path, sha256: str) -> Recording:
    """Observation (39,): robot_obs and scene_obs; action (7,): rel_actions."""
    split = _zip(root, config) if root.is_file() else _folder(root, config)
    recordings = _recordings(split, config)
    annotations = [_clipped(one, recordings, config) for one in _annotations(split, config)]
    task = config.env.partition("-")[2]
    own = [one for one in annotations if one.task == task]
    if config.take == "task":
        if not own:
            known = ", ".join(sorted({one.task for one in annotations})) or "none"
            raise UserError(
                f"{config.path}: {config.split}/ has no stretch annotated {task}; correct "
                f"data.{dataset}.env or take: play (annotated: {known})"
            )
        stretches = [_Stretch(one.first, one.last, frozenset([one.last])) for one in own]
        segments = [
            Segment(episode, 0, one.last - one.first, one.task, one.text)
            for episode, one in enumerate(own)
        ]
    else:
        ends = frozenset(one.last for one in own)
        stretches = [_Stretch(first, last, ends) for first, last in recordings.tolist()]
        segments = []
        for one in annotations:
            episode = int(np.searchsorted(recordings[:, 0], one.first, "right")) - 1
            start = int(recordings[episode, 0])
            segments.append(
                Segment(episode, one.first - start, one.last - start, one.task, one.text)
            )
    info = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version="not stated",
        source=config.path,
        licence="not stated (CALVIN's code is MIT)",
        sha256=sha256,
        description=f"CALVIN {config.split} data, {config.take}: robot_obs and scene_obs; reward 1 where a stretch "
        f"annotated {task} ends, else 0.",
    )
    rows = _rows(split, stretches, config.take == "task", config)
    return Recording(info, rows, tuple(segments))


def _rows(
    split: _Split, stretches: list[_Stretch], success: bool, config: CalvinSource
) -> Iterator[Rows]:
    for first, last, reward in stretches:
        for begin in range(first, last + 1, BLOCK):
            frames = range(begin, min(begin + BLOCK, last + 1))
            values = _values(split, frames, config)
            at_end = np.array([number == last for number in frames])
            yield Rows(
                observation=values[:, :-ACTION],
                action=values[:, -ACTION:],
                reward=np.array([number in reward for number in frames], np.float32),
                terminated=at_end & success,
                truncated=at_end & (not success),
            )


def _values(split: _Split, frames: range, config: CalvinSource) -> Float:
    """robot_obs, scene_obs and rel_actions of consecutive frames (N, 46)."""
    values = np.empty((len(frames), sum(_ARRAYS.values())), np.float32)
    for row, number in enumerate(frames):
        name = f"{config.path}: {config.split}/episode_{number:07d}.npz"
        try:
            found = split.frame(number)
            column = 0
            for key, width in _ARRAYS.items():
                what = key.decode().removesuffix(".npy")
                if key not in found:
                    raise ValueError(f"{what} is missing")
                part = zips.array(found[key])
                if part.shape != (width,) or part.dtype.kind not in "fiu":
                    raise ValueError(f"{what} is {part.dtype}{part.shape}, not {width} numbers")
                values[row, column : column + width] = part
                column += width
        except FileNotFoundError as problem:
            raise UserError(
                f"{name}: no such file; {_RECORDINGS} lists it, so the data are incomplete: "
                "unpack or download them again"
            ) from problem
        except (ValueError, OSError, zipfile.BadZipFile) as problem:
            raise UserError(f"{name}: {problem}; unpack or download the data again") from problem
    action = values[:, -ACTION:]
    if (np.abs(action) > 1.0).any():
        row, component = np.argwhere(np.abs(action) > 1.0)[0].tolist()
        raise UserError(
            f"{config.path}: {config.split}/episode_{frames[row]:07d}.npz: rel_actions[{component}] is "
            f"{action[row, component]}, outside [-1, 1]; CALVIN scales them to it"
        )
    return values


def _recordings(split: _Split, config: CalvinSource) -> NDArray[np.int64]:
    """First and last frame (inclusive) of every recording (N, 2), in order."""
    name = f"{config.path}: {config.split}/{_RECORDINGS}"
    try:
        data = split.file(_RECORDINGS)
        if data is None:
            raise UserError(f"{name}: no such file; path must hold CALVIN's {config.split}/")
        ids = zips.array(data)
    except (ValueError, OSError, zipfile.BadZipFile) as problem:
        raise UserError(f"{name}: {problem}; download the data again") from problem
    if ids.ndim != 2 or ids.shape[1] != 2 or ids.dtype.kind not in "iu" or not len(ids):
        raise UserError(f"{name}: shape {ids.shape} of {ids.dtype} is not a list of frame pairs")
    ids = ids[np.argsort(ids[:, 0])].astype(np.int64)
    if (ids[:, 1] < ids[:, 0]).any() or (ids[1:, 0] <= ids[:-1, 1]).any():
        raise UserError(f"{name}: recordings overlap or end before they begin")
    return ids


def _annotations(split: _Split, config: CalvinSource) -> list[_Annotation]:
    """What was done, as annotated; none where there is no such file."""
    try:
        data = split.file(_LANGUAGE)
        if data is None:
            return []
        found = pickles.array_of_objects(data[10 + int.from_bytes(data[8:10], "little") :])
        language, frames = found["language"], found["info"]["indx"]
        return [
            _Annotation(pickles.integer(first), pickles.integer(last), str(task), str(text))
            for task, text, (first, last) in zip(
                language["task"], language["ann"], frames, strict=True
            )
        ]
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as problem:
        raise UserError(
            f"{config.path}: {config.split}/{_LANGUAGE}: {problem}; download the data again"
        ) from problem


def _clipped(one: _Annotation, recordings: NDArray[np.int64], config: CalvinSource) -> _Annotation:
    """The annotation without the frame that upstream counts beyond the end of a recording."""
    episode = int(np.searchsorted(recordings[:, 0], one.first, "right")) - 1
    if episode < 0 or one.first > recordings[episode, 1] or one.last < one.first:
        raise UserError(
            f"{config.path}: {config.split}/{_LANGUAGE}: frames {one.first} to {one.last} ({one.task}) lie in no "
            f"recording of {_RECORDINGS}; download the data again"
        )
    return one._replace(last=min(one.last, int(recordings[episode, 1])))


class _FolderSplit:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.is_file() else None

    def frame(self, number: int) -> dict[bytes, bytes]:
        descriptor = os.open(f"{self._folder}/episode_{number:07d}.npz", os.O_RDONLY)
        try:
            return _arrays(zips.within(descriptor), os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)


def _arrays(read: zips.Read, size: int) -> dict[bytes, bytes]:
    """The .npy files we want of an .npz; the pictures are not touched."""
    found = {}
    for member in zips.members(read, size):
        if member.name in _ARRAYS:
            found[member.name] = zips.content(read, member)
            if len(found) == len(_ARRAYS):
                break
    return found


class _ZipSplit:
    """A split inside the official zip, whose time steps are .npz archives themselves."""

    def __init__(self, path: Path, split: str) -> None:
        self._file = path.open("rb")
        self._read = zips.within(self._file.fileno())
        self._files: dict[str, Member] = {}
        table = bytearray()
        for member in zips.members(self._read, path.stat().st_size):
            before, found, name = member.name.decode(errors="replace").rpartition(f"{split}/")
            if not found or (before and not before.endswith("/")):
                continue
            if re.fullmatch(r"episode_\d{7}\.npz", name, re.ASCII) and member.size < 2**32:
                table += _STEP.pack(int(name[8:15]), *member[1:])
            elif name in (_RECORDINGS, _LANGUAGE):
                self._files[name] = member
        frames = np.frombuffer(table, np.uint8).reshape(-1, _STEP.size)
        numbers = frames[:, :4].copy().view("<u4")[:, 0].astype(np.int64)
        order = np.argsort(numbers)
        self._numbers, self._frames = numbers[order], frames[order]

    def file(self, name: str) -> bytes | None:
        member = self._files.get(name)
        return None if member is None else zips.content(self._read, member)

    def frame(self, number: int) -> dict[bytes, bytes]:
        row = int(np.searchsorted(self._numbers, number))
        if row == len(self._numbers) or self._numbers[row] != number:
            raise FileNotFoundError(number)
        member = Member(b"episode", *_STEP.unpack(self._frames[row])[1:])
        if member.method == zipfile.ZIP_STORED:
            inner = zips.within(self._file.fileno(), zips.start_of(self._read, member))
            return _arrays(inner, member.size)
        whole = zips.content(self._read, member)
        return _arrays(lambda offset, length: whole[offset : offset + length], len(whole))


def _zip(path: Path, config: CalvinSource) -> _Split:
    try:
        return _ZipSplit(path, config.split)
    except (zipfile.BadZipFile, OSError) as problem:
        raise UserError(f"{config.path}: {problem}; download it again") from problem


def _folder(root: Path, config: CalvinSource) -> _Split:
    """The split's folder, in `root` itself or in the one folder that the zip unpacks to."""
    for folder in (root, *sorted(root.glob("*/"))):
        if (folder / config.split / _RECORDINGS).is_file():
            return _FolderSplit(folder / config.split)
    return _FolderSplit(root / config.split)
