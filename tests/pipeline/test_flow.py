"""A server, a worker and the deployments as `make serve` brings them up, and flow runs through them to the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from pydantic import ValidationError
from ruamel.yaml import YAML

from modip.agents import AGENTS
from pipeline.flow import Progress
from pipeline.form import Cell, Limits, Matrix
from pipeline.workspace import Job, Stage
from tests.helpers import ROOT, project_tree, small_tree
from tests.pipeline.served import Served

# The form and the bookkeeping: no server.


def test_the_form_offers_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    schema = Matrix.model_json_schema()["properties"]
    tree = project_tree()
    assert schema["dataset"]["items"]["enum"] == list(tree["data"])
    assert schema["agent"]["items"]["enum"] == [*AGENTS, *tree["variants"]]
    for name in ("dataset", "agent", "seed"):
        assert schema[name]["default"] == tree[name]
        assert schema[name]["description"]
        assert getattr(Matrix(), name) == tree[name]
        assert getattr(Cell(), name) == tree[name][0]
    for model, values, said in (
        (Matrix, {"dataset": ["toys"]}, "did you mean 'toy'"),
        (Matrix, {"agent": []}, "at least 1"),
        (Matrix, {"seed": [-1]}, "greater than or equal to 0"),
        (Cell, {"agent": "bd"}, "choose one of bc, modip"),
        (Limits, {"retries": -1}, "greater than or equal to 0"),
        (Limits, {"minute": 1}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=said):
            model.model_validate(values)


def _stage(name: str, *needs: str) -> Stage:
    return Stage(name, {} if name == "report" else {"dataset": name[-1]}, frozenset(needs))


def _progress() -> Progress:
    found = [_stage("get@x"), _stage("get@y"), _stage("run@x", "get@x"), _stage("run@y", "get@y"), _stage("report", "run@x", "run@y")]  # fmt: skip
    return Progress({stage.name: stage for stage in found})


def _step(progress: Progress, failing: str) -> list[str]:
    """Run all that is ready; `failing` fails."""
    names = [stage.name for stage in progress.ready()]
    for name in names:
        progress.start(name)
    for name in names:
        progress.end(name, "error: bad" if name == failing else None)
    return names


def test_a_failed_cell_leaves_the_others_running() -> None:
    progress = _progress()
    steps = [_step(progress, "get@y") for _ in range(3)]
    assert steps == [["get@x", "get@y"], ["run@x"], ["report"]]
    assert progress.skipped == {"run@y": "get@y"}
    assert progress.summary() == "1 of 5 stages failed, 1 skipped for them: get@y: error: bad"
    progress = _progress()
    steps = [_step(progress, "") for _ in range(4)]
    assert steps == [["get@x", "get@y"], ["run@x", "run@y"], ["report"], []]
    assert progress.summary() == "5 stages up to date"


def test_a_job_that_ended_in_the_middle_keeps_what_it_has() -> None:
    stages = [_stage("one@x"), _stage("two@x", "one@x"), _stage("next@x", "two@x"), _stage("report", "next@x", "get@y"), _stage("get@y")]  # fmt: skip
    progress = Progress({stage.name: stage for stage in stages})
    for name in ("one@x", "two@x"):
        progress.start(name)
    progress.end_job(Job(tuple(stages[:2])), {"one@x": {}}, "killed by signal 9")
    assert (progress.done, progress.failed) == ({"one@x"}, {"two@x": "killed by signal 9"})
    assert progress.skipped == {"next@x": "two@x"}
    assert [stage.name for stage in progress.ready()] == ["get@y"]


# The real thing.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    params = small_tree()
    own = {"source": "parquet", "env": "modip/Toy-v0", "path": "data/own/absent.parquet"}
    params["data"]["mine"] = own
    params["tune"] |= {
        "seeds": [1],
        "confirm_seeds": [2, 3],
        "trials": 2,
    }  # what it starts from, the matrix has made
    made = Served(tmp_path_factory.mktemp("served") / "clone", params)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def matrix(served: Served) -> dict[str, Any]:
    """A flow run over two data sets, of which one has no file, to its end."""
    return served.run(
        "benchmark/cpu",
        matrix={"dataset": ["toy", "mine"], "agent": ["bc", "modip"], "seed": [1]},
        overrides={"modip.base.explore_std": 0.1},
    )


@pytest.mark.e2e
def test_a_matrix_runs_to_the_end_and_a_failed_cell_is_named(
    served: Served, matrix: dict[str, Any]
) -> None:
    run = matrix
    assert run["state_type"] == "FAILED"
    message = run["state"]["message"]
    assert re.match(
        r"1 of 19 stages failed, 7 skipped for them: download@mine: error: ", message
    ), message
    assert "absent.parquet" in message
    assert "\n" not in message
    tasks = served.tasks(run)
    toy = {
        f"{kind}@toy{item}"
        for kind, items in (
            ("resolve", [""]), ("download", [""]), ("convert", [""]),
            ("pretrain_bc", ["-1"]), ("pretrain_model", ["-1"]),
            ("finetune", ["-bc-1", "-modip-1"]), ("evaluate", ["-bc-1", "-modip-1"]),
        )
        for item in items
    }  # fmt: skip
    done = {name for name, task in tasks.items() if task["state_type"] == "COMPLETED"}
    assert done == toy | {"resolve@mine", "report"}
    assert tasks.keys() - done == {"download@mine"}
    assert tasks["download@mine"]["run_count"] == 1  # no retry cures a missing file
    tags = {"finetune", "dataset:toy", "agent:modip", "seed:1"}
    assert set(tasks["finetune@toy-modip-1"]["tags"]) == tags
    jobs = {job["name"]: set(job["tags"]) for job in served.jobs(run)}
    assert jobs.keys() == {"toy-1", "toy-bc-1", "toy-modip-1"}
    assert {"dataset:toy", "agent:bc", "seed:1"} < jobs["toy-bc-1"]
    said = served.said(run)
    assert "env steps" in said  # the stage's own progress
    # The parameters are versioned, and the user's tree is as it was.
    name = served.name(run)
    used = YAML(typ="safe", pure=True).load(served.git("show", f"runs/{name}:params.yaml"))
    assert (used["seed"], used["modip"]["base"]["explore_std"]) == ([1], 0.1)
    assert "finetune@toy-modip-1" in served.git("show", f"runs/{name}:dvc.lock")
    assert served.git("status", "--porcelain") == ""
    # The report is with the run.
    found = served.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    kinds = {one["key"]: one["type"] for one in found if one["key"]}
    assert kinds["report"] == "table"
    assert "image" in kinds.values()
    page = requests.get(f"http://127.0.0.1:{served.port + 1}/{name}/index.html", timeout=30)
    assert "MODIP planner" in page.text


@pytest.mark.e2e
def test_a_cell_that_another_run_has_computed_is_restored(
    served: Served, matrix: dict[str, Any]
) -> None:
    cell = {"dataset": "toy", "agent": "modip", "seed": 1}
    assert "finetune@toy-modip-1" in served.tasks(matrix)
    run = served.run("finetune/cpu", cell=cell, overrides={"modip.base.explore_std": 0.1})
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert served.tasks(run).keys() == {"report"}
    assert "restored: resolve@toy, download@toy, convert@toy" in served.said(run)
    ran = set(re.findall(r"Running stage '([^']+)'", served.said(run)))
    assert ran <= {"report"}, ran
    name = served.name(run)
    assert not (served.clone.folder / "scratch/prefect/runs" / name).exists()
    assert "finetune@toy-modip-1" in served.git("show", f"runs/{name}:dvc.lock")
    # A lock that the user keeps in git says nothing of other values.
    served.git("checkout", "-q", f"runs/{name}", "--", "dvc.lock")
    run = served.run("finetune/cpu", cell=cell, overrides={"modip.base.explore_std": 0.2})
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert served.tasks(run).keys() == {
        "resolve@toy",
        "finetune@toy-modip-1",
        "evaluate@toy-modip-1",
        "report",
    }
    served.git("rm", "-qf", "dvc.lock")


@pytest.mark.e2e
def test_wrong_overrides_end_a_run_before_it_begins(served: Served) -> None:
    before = served.git("branch", "--list", "runs/*")
    run = served.run("finetune/cpu", overrides={"mppi.base.horizon": 9})
    assert run["state_type"] == "FAILED"
    assert re.match(r"error: .*mppi.horizon 9 exceeds chunk.horizon 4", run["state"]["message"])
    assert served.tasks(run) == {}
    assert served.git("branch", "--list", "runs/*") == before


@pytest.mark.e2e
def test_a_study_runs_as_a_flow(served: Served) -> None:
    run = served.run("tune/cpu")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    record = json.loads((served.clone.folder / "report/study.json").read_text())
    assert run["state"]["message"] == record["verdict"]
    found = served.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    tables = {one["key"]: json.loads(one["data"]) for one in found if one["type"] == "table"}
    assert [row["number"] for row in tables["study"]] == [row["number"] for row in record["trials"]]
