"""A study on the toy data set: real storage, real workers, real kills."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ruamel.yaml import YAML

from modip import checkpoint
from modip.config import Params, build, load
from modip.errors import UserError
from pipeline import (
    convert,
    download,
    finetune,
    pretrain_bc,
    pretrain_model,
    resolve,
    study,
    training,
    tune,
)
from tests.helpers import ROOT, small_tree
from tests.pipeline.test_end_to_end import Clone

HORIZON = {"type": "int", "low": 1, "high": 4, "log": False}
TEMPERATURE = {"type": "float", "low": 0.05, "high": 5.0, "log": True}


def params_with(**changes: Any) -> Params:
    tree = small_tree({"modip.explore_std": 0.1})
    tree["tune"]["parameters"] = {"mppi.horizon": HORIZON, "mppi.temperature": TEMPERATURE}
    tree["tune"] |= changes
    return build(tree, Path("params.yaml"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DVC would have made for the seeds of all three parts."""
    folder, params = tmp_path_factory.mktemp("study"), params_with()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for main in (resolve, download, convert):
            main.body(argparse.Namespace(dataset="toy"), params)
        for seed in (0, 1, 2, 9):
            for main in (pretrain_bc, pretrain_model):
                main.body(argparse.Namespace(dataset="toy", seed=seed), params)
    return folder


@pytest.fixture(autouse=True)
def alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def states(found: optuna.Study) -> dict[str, int]:
    names = [
        "infeasible" if "infeasible" in one.user_attrs else one.state.name.lower()
        for one in found.get_trials()
    ]
    return {name: names.count(name) for name in set(names)}


def test_a_study_tries_prunes_and_skips_what_does_not_fit(home: Path, tmp_path: Path) -> None:
    params = params_with(
        trials=7,
        parameters={"mppi.horizon": {**HORIZON, "high": 8}, "mppi.temperature": TEMPERATURE},
        pruner={"type": "hyperband", "min_resource": 12, "reduction_factor": 2},
    )
    tune.check(params)
    found = tune.open_study(params, "whole", home)
    tune.work(found, tune.search(params), home)
    counts = states(found)
    assert counts["complete"] + counts["pruned"] == 7
    assert counts["pruned"]
    assert counts["infeasible"]
    first, *others = found.get_trials()
    assert first.params == tune.defaults(params)
    assert first.state == TrialState.COMPLETE
    for one in others:
        steps = [row["env_steps"] for row in one.user_attrs.get("curve", [])]
        if "infeasible" in one.user_attrs:
            assert "exceeds chunk.horizon 4" in one.user_attrs["infeasible"]
            assert one.params["mppi.horizon"] > 4
            assert not steps  # it never ran
        elif one.state == TrialState.PRUNED:
            assert max(steps) < params.tune.env_steps
        else:
            assert max(steps) >= params.tune.env_steps
            assert one.value == one.user_attrs["curve"][-1]["return"]  # the planner's, at the end
    assert not list((home / "scratch").glob("trial*"))
    study.drop_weights(params, found)
    top = study.finalists(params, found)
    assert len(top) == 2
    assert "default" in top
    assert {path.name for path in study.WEIGHTS.iterdir()} == {
        f"trial{one.number}" for one in top.values()
    }

    # Asked for more, it goes on; asked again, it does nothing.
    tune.work(found, tune.search(params), home)
    assert states(found) == counts
    more = params.model_copy(update={"tune": params.tune.model_copy(update={"trials": 8})})
    assert tune.name_of(more) == tune.name_of(params)
    tune.work(found, tune.search(more), home)
    assert len(tune.counted(found.get_trials())) == 8

    # The shortlist: the best setting and the default on another seed, with a trial's budget and start states.
    top = study.finalists(more, found)
    settings = {name: one.params for name, one in top.items()}
    again = tune.open_study(params, "whole-shortlist", home)
    tune.work(again, tune.again(params, "shortlist", settings, [9]), home)
    runs = again.get_trials()
    assert [(one.params["seed"], one.params["setting"]) for one in runs] == [(9, n) for n in top]
    assert {one.user_attrs["curve"][-1]["episodes"] for one in runs} == {4}
    rows = study.shortlist(more, found, runs)
    for row, ran in zip(rows, runs, strict=True):
        assert (row["seeds"], row["planner"]) == ([0, 9], [top[row["setting"]].value, ran.value])
        assert row["mean"] == sum(row["planner"]) / 2
    first = study.winner(rows)
    assert first is not None
    assert first["mean"] == max(row["mean"] for row in rows)

    # On fresh seeds: both settings on each, with the whole budget, judged by the final evaluation.
    second = tune.open_study(params, "whole-confirm", home)
    tune.work(second, tune.again(params, "confirm", settings, [1, 2]), home)
    seen = {(one.params["seed"], one.params["setting"]) for one in second.get_trials()}
    assert seen == {(s, w) for s in (1, 2) for w in top}
    assert {one.user_attrs["curve"][-1]["episodes"] for one in second.get_trials()} == {6}
    assert all(one.user_attrs["curve"][-1]["env_steps"] >= 60 for one in second.get_trials())

    # The record, the page, the winner.
    rows = [
        {**row, "mean": float(row["setting"] != "default")} for row in rows
    ]  # the other one wins
    record = study.write(params, found, rows, second.get_trials(), home, tmp_path)
    assert json.loads((tmp_path / study.RECORD).read_text()) == record
    assert (record["winner"], record["shortlist"]) == (rows[1], rows)
    rows = record["trials"]
    assert [row["number"] for row in rows] == list(range(len(found.get_trials())))
    assert {row["state"] for row in rows} == {"complete", "pruned", "infeasible"}
    assert record["confirmation"]["seeds"] == [1, 2]
    ends = {
        (one.params["setting"], one.params["seed"]): one.user_attrs["curve"][-2:]
        for one in second.get_trials()
    }
    for i, policy in enumerate(("dp", "planner")):
        pair = record["confirmation"][policy]
        assert pair["default"] == [ends["default", seed][i]["return"] for seed in (1, 2)]
        assert pair["winner"] == [ends[list(top)[1], seed][i]["return"] for seed in (1, 2)]
    best = YAML(typ="safe").load((tmp_path / study.BEST).read_text())
    assert (
        best["mppi"]["by_dataset"]["toy"]["horizon"] == record["winner"]["params"]["mppi.horizon"]
    )
    page = (tmp_path / study.PAGE).read_text()
    assert page.count("plotly.js v") == 1
    assert "Not drawn" not in page
    for number in range(4):
        assert f'id="figure{number}"' in page
    assert (tmp_path / study.KEPT / "0" / "policy" / "manifest.json").is_file()

    # A trial again, from its record.
    row = next(row for row in rows if row["state"] == "complete" and row["number"])
    again = optuna.trial.FixedTrial(row["params"], number=row["number"])
    assert tune.run_trial(again, params, row["params"], "repeat") == row["value"]


def rivals_params(**changes: Any) -> Params:
    tree = small_tree()
    tree["runtime"]["checkpoint_seconds"] = 0.02
    tree["tune"] |= {
        "agent": "dsrl",
        "parameters": {
            "dsrl.lr": {"type": "float", "low": 0.0001, "high": 0.01, "log": True},
            "dsrl.actor.bound": {"type": "choice", "choices": [1.5, 3.0]},
        },
        "objective": {"policy": "dp", "metric": "return"},
        **changes,
    }
    return build(tree, Path("params.yaml"))


def test_a_rival_is_tuned_like_modip(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its study runs, goes on with a trial that was killed, and has a record, a page and its winner's weights."""
    params = rivals_params()
    tune.check(params)
    calm = tune.open_study(params, "rival-calm", home)
    tune.work(calm, tune.search(params), home)
    assert states(calm) == {"complete": 3}
    assert len({one.value for one in calm.get_trials()}) == 3

    hurt, rows = tune.open_study(params, "rival", home), finetune.curve_rows
    with monkeypatch.context() as patch:

        def killed(task: Any, acts: Any, env_steps: int, env: Any) -> list[dict[str, Any]]:
            if env_steps and len(hurt.get_trials()) == 2:
                raise InterruptedError
            return rows(task, acts, env_steps, env)

        patch.setattr(finetune, "curve_rows", killed)
        with pytest.raises(InterruptedError):
            tune.work(hurt, tune.search(params), home)
    victim = hurt.get_trials()[1]
    assert victim.state == TrialState.RUNNING
    hurt._storage.set_trial_user_attr(victim._trial_id, "worker", {**tune._me(), "born": "0"})
    with caplog.at_level(logging.INFO):
        tune.work(hurt, tune.search(params), home)
    assert "trial1 lost its worker: going on with it" in caplog.messages
    assert [line for line in caplog.messages if line.startswith("trial1: env steps: resumed at")]
    told = [[(one.params, one.value) for one in each.get_trials()] for each in (calm, hurt)]
    assert told[0] == told[1]

    again = tune.open_study(params, "rival-shortlist", home)
    settings = {name: one.params for name, one in study.finalists(params, hurt).items()}
    tune.work(again, tune.again(params, "shortlist", settings, [9]), home)
    short = study.shortlist(params, hurt, again.get_trials())
    first = study.winner(short)
    assert first is not None
    assert first["mean"] == max(row["mean"] for row in short)
    second = tune.open_study(params, "rival-confirm", home)
    tune.work(second, tune.again(params, "confirm", settings, [1, 2]), home)
    short = [{**row, "mean": float(row["setting"] != "default")} for row in short]
    record = study.write(params, hurt, short, second.get_trials(), home, tmp_path)
    assert (record["agent"], record["winner"]) == ("dsrl", short[1])
    assert set(record["confirmation"]) == {"seeds", "missing", "dp", "better", "worse"}
    assert [columns for _, columns, _ in study.tables(record)] == [
        ["seed 0", "seed 9", "mean"], ["seed 1", "seed 2", "mean"],
    ]  # fmt: skip
    best = YAML(typ="safe").load((tmp_path / study.BEST).read_text())
    assert set(best) == {"dsrl"}
    assert "return of the DP alone" in (tmp_path / study.PAGE).read_text()
    kept = checkpoint.load(tmp_path / study.KEPT / "0" / "policy", "policy")[1]
    assert kept["agent"] == "dsrl"
    assert "actor" in kept["config"]
    study.show(record)


def _worker(home: Path, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.tune", "--worker", name], cwd=home, stderr=subprocess.PIPE
    )


def _save(params: Params, home: Path) -> None:
    """As the workers read it."""
    tree = small_tree({"modip.explore_std": 0.1})
    tree["runtime"]["checkpoint_seconds"] = 0.05
    tree["tune"] = params.tune.model_dump(mode="json")
    assert build(tree, Path("params.yaml")).tune == params.tune
    YAML().dump(tree, home / "params.yaml")


@pytest.mark.slow
def test_a_killed_trial_is_gone_on_with(home: Path) -> None:
    """The same trials and values as in a study that nobody disturbed, and as many."""
    params = params_with(trials=2, env_steps=600, episodes=2)
    _save(params, home)
    calm = tune.open_study(params, "calm", home)
    tune.work(calm, tune.search(params), home)
    victim = _worker(home, "killed")
    for _ in range(3000):
        if list((home / "scratch").glob("trial0-*/state/manifest.json")):
            break
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    hurt = tune.open_study(params, "killed", home)
    assert [one.state for one in hurt.get_trials()] == [TrialState.RUNNING]
    said = _worker(home, "killed").communicate(timeout=120)[1].decode()
    assert "trial0 lost its worker: going on with it" in said
    assert "resumed at" in said
    hurt = tune.open_study(params, "killed", home)
    assert [one.user_attrs["attempts"] for one in hurt.get_trials()] == [2, 1]
    told = [[(one.params, one.value) for one in each.get_trials()] for each in (calm, hurt)]
    assert told[0] == told[1]


@pytest.mark.slow
def test_two_workers_share_a_study(home: Path) -> None:
    params = params_with(trials=5, env_steps=200)
    _save(params, home)
    tune._run_workers(params, "shared", home, 2)
    found = tune.open_study(params, "shared", home)
    assert states(found) == {"complete": 5}
    assert len({one.user_attrs["worker"]["pid"] for one in found.get_trials()}) == 2


def test_a_trial_that_kills_every_worker_is_given_up(home: Path) -> None:
    params = params_with(trials=1)
    found = tune.open_study(params, "deadly", home)
    for _ in range(tune.ATTEMPTS):
        claimed = tune._claim(found, tune.search(params), home)
        assert claimed is not None
        claimed[0].set_user_attr("worker", {**tune._me(), "born": "0"})  # its process is gone
    assert tune._claim(found, tune.search(params), home) is None
    assert states(found) == {"fail": 1}
    assert "lost its worker 3 times" in found.get_trials()[0].user_attrs["reason"]


def test_a_trial_that_diverges_fails_and_the_study_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with(trials=2)
    whole = tune.run_trial

    def run(trial: Any, *given: Any) -> float:
        if trial.number == 1:
            raise training.DivergedError("policy_loss is nan")
        return whole(trial, *given)

    monkeypatch.setattr(tune, "run_trial", run)
    found = tune.open_study(params, "diverges", home)
    tune.work(found, tune.search(params), home)
    assert states(found) == {"complete": 1, "fail": 1}


def test_several_seeds_are_averaged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_with(seeds=[0, 1], confirm_seeds=[2, 3])
    monkeypatch.setattr(tune, "_run_seed", lambda params, seed, *given: float(seed))
    trial = optuna.trial.FixedTrial(tune.defaults(params))
    assert tune.run_trial(trial, params, tune.defaults(params), "x") == 0.5


def test_ranges_that_never_fit_are_the_users_error(home: Path) -> None:
    wide = {"type": "int", "low": 3, "high": 10**6, "log": False}
    params = params_with(trials=2, parameters={"mppi.horizon": wide})
    found = tune.open_study(params, "never", home)
    kind = tune.search(params)
    monkey = dataclasses.replace(kind, run=lambda *given: 1.0)
    with pytest.raises(UserError, match=r"50 draws in a row .*exceeds chunk.horizon 4.*narrow"):
        tune.work(found, monkey, home)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown path": ({"parameters": {"mppi.horizn": HORIZON}}, "'mppi.horizn' is unknown: did you mean 'mppi.horizon'"),
    "not a value": ({"parameters": {"mppi": HORIZON}}, "'mppi' is unknown: .*SECTION.FIELD"),
    "the budget": ({"parameters": {"modip.env_steps": HORIZON}}, "set tune.env_steps"),
    "default outside": ({"parameters": {"mppi.horizon": {**HORIZON, "low": 4, "high": 5}}}, r"mppi.horizon: the default of toy \(value 3\)"),
    "wrong type": ({"parameters": {"mppi.horizon": TEMPERATURE}}, r"default of toy \(value 3\) is not in its range of type float"),
    "empty range": ({"parameters": {"mppi.horizon": {**HORIZON, "low": 4}}}, "low 4 is not below high 4"),
    "no logarithm": ({"parameters": {"mppi.penalty": {**TEMPERATURE, "low": 0.0}}}, "no logarithm"),
    "unknown data set": ({"dataset": "toi"}, "tune.dataset 'toi' is unknown: did you mean 'toy'"),
    "seeds not fresh": ({"confirm_seeds": [0, 1]}, "confirm_seeds .0, 1. must be fresh"),
    "seeds of the shortlist": ({"confirm_seeds": [1, 9]}, "confirm_seeds .1, 9. must be fresh: .*used before, .0, 9."),
    "a seed twice": ({"shortlist_seeds": [3, 3]}, "shortlist_seeds .3, 3. must be fresh"),
    "starts not its own": ({"first_seed": 10_003}, "tune.first_seed .value 10003"),
    "pruner beyond the budget": ({"pruner": {"type": "hyperband", "min_resource": 99, "reduction_factor": 2}}, "min_resource 99 exceeds env_steps 48"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_study_is_named_when_params_are_read(name: str) -> None:
    changes, text = WRONG[name]
    with pytest.raises(UserError, match=f"^params.yaml: .*{text}"):
        params_with(**changes)


LR = {"type": "float", "low": 0.0001, "high": 0.01, "log": True}
CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown agent": ({"agent": "dsl"}, r"tune.agent 'dsl' is unknown: did you mean 'dsrl'\?"),
    "an agent that has nothing of its own": ({"agent": "bc"}, "tune.agent 'bc' .*choose one of modip, "),
    "what pre-training reads": ({"parameters": {"critics.discount": {**TEMPERATURE, "low": 0.5, "high": 0.99}}}, "'critics.discount': pre-training .* tune values of mppi or modip$"),
    "another agent's": ({"parameters": {"dsrl.lr": LR}}, "'dsrl.lr': .*another agent reads it, .*of modip .* tune values of mppi or modip$"),
    "modip's, for a rival": ({"agent": "dsrl"}, "'mppi.horizon': .*a study of dsrl .* tune values of dsrl$"),
    "a policy that is not there": ({"objective": {"policy": "plan", "metric": "return"}}, r"tune.objective.policy 'plan' is unknown: did you mean 'planner'\?"),
    "a rival's planner": ({"agent": "dsrl", "parameters": {"dsrl.lr": LR}}, "tune.objective.policy 'planner' is unknown: choose one of dp$"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_a_study_that_cannot_be_is_refused(name: str) -> None:
    changes, text = CANNOT[name]
    with pytest.raises(UserError, match=f"^params.yaml: .*{text}"):
        tune.check(params_with(**changes))


def test_without_planning_no_planner_is_made_large() -> None:
    """A setting without one does not fit there; where the policy is what counts, both are compared by that alone."""
    params = params_with(parameters={"modip.planning": {"type": "choice", "choices": [True, False]}})  # fmt: skip
    tune.check(params)
    with pytest.raises(UserError, match="tune.objective.policy 'planner' is unknown: .*of dp$"):
        tune.trial_params(params, {"modip.planning": False})
    params = params_with(objective={"policy": "dp", "metric": "return"})
    runs = [ran("trial 3", seed, {"dp": 2.0 + seed}) for seed in (1, 2)]
    runs += [ran("default", seed, {"dp": 1.0, "planner": 1.0}) for seed in (1, 2)]
    verdict = study._verdict(params, "trial 3", runs)
    assert verdict is not None
    assert "planner" not in verdict
    assert verdict["dp"]["winner"] == [3.0, 4.0]


def test_a_measure_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"metric \(value 'score'\): modip/Toy-v0 has none"):
        tune.check(params_with(objective={"policy": "dp", "metric": "score"}))


@pytest.mark.parametrize(
    "changes", [{"env_steps": 60}, {"episodes": 5}, {"parameters": {"mppi.horizon": HORIZON}}]
)
def test_a_study_of_other_trials_is_another_study(changes: dict[str, Any]) -> None:
    assert tune.name_of(params_with(**changes)) != tune.name_of(params_with())
    more = params_with(trials=9, shortlist=2, shortlist_seeds=[5], confirm_seeds=[6, 7])
    assert tune.name_of(more) == tune.name_of(params_with())


def test_a_trial_keeps_the_shares_of_its_budget() -> None:
    cell = tune.trial_params(params_with(env_steps=30), {"mppi.horizon": 2}).cell("toy")
    assert (cell.modip.env_steps, cell.modip.final_env_steps, cell.mppi.horizon) == (30, 6, 2)
    whole = tune.confirm_params(params_with(), {"mppi.horizon": 2}).cell("toy")
    assert (whole.modip.env_steps, whole.evaluation.curve_episodes) == (60, 6)
    assert whole.evaluation.first_seed == 10_000


def ran(setting: str, seed: int, ends: dict[str, float]) -> optuna.trial.FrozenTrial:
    """A finished run of the confirmation, by the return of each policy."""
    curve = [
        {"seed": seed, "env_steps": 60, "policy": policy, "return": value}
        for policy, value in ends.items()
    ]
    return optuna.trial.create_trial(
        value=ends["dp"],
        params={"setting": setting, "seed": seed},
        distributions={
            "setting": optuna.distributions.CategoricalDistribution(["default", "trial 3"]),
            "seed": optuna.distributions.CategoricalDistribution([1, 2, 3]),
        },
        user_attrs={"curve": curve},
    )


@pytest.mark.parametrize(
    ("winner", "default", "says"),
    [
        ([1.0, 1.1, 1.2], [0.1, 0.2, 0.25], "better than the default"),
        ([1.0, 0.1, 1.2], [0.9, 0.2, 0.3], "no better than the default, as far"),
        ([0.1, 0.2, 0.25], [1.0, 1.1, 1.2], "worse than the default"),
    ],
)
def test_better_is_said_only_with_confidence(
    winner: list[float], default: list[float], says: str
) -> None:
    params = params_with(confirm_seeds=[1, 2, 3])
    runs = [
        ran(setting, seed, {"dp": -value, "planner": value})
        for setting, values in (("trial 3", winner), ("default", default))
        for seed, value in zip((1, 2, 3), values, strict=True)
    ]
    rows = [{"setting": "default", "mean": 1.0}, {"setting": "trial 3", "mean": 2.0}]
    verdict = study._verdict(params, "trial 3", runs)
    assert verdict is not None
    assert verdict["dp"]["difference"] == -verdict["planner"]["difference"]  # judged by the planner
    assert study.sentence("planner", rows, verdict).startswith(says)
    part = study._verdict(params, "trial 3", runs[:5])
    assert part is not None
    assert (part["seeds"], part["missing"]) == ([1, 2], 1)
    assert study.sentence("planner", rows, study._verdict(params, "trial 3", runs[:3])).startswith(
        "not conf"
    )


@pytest.mark.parametrize(
    ("means", "who", "says"),
    [
        ((1.5, 2.0, 1.0), "trial 3", "not confirmed"),
        ((2.0, 1.0, 2.0), "default", "the default stands: trial 4 came closest, 0 below it"),
        (
            (2.0, 1.75, None),
            "default",
            "the default stands: trial 3 came closest, 0.25 below it in the mean of 2 seeds",
        ),
        ((2.0, None, None), "default", "the default stands: no other setting ran to its end"),
        ((None, 1.0, None), "trial 3", "not confirmed"),
        ((None, None, None), None, "no winner"),
    ],
)
def test_the_best_mean_wins_and_the_default_wins_ties(
    means: tuple[float | None, ...], who: str | None, says: str
) -> None:
    names = ("default", "trial 3", "trial 4")
    rows = [
        {"setting": name, "mean": mean, "planner": [mean, mean]}
        for name, mean in zip(names, means, strict=True)
    ]
    assert (study.winner(rows) or {"setting": None})["setting"] == who
    assert study.sentence("planner", rows, None).startswith(says)


@pytest.mark.parametrize("luck", [False, True])
def test_only_a_winner_of_the_shortlist_is_confirmed(
    luck: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three parts: a best trial that was only lucky does not win. Asked again, nothing runs."""
    params = params_with(trials=3)
    _save(params, tmp_path)
    monkeypatch.chdir(tmp_path)
    prepared, ran = [], []

    def prepare(params: Params, source: Path, place: Path, seeds: list[int]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        prepared.append(seeds)

    def run_workers(params: Params, name: str, place: Path, number: int) -> None:
        with contextlib.chdir(place):
            tune._worker(params, name)

    def run_seed(params: Params, seed: int, name: str, trial: Any, *given: Any) -> float:
        ran.append((name, seed))
        default = params.cell("toy").mppi.temperature == 0.5
        value = 2.0 if default else 3.0 if seed == 0 or not luck else 0.0
        curve = [
            {"seed": seed, "env_steps": 48, "policy": policy, "return": value}
            for policy in ("dp", "planner")
        ]
        trial.set_user_attr("curve", curve)
        return value

    for name, given in (("prepare", prepare), ("_run_workers", run_workers), ("_run_seed", run_seed)):  # fmt: skip
        monkeypatch.setattr(tune, name, given)
    record = tune.tune(Path("params.yaml"))
    search, more = [("trial0", 0), ("trial1", 0), ("trial2", 0)], [("shortlist0", 9), ("shortlist1", 9)]  # fmt: skip
    if luck:
        assert ran == [*search, *more]
        assert record["winner"]["setting"] == "default"
        assert record["confirmation"] is None
        assert record["verdict"].startswith("the default stands: trial 1 came closest, 0.5 below")
    else:
        assert ran == [*search, *more, *((f"confirm{i}", 1 + i // 2) for i in range(4))]
        assert record["winner"]["setting"] == "trial 1"
        assert record["verdict"] == "better than the default"
    assert prepared == [[0], [9], [1, 2]][: 2 if luck else 3]
    done = len(ran)
    assert tune.tune(Path("params.yaml")) == record
    assert len(ran) == done
    study.show(record)


def test_a_setting_that_diverged_on_a_seed_is_out_of_the_race(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with(trials=4, shortlist=2, shortlist_seeds=[1, 2], confirm_seeds=[3, 4])

    def run(params: Params, seed: int, name: str, trial: Any, *given: Any) -> float:
        if (trial.params.get("setting"), seed) == ("trial 3", 2):
            raise training.DivergedError("policy_loss is nan")
        value = seed + float("trial 3" in trial.params.values()) + trial.number * (seed == 0)
        curve = [
            {"seed": seed, "env_steps": 48, "policy": policy, "return": value}
            for policy in ("dp", "planner")
        ]
        trial.set_user_attr("curve", curve)
        return float(value)

    monkeypatch.setattr(tune, "_run_seed", run)
    found = tune.open_study(params, "race", home)
    tune.work(found, tune.search(params), home)
    top = study.finalists(params, found)
    assert list(top) == ["default", "trial 3", "trial 2"]
    settings = {name: one.params for name, one in top.items()}
    again = tune.open_study(params, "race-again", home)
    tune.work(again, tune.again(params, "shortlist", settings, [1, 2]), home)
    assert states(again) == {"complete": 5, "fail": 1}
    rows = study.shortlist(params, found, again.get_trials())
    assert [row["planner"] for row in rows] == [[0, 1, 2], [3, 2, None], [2, 1, 2]]
    assert [row["mean"] for row in rows] == [1, None, 5 / 3]
    first = study.winner(rows)
    assert first is not None
    assert first["setting"] == "trial 2"
    assert study.shortlist(params, found, [])[0]["seeds"] == [0]  # with nobody beside the default


APPLIED: dict[str, dict[str, Any]] = {
    "fetch-pick-and-place": {"mppi.horizon": 6, "mppi.temperature": 0.123},
    "hopper-surrogate-medium": {"mppi.temperature": 0.7, "modip.demo_share.start": 0.4},
    "pusht-official": {"mppi.horizon": 7},
}  # with no entry, with one that others share, and with a pattern


def _record(dataset: str, setting: str, values: dict[str, Any]) -> None:
    record = {
        "dataset": dataset,
        "winner": {"setting": setting, "params": values},
        "verdict": "better than the default",
    }
    study.RECORD.parent.mkdir()
    study.RECORD.write_text(json.dumps(record))


@pytest.mark.parametrize("dataset", APPLIED)
def test_the_winner_goes_into_the_file_and_nothing_else_changes(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(ROOT / "params.yaml", "params.yaml"))
    before, lines = load(path), path.read_text().splitlines()
    _record(dataset, "trial 1", APPLIED[dataset])
    with caplog.at_level(logging.INFO):
        study.apply(path)
    assert caplog.messages[-1] == "report/study.json: better than the default"
    for where, value in APPLIED[dataset].items():
        old = study.value_of(before.cell(dataset), where)
        assert f"params.yaml: {where} {value}, was {old}" in caplog.messages
    after, written = load(path), path.read_text().splitlines()
    for where, value in APPLIED[dataset].items():
        assert study.value_of(after.cell(dataset), where) == value
    assert {n for n in after.cells if after.cells[n] != before.cells[n]} == {dataset}
    comments = [line.strip() for line in lines if line.strip().startswith("#")]
    assert [line.strip() for line in written if line.strip().startswith("#")] == comments
    assert len(set(lines) - set(written)) <= 5


def test_an_entry_that_a_later_pattern_overrides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = small_tree()
    tree["mppi"]["by_dataset"] = {"toy": {"horizon": 2}, "t*": {"horizon": 1}}
    YAML().dump(tree, tmp_path / "params.yaml")
    _record("toy", "trial 1", {"mppi.horizon": 4})
    with pytest.raises(UserError, match="an entry after 'toy' sets mppi.horizon again"):
        study.apply(Path("params.yaml"))
    assert load(Path("params.yaml")).cell("toy").mppi.horizon == 1


def test_a_default_that_stands_is_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _record("toy", "default", {"mppi.horizon": 4})
    with pytest.raises(UserError, match=r"study.json: .*; there is nothing to apply"):
        study.apply(ROOT / "params.yaml")


def test_without_a_study_there_is_nothing_to_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="report/study.json: no such file; `make tune` writes it"):
        study.apply(ROOT / "params.yaml")


@pytest.mark.e2e
def test_dvc_makes_what_trials_start_from_and_the_users_results_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the tree with the study's seeds; here up to the stage `resolve`, with the project's own file."""
    clone = Clone(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "data/own/mine.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "pretrain_model", SimpleNamespace(__name__="pipeline.resolve"))
    for name in ("DVC_NO_ANALYTICS", "DVC_SITE_CACHE_DIR"):
        monkeypatch.setenv(name, clone.env[name])
    monkeypatch.delenv("PYTHONPATH")
    params = load(Path("params.yaml"))
    made = tmp_path / "scratch" / "tune" / "x"
    tune.prepare(params, Path("params.yaml"), made, [7, 8])
    inside = load(made / "params.yaml")
    assert (inside.dataset, inside.seed) == ((params.tune.dataset,), (7, 8))
    assert inside.cells == params.cells
    cells = f"data/cells/{params.tune.dataset}"
    assert (made / cells / "mppi.json").is_file()
    assert (made / "data/own/mine.txt").is_file()
    assert not (tmp_path / cells).exists()
    assert list((tmp_path / ".dvc/cache/files").rglob("*.dir"))  # the cache is one
    assert (tmp_path / "params.yaml").read_text() == text
    assert not os.path.lexists(tmp_path / "dvc.lock")
    (tmp_path / "params.yaml").write_text(text.replace("    penalty: 1.0", "    penalty: -1.0"))
    with pytest.raises(UserError, match="`dvc repro` ended with status 255"):
        tune.prepare(params, Path("params.yaml"), made, [7])
