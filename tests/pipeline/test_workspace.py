"""What a flow run chooses, makes and asks of DVC: plain functions, and one worktree of a repository of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from modip.config import load
from modip.errors import UserError
from pipeline import workspace
from pipeline.workspace import CurableError, Stage, StageError, choose, failure
from tests.helpers import ROOT

ONE_CELL = {"dataset": ["toy"], "agent": ["bc"], "seed": [3]}


def test_a_choice_changes_its_values_and_no_others() -> None:
    tree, params = choose(
        ROOT / "params.yaml", ONE_CELL, {"modip.base.env_steps": 9000, "mppi.by_dataset.toy.horizon": 3}
    )  # fmt: skip
    assert (params.dataset, params.agent, params.seed) == (("toy",), ("bc",), (3,))
    assert tree["modip"]["base"]["env_steps"] == 9000
    assert params.cell("toy").mppi.horizon == 3
    written, before = workspace.text_of(tree), (ROOT / "params.yaml").read_text()
    comments = [line.strip() for line in before.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) > 10
    assert all(comment in written for comment in comments)
    plain = YAML(typ="safe", pure=True)
    wanted = plain.load(before) | {name: list(values) for name, values in ONE_CELL.items()}
    wanted["modip"]["base"]["env_steps"] = 9000
    wanted["mppi"]["by_dataset"]["toy"] = {**wanted["mppi"]["by_dataset"]["toy"], "horizon": 3}
    assert plain.load(written) == wanted


def test_an_alias_elsewhere_keeps_its_values() -> None:
    name = "diffusion.by_dataset.minari/*-v0.width"  # *gym, which d4rl/*-v2 defines
    tree, params = choose(ROOT / "params.yaml", ONE_CELL, {name: 99})
    before = load(ROOT / "params.yaml")
    assert params.cell("minari/hopper-medium-v0").diffusion.width == 99
    assert params.cell("d4rl/hopper-medium-v2") == before.cell("d4rl/hopper-medium-v2")
    written = YAML(typ="safe", pure=True).load(workspace.text_of(tree))
    assert written["diffusion"]["by_dataset"]["d4rl/*-v2"]["width"] == 512


def test_a_data_set_without_values_of_its_own_gets_them() -> None:
    name = "diffusion.by_dataset.fetch-pick-and-place.lr"
    _, params = choose(ROOT / "params.yaml", ONE_CELL, {name: 0.5})
    assert params.cell("fetch-pick-and-place").diffusion.lr == 0.5
    assert params.cell("toy").diffusion.lr == load(ROOT / "params.yaml").cell("toy").diffusion.lr


@pytest.mark.parametrize(
    ("choice", "overrides", "parts"),
    [
        ({}, {"mppi.base.horizn": 3}, ["mppi.horizn", "remove it or correct"]),
        ({}, {"mpi.base.horizon": 3}, ["overrides: mpi.base.horizon", "'mppi'"]),
        ({}, {"mppi.base.horizon": 99}, ["mppi.horizon 99 exceeds chunk.horizon"]),
        ({}, {"mppi.base.horizon": "3"}, ["mppi.horizon (value '3')"]),
        ({}, {"mppi.base.horizon.x": 3}, ["mppi.base.horizon holds no other values"]),
        ({}, {"mppi.by_dataset.toys.horizon": 3}, ["'toys' is unknown", "'toy'"]),
        ({}, {"seed": [1]}, ["'seed' is no dotted name"]),
        ({"dataset": ["toys"]}, {}, ["dataset 'toys' is unknown", "'toy'"]),
        ({"agent": ["bd"]}, {}, ["agent 'bd' is unknown", "bc, modip"]),
        ({"seed": [-1]}, {}, ["seed.0 (value -1)"]),
    ],
)
def test_a_wrong_choice_is_one_line(
    choice: dict[str, list[Any]], overrides: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        choose(ROOT / "params.yaml", {**ONE_CELL, **choice}, overrides)
    for part in parts:
        assert part in str(caught.value)


def _failed(code: int) -> str:
    return f"ERROR: failed to reproduce 'a@toy': failed to run: python -m pipeline.a, exited with {code}"


@pytest.mark.parametrize(
    ("status", "lines", "kind", "said"),
    [
        (255, ["error: own.parquet: column reward is missing", _failed(2)], StageError, "column reward"),
        (255, ["error: bc: policy_loss is nan; training has diverged", _failed(2)], StageError, "diverged"),
        (255, ["error: 503 is no horizon; connection refused", _failed(2)], StageError, "503"),
        (255, ["ValueError: shapes differ", _failed(1)], StageError, "ValueError: shapes differ"),
        (255, ["ERROR: Unable to acquire lock. Most likely"], CurableError, "acquire lock"),
        (255, ["ERROR: 'data/x' is busy, it is being blocked by:"], CurableError, "is busy"),
        (255, ["ERROR: failed to push data to the cloud - 3 files"], CurableError, "push"),
        (255, ["ERROR: Could not connect to the endpoint URL"], CurableError, "Could not connect"),
        (255, ["10 updates", _failed(-9)], CurableError, "signal 9"),
        (255, ["10 updates", _failed(137)], CurableError, "signal 9"),
        (137, ["10 updates"], CurableError, "signal 9"),
        (-15, [], CurableError, "signal 15"),
        (1, [], StageError, "no output"),
        (255, ["ERROR: 'dvc.yaml' is invalid."], StageError, "invalid"),
    ],
)  # fmt: skip
def test_only_what_another_attempt_can_cure_is_tried_again(
    status: int, lines: list[str], kind: type[StageError], said: str
) -> None:
    found = failure(status, lines)
    assert type(found) is kind
    assert said in str(found)
    assert "\n" not in str(found)


def test_options_of_a_stage_come_from_its_command() -> None:
    command = (
        "python -m pipeline.finetune --dataset d4rl/hopper-medium-v2 --agent bc --seed 0 --params p"
    )
    assert workspace.options(command) == {
        "dataset": "d4rl/hopper-medium-v2", "agent": "bc", "seed": "0",
    }  # fmt: skip


def test_order_and_what_a_failure_takes_with_it() -> None:
    def stage(name: str, *needs: str, cell: bool = True) -> Stage:
        return Stage(name, {"dataset": name} if cell else {}, frozenset(needs))

    given = [stage("report", "c", "y", cell=False), stage("c", "b"), stage("b", "a"), stage("a"), stage("y", "x"), stage("x")]  # fmt: skip
    found = workspace.ordered({one.name: one for one in given})
    order = list(found)
    assert sorted(order) == ["a", "b", "c", "report", "x", "y"]
    assert all(order.index(need) < order.index(one.name) for one in given for need in one.needs)
    assert workspace.skipped(found.values(), {"a": "no"}) == {"b": "a", "c": "a"}


def _cell(kind: str, needs: str, *values: str) -> Stage:
    names = ("dataset", "seed") if len(values) == 2 else ("dataset", "agent", "seed")
    return Stage(
        f"{kind}@{'-'.join(values)}",
        dict(zip(names, values, strict=True)),
        frozenset(needs.split()),
    )


def _matrix(agents: tuple[str, ...]) -> dict[str, Stage]:
    found = [
        Stage("convert@d/x", {"dataset": "d/x"}, frozenset()),
        _cell("clone", "convert@d/x", "d/x", "0"),
        _cell("model", "convert@d/x clone@d/x-0", "d/x", "0"),
    ]
    for agent in agents:
        found += [
            _cell("tune", "convert@d/x model@d/x-0 clone@d/x-0", "d/x", agent, "0"),
            _cell("judge", f"clone@d/x-0 tune@d/x-{agent}-0", "d/x", agent, "0"),
        ]
    return {one.name: one for one in found}


def test_jobs_are_what_one_worker_can_do_alone() -> None:
    found = workspace.jobs(_matrix(("bc", "modip")))
    assert [[stage.name for stage in job.stages] for job in found] == [
        ["clone@d/x-0", "model@d/x-0"],
        ["tune@d/x-bc-0", "judge@d/x-bc-0"],
        ["tune@d/x-modip-0", "judge@d/x-modip-0"],
    ]
    assert found[0].needs == {"convert@d/x"}
    assert found[1].needs == {"convert@d/x", "clone@d/x-0", "model@d/x-0"}
    assert found[1].key == "judge@d%2Fx-bc-0"
    # One cell alone: nobody else waits for what comes first.
    alone = workspace.jobs(_matrix(("modip",)))
    assert [[stage.kind for stage in job.stages] for job in alone] == [
        ["clone", "model", "tune", "judge"]
    ]


def test_a_child_dies_with_whoever_started_it(tmp_path: Path) -> None:
    """SIGKILL to the parent of the guard: nothing of the group is left."""
    mark = tmp_path / "pid"
    program = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import subprocess, sys; from pipeline.workspace import GUARD\n"
        "subprocess.Popen(['/bin/sh', '-c', GUARD, 'sh', sys.executable, '-c', sys.argv[1]], "
        "stdin=subprocess.PIPE, start_new_session=True).wait()"
    )
    running = subprocess.Popen([sys.executable, "-c", parent, program], cwd=ROOT)
    try:
        _until(lambda: mark.exists() and mark.read_text() != "", 30)
    finally:
        running.kill()
        running.wait()
    _until(lambda: not _alive(int(mark.read_text())), 10)


def _until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_timeout_ends_the_whole_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    with pytest.raises(StageError, match=r"longer than 0\.03.* minutes, its timeout"):
        workspace.dvc(tmp_path, ["repro"], {}, said.append, 2.0)
    assert said == ["begun"]


def test_the_exit_status_and_the_lines_come_through(tmp_path: Path) -> None:
    (tmp_path / "dvc.py").write_text(
        "import os, sys\nprint(sys.argv[1:])\nos.kill(os.getpid(), 9)\n"
    )
    said: list[str] = []
    with pytest.raises(CurableError, match="signal 9"):
        workspace.dvc(tmp_path, ["repro", "x"], {}, said.append, 60.0)
    (tmp_path / "dvc.py").write_text("print('error: no'); raise SystemExit(2)\n")
    with pytest.raises(StageError, match="error: no"):
        workspace.dvc(tmp_path, ["repro", "x"], {}, said.append, 60.0)
