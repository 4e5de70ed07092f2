"""The whole job as a user runs it: `dvc repro` in a clone of its own, changed, killed, and given wrong input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from modip.data import episodes as files
from pipeline import convert, download, stage
from tests.helpers import ROOT, episodes, small_tree, table

CLONED = (
    "modip", "pipeline", "dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore",
    "data/own",
    "data/samples",
)  # fmt: skip
TRAINED = {"diffusion.updates": 900, "world_model.updates": 450, "critics.updates": 450, "modip.env_steps": 300}  # fmt: skip
CELLS = {
    f"{name}@toy{item}"
    for name, items in (
        ("resolve", [""]),
        ("download", [""]),
        ("convert", [""]),
        ("pretrain_bc", ["-0"]),
        ("pretrain_model", ["-0"]),
        ("finetune", ["-bc-0", "-modip-0"]),
        ("evaluate", ["-bc-0", "-modip-0"]),
    )
    for item in items
}


def tree() -> dict[str, Any]:
    """The toy data set, and another one that is not run."""
    params = small_tree({**TRAINED, "modip.final_env_steps": 80})
    params["runtime"]["checkpoint_seconds"] = 0.1
    params["data"]["other"] = {**params["data"]["toy"], "seed": 8}
    return params


class Clone:
    """A repository of its own, with small parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in CLONED:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        self.params = tree()
        self.save()
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "tmp" / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.env.pop("PYTHONPATH", None)  # the clone's own code
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as cloned"]):
            subprocess.run([*git, *command], cwd=folder, check=True, timeout=60)

    def save(self) -> None:
        YAML().dump(self.params, self.folder / "params.yaml")

    def start(self, log: Path, *targets: str) -> subprocess.Popen[bytes]:
        """`dvc repro` in a process group of its own, writing to `log`."""
        with log.open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro", *targets],
                cwd=self.folder, env=self.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def repro(self, *targets: str, status: int = 0) -> tuple[set[str], str]:
        """`dvc repro` to its end: the stages that ran, and all it said."""
        log = self.folder / "log"
        running = self.start(log, *targets)
        code = running.wait(timeout=300)
        text = log.read_text()
        assert code == status, text
        return set(re.findall(r"Running stage '([^']+)'", text)), text

    def results(self) -> dict[str, bytes]:
        """What must be the same to the bit: figures, weights, episodes."""
        found = {}
        for pattern in ("*/*/evaluation/metrics.json", "*/*/final/*/*", "pretrained/*/*/*"):
            for path in sorted((self.folder / "data/artifacts/toy").glob(pattern)):
                found[str(path.relative_to(self.folder))] = path.read_bytes()
        assert len(found) >= 10
        return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """One clone for the tests below, run once; each of them leaves it with its parameters and all they ask for."""
    made = Clone(tmp_path_factory.mktemp("clone"))
    ran, text = made.repro()
    assert ran == CELLS | {"report"}, text
    return made


@pytest.mark.e2e
def test_it_ends_with_figures_and_a_report(clone: Clone) -> None:
    for agent, wanted in (("bc", {"bc": {"dp"}, "control": {"dp"}}), ("modip", {"final": {"dp", "planner"}})):  # fmt: skip
        path = clone.folder / f"data/artifacts/toy/{agent}/0"
        metrics = json.loads((path / "evaluation/metrics.json").read_text())
        assert {name: set(found) for name, found in metrics["results"].items()} == wanted
        assert (metrics["dataset"], metrics["env"]) == ("toy", "modip/Toy-v0")
        for policies in metrics["results"].values():
            for figures in policies.values():
                assert figures["episodes"] == 6
                assert -10 < figures["return"] < 20
        assert (path / "evaluation/details/videos/unavailable.txt").is_file()
    rows = json.loads((clone.folder / "report/summary.json").read_text())
    assert {(r["agent"], r["stage"], r["policy"]) for r in rows} == {
        ("bc", "bc", "dp"), ("bc", "control", "dp"), ("modip", "final", "dp"), ("modip", "final", "planner"),
    }  # fmt: skip
    assert (clone.folder / "report/index.html").is_file()
    ran, text = clone.repro()
    assert not ran, text


@pytest.mark.e2e
def test_a_changed_value_reruns_what_depends_on_it_and_no_more(clone: Clone) -> None:
    clone.params["mppi"]["by_dataset"]["other"] = {"horizon": 2}
    clone.params["modip"]["by_dataset"]["other"] = {"keep": 0.1}
    clone.params["dsrl"]["by_dataset"]["toy"] = {
        "lr": 0.5
    }  # a rival's, of which no cell is asked for
    clone.params["runtime"]["checkpoint_seconds"] = 0.2  # changes no result
    clone.save()
    ran, text = clone.repro()
    assert ran <= {"resolve@toy", "report"}, text  # which shows the parameters
    clone.params["modip"]["by_dataset"]["toy"] = {"explore_std": 0.2}
    clone.save()
    before = clone.results()
    ran, text = clone.repro()
    # The control takes its number of updates from the same section: made again, it is the same to the bit.
    cells = {
        f"{name}@toy-{agent}-0" for name in ("finetune", "evaluate") for agent in ("bc", "modip")
    }
    assert ran == {"resolve@toy", *cells, "report"}
    after = clone.results()
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all("toy/modip/0/" in name for name in changed)
    clone.params = tree()
    clone.save()
    ran, text = clone.repro()
    assert not [s for s in re.findall(r"Running stage '([^']+)'", text) if s != "report"], text
    assert clone.results() == before  # from DVC's cache


@pytest.mark.e2e
def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(
    clone: Clone, tmp_path: Path
) -> None:
    """SIGKILL to the whole group: at moments of training, and at any moment of the job."""
    victim, chance = Clone(tmp_path / "victim"), random.Random(2)
    logs: list[str] = []
    for kill in range(3):
        log = tmp_path / f"log{kill}"
        running = victim.start(log)
        begun = time.time()
        limit = begun + chance.uniform(1.0, 7.0)
        training = kill != 1
        while running.poll() is None and (training or time.time() < limit):
            saved = [p.stat().st_mtime for p in _states(victim.folder)]
            if training and any(at > begun for at in saved):
                time.sleep(chance.uniform(0.0, 0.8))
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait(timeout=30)
        assert _left_behind(victim.folder) == []
        logs.append(log.read_text())
        if running.returncode == 0:
            break
    _, text = victim.repro()
    assert "resumed at" in "".join([*logs, text])
    wanted, found = clone.results(), victim.results()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def _states(folder: Path) -> list[Path]:
    return [p for p in (folder / "scratch").glob("*/state/manifest.json") if p.exists()]


def _left_behind(folder: Path) -> list[str]:
    """Processes still at work in a folder, a moment after the kill."""
    found: list[str] = []
    for _ in range(50):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cwd").resolve() == folder.resolve():
                    found.append((process / "cmdline").read_text())
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.e2e
def test_wrong_input_ends_dvc_before_any_training(clone: Clone) -> None:
    clone.params["mppi"]["base"]["horizon"] = 9
    clone.save()
    ran, text = clone.repro(status=255)
    assert text.count("error: ") == 1, text
    assert re.search(r"error: params.yaml: \[toy\].*mppi.horizon 9 exceeds chunk.horizon 4.*lower", text)  # fmt: skip
    assert ran == {"resolve@toy"}
    mine = clone.folder / "data" / "own" / "mine.parquet"
    files.write(mine, episodes().recording)
    whole = pq.read_table(mine)
    pq.write_table(whole.drop_columns(["reward"]), mine)
    clone.params = tree()
    clone.params["dataset"] = ["mine"]
    clone.params["data"]["mine"] = {
        "source": "parquet", "env": "modip/Toy-v0", "path": "data/own/mine.parquet",
    }  # fmt: skip
    clone.save()
    ran, text = clone.repro(status=255)
    assert "error: data/own/mine.parquet: column reward is missing" in text
    assert ran == {"resolve@mine", "download@mine", "convert@mine"}
    pq.write_table(whole, mine)  # repaired, it is noticed and goes on
    ran, text = clone.repro("convert@mine")
    assert ran == {"download@mine", "convert@mine"}
    mine.unlink()
    clone.params = tree()
    clone.save()


Rows = Callable[[files.Episodes], files.Episodes]


def _nan(data: files.Episodes) -> files.Episodes:
    data.observation[25, 2] = np.nan
    return data


def _endless(data: files.Episodes) -> files.Episodes:
    data.reward[3] = np.inf
    return data


def _swapped(data: files.Episodes) -> files.Episodes:
    order = np.r_[20:40, 0:20, 40 : len(data.step)]
    return replace(
        data,
        **{
            name: getattr(data, name)[order]
            for name in ("observation", "action", "reward", "terminated", "truncated", "episode_id", "step")
        },
    )  # fmt: skip


def _shuffled(data: files.Episodes) -> files.Episodes:
    data.step[[3, 4]] = data.step[[4, 3]]
    return data


def _too_wide(data: files.Episodes) -> files.Episodes:
    return replace(data, observation=np.concatenate([data.observation] * 2, 1))


def _out_of_bounds(data: files.Episodes) -> files.Episodes:
    data.action[7, 1] = 1.5
    return data


def _unended(data: files.Episodes) -> files.Episodes:
    data.truncated[19] = False
    return data


BROKEN: dict[str, tuple[Rows, list[str]]] = {
    "NaN": (_nan, ["observation[2]", "nan", "row 25", "episode 1, step 5", "remove or repair"]),
    "infinite": (_endless, ["reward", "inf", "row 3"]),
    "episodes out of order": (_swapped, ["row 0", "episode_id 1", "sort the rows"]),
    "steps out of order": (_shuffled, ["row 3", "step 4", "expected episode_id 0, step 3"]),
    "an end that is not marked": (_unended, ["row 20", "mark it"]),
    "too many observations": (_too_wide, ["observation has 8 numbers", "has 4", "data.mine.env"]),
    "an action out of bounds": (_out_of_bounds, ["action[1]", "1.5", "row 7", "units"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2 from the stage that reads it first, with file, field, value and remedy."""
    change, parts = BROKEN[name]
    plain = episodes()
    copies = {k: v.copy() for k, v in vars(plain).items() if isinstance(v, np.ndarray)}
    pq.write_table(table(change(replace(plain, **copies))), tmp_path / "mine.parquet")
    params = small_tree()
    params["dataset"] = ["mine"]
    params["data"]["mine"] = {"source": "parquet", "env": "modip/Toy-v0", "path": "mine.parquet"}
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage", "--dataset", "mine"])
    monkeypatch.setattr(stage, "_log_to_terminal", lambda: None)
    monkeypatch.setattr(stage, "QUIET", {})
    statuses = [stage.run(stage.parser("x", "dataset"), m.body) for m in (download, convert)]
    assert statuses == [0, 2]
    errors = capsys.readouterr().err
    assert errors.startswith("error: mine.parquet: ")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors
    assert not list((tmp_path / "data").glob("episodes/*"))
