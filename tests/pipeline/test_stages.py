"""dvc.yaml against the programs: a stage depends on the sections its program reads, no more and no fewer."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from modip import agents, checkpoint
from modip.agents import AGENTS
from modip.artifacts import read_policy
from modip.config import SECTIONS, Cell, Params, build
from modip.envs import BatchedEnv
from modip.errors import UserError
from pipeline import (
    convert,
    download,
    evaluate,
    finetune,
    pretrain_bc,
    pretrain_model,
    resolve,
    stage,
    training,
    tune,
)
from tests.helpers import ROOT, project_tree, small_tree

STAGES: dict[str, dict[str, Any]] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]  # fmt: skip
MAINS: dict[str, ModuleType] = {
    "pretrain_bc": pretrain_bc,
    "pretrain_model": pretrain_model,
}
MATRIX = ("dataset", "agent", "seed")


def test_every_stage_is_a_program_with_its_matrix() -> None:
    for name, entry in STAGES.items():
        matrix = entry.get("matrix", {})
        assert matrix == {axis: f"${{{axis}}}" for axis in MATRIX if axis in matrix}
        arguments = "".join(f" --{axis} ${{item.{axis}}}" for axis in matrix)
        assert entry["cmd"] == f"python -m pipeline.{name}{arguments}"
        assert importlib.import_module(f"pipeline.{name}").body
        assert entry["desc"]
    assert {p.stem for p in (ROOT / "pipeline").glob("*.py")} >= set(STAGES)


@pytest.mark.parametrize("name", MAINS)
def test_a_stage_depends_on_the_sections_its_program_reads(name: str) -> None:
    """As they were written out for its data set, so that another data set's make nothing stale."""
    assert values_of(name) == set(MAINS[name].READS)
    assert "params" not in STAGES[name]


def test_fine_tuning_and_judging_depend_on_the_values_of_their_agent() -> None:
    """Written out for each agent, with its code: a rival's make no other agent's cells stale."""
    cells = "data/cells/${item.dataset}/"
    for name, others in (("finetune", []), ("evaluate", [f"{cells}evaluation.json"])):
        assert [d for d in STAGES[name]["deps"] if d.startswith(cells)] == [
            f"{cells}agents/${{item.agent}}.json", *others,
        ]  # fmt: skip
        assert "params" not in STAGES[name]


def test_an_agents_code_is_what_it_imports() -> None:
    """Whole packages too, but neither another agent nor what is in the values already."""
    found = {agent: set(resolve.imported(Path("agents") / f"{agent}.py")) for agent in AGENTS}
    for agent, files in found.items():
        assert files >= {Path("agents") / f"{agent}.py", Path("diffusion.py"), Path("nets.py")}
        assert {f for f in files if f.parts[0] == "agents"} == {Path("agents") / f"{agent}.py"}
    assert {agent for agent in AGENTS if Path("steering.py") in found[agent]} == {"dsrl"}


def test_a_variant_has_its_own_values_and_its_agents_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = small_tree()
    tree["variants"] = {"modip-q": {"agent": "modip", "values": {"mppi.horizon": 1}}}
    resolve.body(argparse.Namespace(dataset="toy"), build(tree, tmp_path / "params.yaml"))
    files = (tmp_path / "data/cells/toy/agents" / f"{n}.json" for n in ("modip", "modip-q"))
    plain, variant = (json.loads(file.read_text()) for file in files)
    assert (plain["mppi"].pop("horizon"), variant["mppi"].pop("horizon")) == (3, 1)
    assert plain == variant


@pytest.mark.parametrize("name", ["download", "convert"])
def test_a_data_stage_depends_on_its_data_sets_source(name: str) -> None:
    assert values_of(name) == {"source"}


def values_of(name: str) -> set[str]:
    cells = "data/cells/${item.dataset}/"
    return {Path(d).stem for d in STAGES[name]["deps"] if d.startswith(cells)}


def test_values_are_written_out_for_each_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = small_tree()
    tree["data"]["a/b"] = tree["data"]["toy"]
    tree["mppi"]["by_dataset"] = {"a/*": {"horizon": 2}, "*/b": {"elites": 5}, "toy": {"elites": 3}}
    params = build(tree, tmp_path / "params.yaml")
    found = {}
    for dataset in ("toy", "a/b"):
        resolve.body(argparse.Namespace(dataset=dataset), params)
        folder = tmp_path / "data" / "cells" / dataset
        found[dataset] = {f.stem: json.loads(f.read_text()) for f in folder.glob("*.json")}
        for agent, entry in AGENTS.items():
            values = json.loads((folder / "agents" / f"{agent}.json").read_text())
            code = values.pop("code")
            assert set(code) >= {f"agents/{agent}.py", "replay.py"}
            assert not any(f"agents/{other}.py" in code for other in AGENTS if other != agent)
            assert values.pop("agent") == agent
            assert values == {name: found[dataset][name] for name in entry.reads}
        assert set(found[dataset]) == {"source", *SECTIONS}
        assert found[dataset]["mppi"] == params.cell(dataset).mppi.model_dump()
    differ = {name for name in SECTIONS if found["toy"][name] != found["a/b"][name]}
    assert differ == {"mppi"}
    assert (found["a/b"]["mppi"]["horizon"], found["a/b"]["mppi"]["elites"]) == (2, 5)


def test_every_section_is_read_by_some_stage() -> None:
    read = {"evaluation", *(section for main in MAINS.values() for section in main.READS)}
    assert read.union(*(entry.reads for entry in AGENTS.values())) == set(SECTIONS)


def test_a_study_makes_no_stage_stale() -> None:
    """`tune` is read by pipeline/tune.py alone, which is no stage; what it tunes only fine-tuning reads."""
    listed = [p for entry in STAGES.values() for p in entry.get("params", [])]
    assert "tune" not in listed
    assert {agent: tune.tunable(agent) for agent in ("bc", "modip", "dsrl")} == {
        "bc": (), "modip": ("mppi", "modip"), "dsrl": ("dsrl",),
    }  # fmt: skip
    shared = {"evaluation", *(section for main in MAINS.values() for section in main.READS)}
    for agent in AGENTS:
        assert not shared & set(tune.tunable(agent))
        assert not {*AGENTS} - {agent} & set(tune.tunable(agent))
    assert "tune" not in STAGES


def test_the_parameters_are_complete() -> None:
    tree = project_tree()
    assert set(tree) == {*MATRIX, "runtime", "data", *SECTIONS, "variants", "tune", "compare"}
    listed = {"data.${item.dataset}", *SECTIONS, "variants"}
    assert set(STAGES["resolve"]["params"]) == listed
    assert set(tree["agent"]) <= {*AGENTS, *tree["variants"]}


def test_what_a_stage_is_given_another_one_makes() -> None:
    outs = {
        path if isinstance(path, str) else next(iter(path))
        for entry in STAGES.values()
        for kind in ("outs", "metrics")
        for path in entry.get(kind, [])
    }
    for name, entry in STAGES.items():
        for path in entry.get("deps", []):
            plain = re.sub(r"\$\{.*?\}", "*", path)
            made = any(f"{a}/".startswith(f"{b}/") for o in outs for a, b in ((o, path), (path, o)))
            assert made or "*" not in plain, f"{name} needs {path}, which no stage makes"
            assert made or (ROOT / path).exists(), f"{name} needs {path}, which is not there"
        assert f"pipeline/{name}.py" in entry["deps"]


class Recorder:
    """A cell that notes which of its sections are looked at."""

    def __init__(self, cell: Cell, seen: set[str]) -> None:
        self._cell, self._seen = cell, seen

    def __getattr__(self, name: str) -> Any:
        if name in SECTIONS:
            self._seen.add(name)
        return getattr(self._cell, name)


class Recording:
    """Parameters whose cells note what is read; `data` as it is."""

    def __init__(self, params: Params, seen: set[str]) -> None:
        self._params, self._seen = params, seen
        self.data, self.variants, self.base = params.data, params.variants, params.base

    def cell(self, dataset: str, agent: str | None = None) -> Any:
        return Recorder(self._params.cell(dataset, agent), self._seen)


def work(main: ModuleType, params: Any, **arguments: Any) -> None:
    main.body(argparse.Namespace(**{"dataset": "toy", "seed": 0, **arguments}), params)


@pytest.fixture(scope="module")
def small() -> Params:
    return build(small_tree(), Path("params.yaml"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small: Params) -> tuple[Path, dict[str, set[str]]]:  # fmt: skip
    """Every stage's program, run once on a small cell; and the sections each of them looked at."""
    folder = tmp_path_factory.mktemp("stages")
    judged = [f"evaluate {agent}" for agent in AGENTS]
    names = ("download", "convert", *MAINS, *AGENTS, *judged)
    seen: dict[str, set[str]] = {name: set() for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        work(resolve, small)
        for main in (download, convert, pretrain_bc, pretrain_model):
            name = main.__name__.rpartition(".")[2]
            work(main, Recording(small, seen[name]))
        for agent in AGENTS:
            work(finetune, Recording(small, seen[agent]), agent=agent)
            work(evaluate, Recording(small, seen[f"evaluate {agent}"]), agent=agent)
    return folder, seen


@pytest.mark.parametrize("name", MAINS)
def test_a_program_looks_at_just_these(name: str, done: tuple[Path, dict[str, set[str]]]) -> None:
    assert done[1][name] == set(MAINS[name].READS)


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agents_training_looks_at_just_these(
    agent: str, done: tuple[Path, dict[str, set[str]]]
) -> None:
    assert done[1][agent] == set(AGENTS[agent].reads)
    assert done[1][f"evaluate {agent}"] <= {*AGENTS[agent].reads, "evaluation"}


@pytest.mark.parametrize("name", ["download", "convert"])
def test_the_data_depend_on_no_agents_values(
    name: str, done: tuple[Path, dict[str, set[str]]]
) -> None:
    assert done[1][name] == set()


def test_a_program_writes_just_the_outs_of_its_stage(done: tuple[Path, Any]) -> None:
    """All of them, so that DVC is content; and nothing else in data/, where it would be lost or lie."""
    folder = done[0]
    wanted: set[Path] = set()
    for entry in STAGES.values():
        if "matrix" not in entry:
            continue
        for out in [*entry.get("outs", []), *entry.get("metrics", [])]:
            path = out if isinstance(out, str) else next(iter(out))
            for agent in AGENTS:
                item = {"dataset": "toy", "seed": "0", "agent": agent}
                filled = re.sub(r"\$\{item\.(\w+)\}", lambda m, i=item: i[m[1]], path)  # type: ignore[misc]
                wanted.add(folder / filled)
    for path in wanted:
        assert path.exists(), path
    for file in (folder / "data").rglob("*"):
        if file.is_file():
            assert any(file == out or out in file.parents for out in wanted), file
    assert not list((folder / "scratch").glob("*/state")), "a finished job leaves no state behind"


VARIANTS: dict[str, dict[str, Any]] = {
    "modip-no-planning": {"modip.planning": False, "modip.critic_updates": 0.0},
    "modip-no-pretraining": {"modip.offline_pretraining": False},
    "modip-policy-targets": {"critics.td_target": "policy_action"},
}


def with_variants(changes: dict[str, Any] | None = None) -> Params:
    tree = small_tree(changes)
    tree["variants"] = {name: {"agent": "modip", "values": v} for name, v in VARIANTS.items()}
    return agents.check(build(tree, Path("params.yaml")), "params.yaml")


@pytest.fixture
def copied(done: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data and what was pre-trained, in a folder of its own."""
    for name in ("data/episodes", "data/artifacts/toy/pretrained"):
        shutil.copytree(done[0] / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data/artifacts/toy"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_cell_like_any_other(name: str, copied: Path) -> None:
    """With what it acts with and no more, its own seconds, and what it started from."""
    params, home = with_variants(), copied / name / "0"
    work(finetune, params, agent=name)
    work(evaluate, params, agent=name)
    results = json.loads((home / "evaluation/metrics.json").read_text())["results"]
    plans = name != "modip-no-planning"
    assert set(results["final"]) == ({"dp", "planner"} if plans else {"dp"})
    curve = map(json.loads, (home / "curve.jsonl").read_text().splitlines())
    assert {row["policy"] for row in curve if row["kind"] == "evaluation"} == set(results["final"])
    parts = {"policy", "prior", "model"} if plans else {"policy"}
    assert {path.name for path in (home / "final").iterdir()} == parts
    timing = json.loads((home / "timing.json").read_text())
    assert all(timing.pop(part) > 0 for part in ("finetune", "updates", "update_seconds"))
    learned = timing.pop("pretrain_model")
    parents = checkpoint.load(home / "final/policy", "policy")[1]["parents"]
    clone = [checkpoint.fingerprint(copied / "pretrained/0/policy")]
    if name == "modip-policy-targets":
        assert learned > 0
        assert (timing, parents) == ({}, clone)
    elif name == "modip-no-planning":
        assert (learned, timing, parents) == (0.0, {}, clone)
    else:
        assert (learned, timing, parents) == (0.0, {"pretrain_bc": 0.0}, [])
    assert not list(Path("scratch").glob("*/state"))


def test_other_critics_than_the_pretrained_ones_are_pretrained_anew(copied: Path) -> None:
    """The variant is, bit for bit, the agent on a data set that has the variant's values."""
    work(finetune, with_variants(), agent="modip-policy-targets")
    other = build(small_tree({"critics.td_target": "policy_action"}), Path("params.yaml"))
    work(pretrain_model, other)
    work(finetune, other, agent="modip")
    for part in ("policy", "prior", "model"):
        files = [
            copied / agent / "0/final" / part / "tensors.safetensors"
            for agent in ("modip", "modip-policy-targets")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_killed_run_with_its_own_pretraining_goes_on(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "modip-policy-targets"
    task = training.open_agents_task(with_variants(), "toy", name, 0)
    calm = finetune.improve(task, "modip", "calm")
    runtime = task.cell.runtime.model_copy(update={"checkpoint_seconds": 1e-9})
    task = replace(task, cell=task.cell.model_copy(update={"runtime": runtime}))

    def kill(rows: list[dict[str, Any]]) -> None:
        if rows[0]["env_steps"]:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        finetune.improve(task, "modip", name, kill)
    with caplog.at_level("INFO"):
        hurt = finetune.improve(task, "modip", name)
    said = [line for line in caplog.messages if "resumed at" in line]
    assert [line.partition(":")[0] for line in said] == ["world model and critics", name]
    for found, folder in ((calm, "calm"), (hurt, "hurt")):
        assert set(found.save(Path(folder)).values()) == {"policy", "prior", "model"}
        assert [path.name.partition("-toy-")[0] for path in found.folders][1].endswith(".model")
    for part in ("policy", "prior", "model"):
        files = [Path(folder) / part / "tensors.safetensors" for folder in ("calm", "hurt")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_variant_that_does_not_fit_a_data_set_is_left_out_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the matrix asks for it: then it is refused when the parameters are read."""
    monkeypatch.chdir(tmp_path)
    tree = small_tree()
    tree["variants"] = {"modip-long": {"agent": "modip", "values": {"mppi.horizon": 5}}}
    resolve.body(argparse.Namespace(dataset="toy"), build(tree, Path("params.yaml")))
    files = {file.stem for file in (tmp_path / "data/cells/toy/agents").iterdir()}
    assert files == set(AGENTS)
    tree["agent"] = ["modip-long"]
    with pytest.raises(
        UserError,
        match=r"^params.yaml: variants.modip-long.values, \[toy\]: mppi.horizon 5 exceeds",
    ):
        build(tree, Path("params.yaml"))


def test_what_it_cost_is_beside_the_results_and_not_among_them(done: tuple[Path, Any]) -> None:
    """Times differ from run to run, and metrics.json must not."""
    for agent in AGENTS:
        folder = done[0] / "data/artifacts/toy" / agent / "0"
        costs = json.loads((folder / "evaluation/details/cost.json").read_text())
        metrics = json.loads((folder / "evaluation/metrics.json").read_text())
        assert {k: set(v) for k, v in costs.items()} == {
            k: set(v) for k, v in metrics["results"].items()
        }
        for policies in costs.values():
            for cost in policies.values():
                assert set(cost["ms_per_action"]) == {"1", "3"}
                assert 0 < min(cost["ms_per_action"].values()) < 1000
                assert cost["parameters"] > 100
        assert "ms" not in json.dumps(metrics)
        took = json.loads((folder / "timing.json").read_text())
        assert 0 < took["update_seconds"] <= took["finetune"]
        assert took["updates"] > 0
    policy, _ = read_policy(done[0] / "data/artifacts/toy/modip/0/final/policy")
    costs = json.loads(
        (done[0] / "data/artifacts/toy/modip/0/evaluation/details/cost.json").read_text()
    )
    alone = sum(parameter.numel() for parameter in policy.parameters())
    assert costs["final"]["dp"]["parameters"] == alone < costs["final"]["planner"]["parameters"]


def test_diwa_holds_imagination_against_reality(done: tuple[Path, Any]) -> None:
    """In every point of its curve, over its iterations, and of its final policy; without an environment step."""
    folder = done[0] / "data" / "artifacts" / "toy" / "diwa" / "0"
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    curve = [row for row in rows if row["kind"] == "evaluation"]
    final = json.loads((folder / "evaluation" / "metrics.json").read_text())["results"]["final"]
    updates = [row["grad_steps"] for row in curve]
    assert len(updates) == 3
    assert updates[0] == 0
    assert updates[2] == 2 * updates[1]
    for row in (*curve, final["dp"]):
        assert row["env_steps"] == 0
        assert np.isfinite([row["return"], row["imagined_return"]]).all()
        assert 0 <= row["imagined_success"] <= 1


@pytest.mark.parametrize(("reward", "wanted"), [(0.95, 1.0), (0.85, 0.0)])
def test_imagined_figures_are_of_whole_episodes_in_the_environments_rewards(
    reward: float, wanted: float, done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model that gives one reward and never ends; at the goal is above 0.9. Learning's offset is no reward."""
    monkeypatch.chdir(done[0])
    params = build(small_tree({"critics.reward_offset": -2.0}), Path("params.yaml"))
    task = training.open_agents_task(params, "toy", "diwa", 0)
    model = evaluate.frozen_model(task)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.net.out.bias[..., -1] = -30.0
    model.reward_mean.fill_(reward - 2.0)
    env = BatchedEnv("modip/Toy-v0", 2)

    def act(obs: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        seen.append(obs)
        return torch.zeros(len(obs), 3, 2)

    seen: list[torch.Tensor] = []
    found = evaluate.imagine(task, act, model, env, range(7, 12))
    assert found["imagined_return"] == pytest.approx(20 * reward, rel=1e-5)
    assert found["imagined_success"] == wanted
    assert len(seen) == 7, "chunks of three, the last one cut: 20 steps"
    for row in range(5):
        env.reset([0], [7 + row])
        torch.testing.assert_close(seen[0][row], env.obs[0])
    # Where no demonstration reached the goal, the model cannot have learned what that is worth.
    task.demos.table[:, -2] = -2.0
    assert evaluate.imagine(task, act, model, env, [7])["imagined_success"] is None


def test_another_results_parameters_start_another_run(small: Params, done: tuple[Path, Any]) -> None:  # fmt: skip
    """The scratch folder is named by all that the job depends on, and by nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done[0])
        other = build(small_tree({"mppi.horizon": 2}), Path("params.yaml"))
        folders = {
            name: {
                reads: training.scratch_folder(
                    training.open_task(params, "toy", seed), "job", (reads,), parent
                )
                for reads in ("mppi", "diffusion")
            }
            for name, params, seed, parent in (
                ("base", small, 0, "a"),
                ("same", small, 0, "a"),
                ("mppi", other, 0, "a"),
                ("seed", small, 1, "a"),
                ("parent", small, 0, "b"),
            )
        }
    assert folders["base"] == folders["same"]
    assert folders["base"]["diffusion"] == folders["mppi"]["diffusion"]
    for reads in ("mppi", "diffusion"):
        found = {folders[name][reads] for name in ("base", "seed", "parent")}
        assert len(found) == 3
    assert folders["base"]["mppi"] != folders["mppi"]["mppi"]


def test_training_that_diverges_ends_in_one_line(
    small: Params, done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done[0])
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    tree = small_tree({"diffusion.lr": 1e30, "diffusion.grad_clip": 1e30, "diffusion.updates": 8})
    with pytest.raises(UserError, match="behaviour cloning: policy_loss is .* diverged: lower"):
        work(pretrain_bc, build(tree, Path("params.yaml")))


def test_a_hidden_dimension_that_is_not_there_is_named(
    done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done[0])
    params = build(small_tree({"diffusion.hidden": [1, 4]}), Path("params.yaml"))
    with pytest.raises(UserError, match=r"diffusion.hidden \(value 4\): .* 0 to 3; correct"):
        work(pretrain_bc, params)


def test_an_unknown_agent_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = small_tree() | {"agent": ["bc", "modp"]}
    YAML().dump(tree, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage", "--dataset", "toy"])
    monkeypatch.setattr(stage, "_log_to_terminal", lambda: None)
    monkeypatch.setattr(stage, "QUIET", {})
    worked: list[Any] = []
    assert stage.run(stage.parser("x", "dataset"), lambda *given: worked.append(given)) == 2
    assert not worked
    assert "params.yaml: agent 'modp' is unknown: did you mean 'modip'?" in capsys.readouterr().err


def test_the_same_stage_twice_is_the_same_result(small: Params, done: tuple[Path, Any], tmp_path: Path) -> None:  # fmt: skip
    """Bit for bit, and though torch's own noise was elsewhere before."""
    torch.manual_seed(99)
    first = done[0] / "data" / "artifacts" / "toy" / "pretrained" / "0" / "policy"
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done[0])
        work(pretrain_bc, small)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == before


@pytest.mark.parametrize(
    ("values", "fine"),
    [
        ({"env_steps": 2400, "num_envs": 8, "episode_steps": 0}, True),
        ({"env_steps": 2392, "num_envs": 8, "episode_steps": 0}, False),
        ({"env_steps": 2392, "num_envs": 8, "episode_steps": 99}, True),
    ],
)
def test_a_budget_too_short_for_its_episodes_is_doubted(values: dict[str, int], fine: bool, small: Params) -> None:  # fmt: skip
    config = small.cell("toy").modip.model_copy(update=values)
    found = finetune.doubt(config, longest=100)
    assert (found is None) == fine
    if found is not None:
        assert "env_steps 2392 in 8 environments are 299 steps for each" in found
        assert "Raise modip.env_steps to 2400" in found
