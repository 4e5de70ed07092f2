"""The stages download and convert as programs: from params.yaml to an episode file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from modip.data import episodes
from pipeline import convert, download, stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the project's own params.yaml; its `path` entries as in a clone."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "samples").symlink_to(ROOT / "data" / "samples")
    return tmp_path


def change(folder: Path, dataset: str, **values: Any) -> None:
    yaml = YAML()
    tree = yaml.load(folder / "params.yaml")
    tree["data"][dataset].update(values)
    yaml.dump(tree, folder / "params.yaml")


class Program:
    """Runs stages in this process, in the working folder; gives exit status and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, module: ModuleType, dataset: str) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", ["stage", "--dataset", dataset])
        status = stage.run(stage.parser(module.__doc__, "dataset"), module.body)
        return status, self._capsys.readouterr().err


@pytest.fixture
def program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Program]:
    monkeypatch.chdir(folder)
    # stage.run sets up the process it expects to own: put back what other tests would notice.
    for name in stage.QUIET:
        monkeypatch.setenv(name, stage.QUIET[name])
    threads, handlers, level = torch.get_num_threads(), logging.root.handlers, logging.root.level
    kept = list(handlers)
    logging.root.handlers = []
    yield Program(monkeypatch, capsys)
    logging.root.handlers = kept
    logging.root.setLevel(level)
    torch.set_num_threads(threads)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk is like: no file can grow beyond `size`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def error_line(status: int, stderr: str) -> str:
    """Bad input: status 2, and the only line of the kind."""
    assert status == 2, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in stderr
    return lines[0]


def test_toy_from_nothing_to_episodes(folder: Path, program: Program) -> None:
    change(folder, "toy", episodes=6)
    assert program(download, "toy")[0] == 0
    raw = folder / "data" / "raw" / "toy" / "source.parquet"
    record = json.loads(raw.with_name("source.json").read_text())
    assert record["sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()
    assert record["episodes"] == 6
    status, stderr = program(convert, "toy")
    assert status == 0
    assert "6 episodes, 120 steps" in stderr
    made = episodes.read(folder / "data" / "episodes" / "toy.parquet")
    assert made.info.sha256 == record["sha256"]
    facts = json.loads((folder / "data" / "episodes" / "toy.json").read_text())
    replayed = {name: facts.pop(name) for name in list(facts) if name.startswith("fidelity_")}
    assert facts == episodes.statistics(made.recording)
    assert replayed["fidelity_transitions"] == 120
    assert replayed["fidelity_obs_error_p95"] < 1e-5
    assert "120 recorded steps replayed" in stderr
    first = raw.read_bytes()
    assert program(download, "toy")[0] == 0  # the same bytes again
    assert raw.read_bytes() == first


@pytest.mark.parametrize("dataset", ["pusht-human", "hopper-surrogate-medium"])
def test_embedded_samples(folder: Path, program: Program, dataset: str) -> None:
    for module in (download, convert):
        status, stderr = program(module, dataset)
        assert status == 0, stderr
    made = episodes.read(folder / "data" / "episodes" / f"{dataset}.parquet")
    assert made.info.dataset == dataset
    assert abs(made.action).max() <= 1


def test_bad_input_is_one_line(folder: Path, program: Program) -> None:
    missing = error_line(*program(convert, "toy"))
    assert "data/raw/toy/source.json" in missing
    assert "download" in missing
    assert "no-such-set" in error_line(*program(download, "no-such-set"))
    change(folder, "hopper-surrogate-medium", path="nowhere/mine.parquet")
    wrong = error_line(*program(download, "hopper-surrogate-medium"))
    assert "data.hopper-surrogate-medium.path" in wrong
    assert "nowhere/mine.parquet" in wrong
    (folder / "mine.parquet").write_text("not Parquet")
    change(folder, "hopper-surrogate-medium", path="mine.parquet")
    assert program(download, "hopper-surrogate-medium")[0] == 0
    broken = error_line(*program(convert, "hopper-surrogate-medium"))
    assert broken.startswith("error: mine.parquet: not a complete Parquet file")
    assert not (folder / "data" / "episodes").exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    folder: Path, program: Program
) -> None:
    for module, target in (
        (download, "raw/pusht-human/source.parquet"),
        (convert, "episodes/pusht-human.parquet"),
    ):
        with largest_file(50_000):
            line = error_line(*program(module, "pusht-human"))
        assert target in line
        assert "free disk space" in line
        assert not (folder / "data" / target).exists()
        assert list((folder / "data" / target).parent.iterdir()) == []
        assert program(module, "pusht-human")[0] == 0


def test_as_a_program(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.convert", "--dataset", "toy"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == ""
    assert "source.json" in error_line(done.returncode, done.stderr)
