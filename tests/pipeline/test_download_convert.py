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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from modip.config import SECTIONS
from modip.data import episodes, parquet
from modip.data.episodes import Recording
from pipeline import convert, download, stage
from tests.helpers import episodes as toy_episodes
from tests.pipeline.test_end_to_end import Clone
from tests.web import Fault, Host, serving

ROOT = Path(__file__).parents[2]
HOPPER = ROOT / "data" / "samples" / "hopper_surrogate_medium.parquet"


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
    facts = json.loads((folder / "data" / "episodes" / "toy.about.json").read_text())
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
        (download, "raw/pusht-human/pusht_human_state.parquet"),
        (convert, "episodes/pusht-human.parquet"),
    ):
        with largest_file(50_000):
            line = error_line(*program(module, "pusht-human"))
        assert target in line
        assert "free disk space" in line
        assert not (folder / "data" / target).exists()
        assert list((folder / "data" / target).parent.iterdir()) == []
        assert program(module, "pusht-human")[0] == 0


def entry(folder: Path, dataset: str, path: str) -> None:
    """A data set of the Hopper sample's kind under another id."""
    yaml = YAML()
    tree = yaml.load(folder / "params.yaml")
    tree["data"][dataset] = {"source": "parquet", "env": "Hopper-v5", "path": path}
    for name in SECTIONS:
        tree[name]["by_dataset"][dataset] = {}
    yaml.dump(tree, folder / "params.yaml")


def told(folder: Path, dataset: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        (folder / "data" / "raw" / dataset / "source.json").read_text()
    )
    return record


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Host({"/v2/hopper.parquet": HOPPER.read_bytes()})) as made:
        yield made


def test_a_download_under_a_nested_id(folder: Path, program: Program, host: Host) -> None:
    url = f"{host.url}/v2/hopper.parquet"
    entry(folder, "d4rl/hopper-medium-v2", url)
    status, stderr = program(download, "d4rl/hopper-medium-v2")
    assert status == 0, stderr
    assert "d4rl/hopper-medium-v2: download 5/5 MB" in stderr
    record = told(folder, "d4rl/hopper-medium-v2")
    assert record["root"] == "data/raw/d4rl/hopper-medium-v2/hopper.parquet"
    sha256 = hashlib.sha256(HOPPER.read_bytes()).hexdigest()
    assert record["sha256"] == sha256
    assert json.loads((folder / "data" / "checksums.json").read_text()) == {url: sha256}
    status, stderr = program(convert, "d4rl/hopper-medium-v2")
    assert status == 0, stderr
    made = episodes.read(folder / "data" / "episodes" / "d4rl" / "hopper-medium-v2.parquet")
    assert made.info.sha256 == sha256
    host.files = {"/v2/hopper.parquet": b"another"}
    shutil.rmtree(folder / "data" / "raw")
    status, stderr = program(download, "d4rl/hopper-medium-v2")  # here and whole: not asked for
    assert status == 0, stderr
    assert len(host.seen) == 1
    assert told(folder, "d4rl/hopper-medium-v2") == record
    shutil.rmtree(folder / "scratch")
    line = error_line(*program(download, "d4rl/hopper-medium-v2"))
    assert "changed upstream" in line
    assert "data/checksums.json" in line


def test_no_network_is_one_line(folder: Path, program: Program, host: Host) -> None:
    entry(folder, "far", f"{host.url}/v1/hopper.parquet")
    line = error_line(*program(download, "far"))
    assert "data.far.path in params.yaml" in line
    assert not (folder / "data" / "raw" / "far").exists()


def test_a_killed_download_goes_on(folder: Path, program: Program, host: Host) -> None:
    size = len(HOPPER.read_bytes())
    entry(folder, "far", f"{host.url}/v2/hopper.parquet")
    host.faults = [Fault(after=size // 2, hold=threading.Event())]
    running = subprocess.Popen(
        [sys.executable, "-m", "pipeline.download", "--dataset", "far"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert host.reached.wait(60)
        scratch = folder / "scratch" / "downloads"
        while sum(part.stat().st_size for part in scratch.rglob("*.part")) < size // 2 - 8192:
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
        assert host.faults == []
    kept = sum(part.stat().st_size for part in scratch.rglob("*.part"))
    assert not (folder / "data" / "raw" / "far").exists()
    status, stderr = program(download, "far")
    assert status == 0, stderr
    assert host.seen[-1].range == f"bytes={kept}-"
    assert host.seen[-1].sent == size - kept
    assert (folder / "data/raw/far/hopper.parquet").read_bytes() == HOPPER.read_bytes()
    assert list(scratch.rglob("*.part")) == []


@pytest.mark.e2e
def test_another_clone_restores_what_one_has_got(tmp_path: Path, host: Host) -> None:
    """A stage that is forced asks nobody, and a spoilt download is noticed, also where DVC's cache is the same file."""
    episodes.write(tmp_path / "far.parquet", toy_episodes().recording)
    body = host.files["/far.parquet"] = (tmp_path / "far.parquet").read_bytes()
    clones = []
    for name in ("one", "two"):
        clone = Clone(tmp_path / name)
        clone.env["no_proxy"] = "127.0.0.1"
        clone.params["dataset"] = ["far"]
        source = {"source": "parquet", "env": "modip/Toy-v0", "path": f"{host.url}/far.parquet"}
        clone.params["data"]["far"] = source
        clone.save()
        settings = f"[cache]\n    dir = {tmp_path / 'cache'}\n    type = hardlink\n"
        (clone.folder / ".dvc" / "config.local").write_text(settings)
        clones.append(clone)
    one, two = clones
    stages = {"download@far", "convert@far"}
    ran, text = one.repro("convert")
    assert ran >= stages, text
    ran, text = two.repro("convert")
    assert not ran & stages, text
    assert not (two.folder / "scratch").exists()
    for name in ("raw/far/far.parquet", "episodes/far.parquet", "episodes/far.json", "episodes/far.about.json"):  # fmt: skip
        assert (two.folder / "data" / name).read_bytes() == (
            one.folder / "data" / name
        ).read_bytes()
    ran, text = one.repro("-f", "-s", "download@far")
    assert ran == {"download@far"}, text
    assert len(host.seen) == 1
    (kept,) = (one.folder / "scratch" / "downloads").rglob("far.parquet")
    raw = one.folder / "data" / "raw" / "far" / "far.parquet"
    assert kept.samefile(raw)
    mode = kept.stat().st_mode
    kept.chmod(0o644)
    kept.write_bytes(bytes(len(body)))
    kept.chmod(mode)
    ran, text = one.repro("-f", "-s", "download@far")
    assert "it is fetched again" in text
    assert len(host.seen) == 2
    assert raw.read_bytes() == kept.read_bytes() == body
    shutil.rmtree(two.folder / "data" / "raw")
    ran, text = two.repro("convert")
    assert not ran & stages, text
    assert (two.folder / "data" / "raw" / "far" / "far.parquet").read_bytes() == body


def test_a_local_file_keeps_its_name(folder: Path, program: Program) -> None:
    shutil.copy(HOPPER, folder / "my hopper.parquet")
    for path in ("my hopper.parquet", f"{folder.as_uri()}/my%20hopper.parquet"):
        entry(folder, "mine", path)
        status, stderr = program(download, "mine")
        assert status == 0, stderr
        assert "a change there will not be seen" in " ".join(stderr.split())
        assert told(folder, "mine")["root"] == "data/raw/mine/my hopper.parquet"
        assert program(convert, "mine")[0] == 0
    (folder / "my hopper.parquet").rename(folder / "other.parquet")
    entry(folder, "mine", "other.parquet")
    assert program(download, "mine")[0] == 0
    names = sorted(path.name for path in (folder / "data" / "raw" / "mine").iterdir())
    assert names == ["other.parquet", "source.json"]
    shutil.copy(HOPPER, folder / "source.json")
    entry(folder, "mine", "source.json")
    assert "source.json" in error_line(*program(download, "mine"))


def test_a_local_folder_is_read_in_place(
    folder: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = folder / "recorded"
    (own / "b").mkdir(parents=True)
    shutil.copy(HOPPER, own / "b" / "rows.parquet")
    (own / "a.txt").write_text("one")
    entry(folder, "mine", "recorded")
    status, stderr = program(download, "mine")
    assert status == 0, stderr
    record = told(folder, "mine")
    facts = (own / "a.txt").stat()
    assert record["root"] == "recorded"
    assert list(record["files"]) == ["a.txt", "b/rows.parquet"]
    assert record["files"]["a.txt"] == f"3 {facts.st_mtime_ns}"
    assert [path.name for path in (folder / "data" / "raw" / "mine").iterdir()] == ["source.json"]

    def rows(dataset: str, config: Any, root: Path, sha256: str) -> Recording:
        assert (str(root), sha256) == ("recorded", record["sha256"])
        return parquet.convert(dataset, config, root / "b" / "rows.parquet", sha256)

    monkeypatch.setitem(convert.CONVERTERS, "parquet", rows)
    assert program(convert, "mine")[0] == 0
    for change_it, undo, what in (
        (lambda: (own / "a.txt").write_text("three"), lambda: (own / "a.txt").write_text("one"), "a.txt has changed"),
        (lambda: (own / "c").touch(), lambda: (own / "c").unlink(), "c is new"),
        (lambda: (own / "a.txt").rename(folder / "a"), lambda: (folder / "a").rename(own / "a.txt"), "a.txt is gone"),
    ):  # fmt: skip
        change_it()
        line = error_line(*program(convert, "mine"))
        assert f"recorded: {what}" in line
        assert "dvc repro -f download@mine" in line
        undo()
        os.utime(own / "a.txt", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert program(convert, "mine")[0] == 0
    (folder / "empty").mkdir()
    entry(folder, "mine", "empty")
    assert "empty" in error_line(*program(download, "mine"))


@pytest.mark.parametrize("dataset", ["a.b", "../x", "/x", "x/", "a b", "toy/small", ""])
def test_ids_that_cannot_name_a_folder(folder: Path, program: Program, dataset: str) -> None:
    entry(folder, dataset, "data/samples/hopper_surrogate_medium.parquet")
    assert repr(dataset) in error_line(*program(download, "toy"))


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
