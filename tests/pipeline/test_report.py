"""The report of synthetic artifacts: what is read, what it says, and that it needs nothing else."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from ruamel.yaml import YAML

from modip.config import Params, build
from modip.errors import UserError
from pipeline import report, stage
from pipeline.report import duration, number, print_table
from tests.helpers import project_tree

FETCH, HOPPER = "fetch-pick-and-place", "hopper-surrogate-medium"
ENVS = {FETCH: "FetchPickAndPlace-v4", HOPPER: "Hopper-v5"}
VERSIONS = {
    FETCH: "gymnasium-robotics 1.4.2, mujoco 3.9.0",
    HOPPER: "gymnasium 1.2.0, mujoco 3.9.0",
}
LEVELS = {"bc": 0.6, "control": 0.62, "dp": 0.9, "planner": 0.95}
FIELDS = ["dataset", "env", "agent", "stage", "policy", "seed", "env_steps", "episodes",
          "success", "return", "score", "seconds"]  # fmt: skip
MP4 = b"\x00\x00\x00\x18ftypmp42 not really a film"


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parameters(
    datasets: list[str], seeds: list[int], agents: tuple[str, ...] = ("bc", "modip")
) -> Params:
    tree = project_tree() | {"dataset": datasets, "agent": list(agents), "seed": seeds}
    return build(tree, Path("params.yaml"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def evaluated(
    dataset: str, level: float, seed: int, env_steps: int, episodes: int
) -> tuple[Any, Any]:
    """A result and the episodes it sums up. `level` is the policy's true success rate or share of 3,400."""
    rng = np.random.default_rng([seed, env_steps, round(1000 * level)])
    if dataset == HOPPER:
        returns = rng.normal(3400 * level, 300, episodes).clip(0).tolist()
        success, score = None, 100 * (float(np.mean(returns)) + 20.272305) / (3234.3 + 20.272305)
        flags = None
    else:
        flags = (rng.random(episodes) < level).tolist()
        returns = [float(rng.integers(5, 40)) if flag else 0.0 for flag in flags]
        success, score = float(np.mean(flags)), None
    result = {
        "env_steps": env_steps, "grad_steps": 6000 + env_steps, "episodes": episodes, "success": success,
        "return": float(np.mean(returns)), "return_std": float(np.std(returns)), "score": score,
        "max_reward": 1.0, "length": 50.0,
    }  # fmt: skip
    seeds = list(range(10_000, 10_000 + episodes))
    return result, {
        "seeds": seeds,
        "returns": returns,
        "success": flags,
        "lengths": [50] * episodes,
    }


def write_run(
    dataset: str, agent: str, seed: int, *, videos: bool = True, episodes: int = 100
) -> Any:
    """The artifacts of one cell, as the stages write them. Returns the content of metrics.json."""
    folder, kind = report.ARTIFACTS / dataset / agent / str(seed), agent.partition("-")[0]
    evaluation, details = folder / "evaluation", folder / "evaluation" / "details"
    plan = {"bc": [("bc", "dp", "bc", 0), ("control", "dp", "control", 0)],
            "modip": [("final", "dp", "dp", 10_000), ("final", "planner", "planner", 10_000)],
            "modip-no-planning": [("final", "dp", "dp", 10_000)],
            "modip-q-terminal": [("final", "dp", "dp", 10_000), ("final", "planner", "planner", 10_000)],
            "dsrl": [("final", "dp", "dp", 10_000)]}[agent]  # fmt: skip
    results: Any = {}
    listed: Any = {}
    for name, policy, level, steps in plan:
        result, each = evaluated(dataset, LEVELS[level], seed, steps, episodes)
        results.setdefault(name, {})[policy] = result
        listed.setdefault(name, {})[policy] = each
    metrics = {"dataset": dataset, "env": ENVS[dataset], "env_version": VERSIONS[dataset],
               "agent": agent, "seed": seed, "results": results}  # fmt: skip
    write(evaluation / "metrics.json", metrics)
    write(details / "episodes.json", listed)
    pretrained = folder.parents[1] / "pretrained" / str(seed)
    write(pretrained / "policy.json", {"pretrain_bc": 60.0 + seed})
    write(pretrained / "model.json", {"pretrain_model": 30.0})
    write(
        folder / "timing.json", {"finetune": 400.0, "updates": 2000, "update_seconds": 100.0 + seed}
    )
    if kind == "modip":
        write_modip(dataset, seed, folder)
    took = {"parameters": 1000 + seed, "ms_per_action": {"1": 2.0 + seed, "25": 0.5}}
    write(
        details / "cost.json", {n: dict.fromkeys(policies, took) for n, policies in results.items()}
    )
    films = sorted({f"{name}_{policy}" for name, policy, *_ in plan if name != "control"})
    (details / "videos").mkdir()
    for film in films if videos else []:
        (details / "videos" / f"{film}.mp4").write_bytes(MP4)
    if not videos:
        (details / "videos" / "unavailable.txt").write_text("no videos: install libegl1\n")
    return metrics


def write_modip(dataset: str, seed: int, folder: Path) -> None:
    """What only modip writes: the curve and the world model's predictions."""
    rng = np.random.default_rng(seed)
    lines: list[Any] = [
        {"kind": "train", "env_steps": 0, "grad_steps": 0, "seconds": 0.1, "policy_loss": 0.2}
    ]
    for k in range(5):
        for policy in ("dp", "planner"):
            share = k / 4 if policy == "dp" else math.sqrt(k / 4)
            level = LEVELS["bc"] + share * (LEVELS[policy] - LEVELS["bc"])
            head = {"kind": "evaluation", "env_steps": 2000 * k, "grad_steps": 1500 * k,
                    "seconds": (70.0 + 5 * seed) * k, "policy": policy}  # fmt: skip
            lines.append(
                head | evaluated(dataset, level, seed, 2000 * k, 50)[0] | {"env_steps": 2000 * k}
            )
    (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    truth = rng.gamma(2.0, 3.0, 400)
    write(
        folder / "evaluation" / "details" / "calibration.json",
        {
            "value": {"predicted": (truth * 0.8 + rng.normal(1, 2, 400)).tolist(), "real": truth.tolist()},
            "reward": {"predicted": (truth / 4 + rng.normal(0, 0.3, 400)).tolist(), "real": (truth / 4).tolist()},
            "error_by_step": (0.03 * np.arange(1, 9) ** 0.7 * (1 + 0.1 * seed)).tolist(),
        },
    )  # fmt: skip


def write_facts(dataset: str) -> None:
    write(
        report.about(dataset),
        {
            "dataset": dataset, "env_id": ENVS[dataset], "env_version": VERSIONS[dataset],
            "source": "scripted here: noise 1.8, seed 7", "licence": "the project's own", "sha256": "ab" * 32,
            "description": "Scripted pick-and-place, noisy.", "episodes": 200, "steps": 10000,
            "return_mean": 9.415, "return_std": 12.78, "return_min": 0.0, "return_max": 50.0, "score_mean": None,
            "success_rate": 0.4, "terminated": 0, "length_min": 50, "length_max": 50, "obs_dim": 28,
            "action_dim": 4, "action_min": -1.0, "action_max": 1.0,
            "fidelity_transitions": 0, "fidelity_obs_error_median": None, "fidelity_obs_error_p95": None,
            "fidelity_reward_error_median": None, "fidelity_reward_error_p95": None,
            "fidelity_terminated_agree": None, "fidelity_note": "200 of 200 left out: not observed",
        },
    )  # fmt: skip


class Page(HTMLParser):
    """What a page loads, its text, and its tables as lists of rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [(tag, name, value or "") for name, value in attrs
                       if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action")]  # fmt: skip
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip() + " "


def page() -> tuple[str, Page]:
    html = (report.REPORT / "index.html").read_text()
    return html, Page(html)


def full(seeds: list[int], **options: Any) -> tuple[Params, dict[tuple[str, str, int], Any]]:
    """Two data sets, two agents."""
    params = parameters([FETCH, HOPPER], seeds)
    metrics = {(dataset, agent, seed): write_run(dataset, agent, seed, **options)
               for dataset in (FETCH, HOPPER) for agent in ("bc", "modip") for seed in seeds}  # fmt: skip
    write_facts(FETCH)
    return params, metrics


class Built(NamedTuple):
    """A report that exists: tests only read it."""

    folder: Path
    params: Params
    metrics: dict[tuple[str, str, int], Any]
    rows: list[Any]


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params, metrics = full([0, 1, 2])
        rows, missing = report.build(params)
        assert not missing
    return Built(folder, params, metrics, rows)


@pytest.fixture
def built(three_seeds: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    monkeypatch.chdir(three_seeds.folder)
    return three_seeds


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without content, for tests of the rest: drawing takes a second."""

    def savefig(_: Figure, to: Any, **__: Any) -> None:
        if isinstance(to, io.StringIO):
            to.write("<svg></svg>")

    monkeypatch.setattr(Figure, "savefig", savefig)


def table(rows: Any, missing: Any = ()) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    print_table(console, rows, missing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_summary_holds_exactly_the_rows(built: Built) -> None:
    rows = json.loads((report.REPORT / "summary.json").read_text())
    assert len(rows) == 2 * 3 * 4
    for row in rows:
        assert list(row) == FIELDS
        cell = built.metrics[row["dataset"], row["agent"], row["seed"]]
        assert row["env"] == cell["env"]
        found = cell["results"][row["stage"]][row["policy"]]
        for field in ("env_steps", "episodes", "success", "return", "score"):
            assert row[field] == found[field]
        bc = 60.0 + row["seed"]
        assert row["seconds"] == {"bc": bc, "control": bc + 400, "final": bc + 430}[row["stage"]]


def test_a_rival_has_its_row_and_paid_for_no_model() -> None:
    agents = ("bc", "modip", "dsrl")
    params = parameters([FETCH], [0], agents)
    for agent in agents:
        write_run(FETCH, agent, 0)
    write_facts(FETCH)
    rows, missing = report.build(params)
    assert not missing
    own = [row for row in rows if row["agent"] == "dsrl"]
    assert [(row["stage"], row["policy"], row["seconds"]) for row in own] == [
        ("final", "dp", 460.0)
    ]
    assert any(line.startswith("DSRL ") for line in table(rows))
    assert set(json.loads((report.REPORT / "metrics.json").read_text())[FETCH]) >= {"dsrl_dp"}
    html, _ = page()
    assert "After: DSRL" in html


def test_a_variant_has_its_rows_and_its_own_times(undrawn: None) -> None:
    """As its agent, but for what it says itself: here a pre-training of its own, or none of a part."""
    variants = ("modip-no-planning", "modip-q-terminal")
    params = parameters([FETCH], [0], ("bc", "modip", *variants))
    for agent in params.agent:
        write_run(FETCH, agent, 0)
    for agent, own in zip(variants, ({"pretrain_model": 0.0}, {"pretrain_model": 45.0}), strict=True):  # fmt: skip
        write(report.ARTIFACTS / FETCH / agent / "0/timing.json", {"finetune": 400.0, **own})
    write_modip(FETCH, 5, report.ARTIFACTS / FETCH / "modip-q-terminal/0")
    rows, missing = report.build(params)
    assert not missing
    found = {report.label(report.key(row)): row["seconds"] for row in rows}
    assert found == {
        "BC": 60.0, "BC control": 460.0, "MODIP DP alone": 490.0, "MODIP planner": 490.0,
        "MODIP (no planning) DP alone": 460.0, "MODIP (q terminal) DP alone": 505.0,
        "MODIP (q terminal) planner": 505.0,
    }  # fmt: skip
    assert all(len(line) <= 80 for line in table(rows))
    assert "planning)" in "\n".join(table(rows))
    html, _ = page()
    assert "modip.planning: false" in html
    assert "modip-gaussian-prior" not in html
    means = json.loads((report.REPORT / "metrics.json").read_text())[FETCH]
    assert {"modip_planner", "modip-q-terminal_planner", "modip-no-planning_dp"} <= set(means)
    # The world model's figures are MODIP's, and no variant's.
    one = report._model(FETCH, report.read(params, report.cells(params))[0])
    few = parameters([FETCH], [0])
    alone = report._model(FETCH, report.read(few, report.cells(few))[0])
    assert one is not None
    assert alone is not None
    for found_bins, wanted in zip(
        one["predictions"][0].bins, alone["predictions"][0].bins, strict=True
    ):
        np.testing.assert_equal(found_bins, wanted)


def test_a_rivals_variant_is_called_like_it() -> None:
    assert report.label(("dsrl-sac", "final", "dp")) == "DSRL (sac)"


def test_metrics_are_means_over_seeds(built: Built) -> None:
    """Under names that do not change with the seed, so that experiments stand side by side."""
    found = json.loads((report.REPORT / "metrics.json").read_text())
    rows = json.loads((report.REPORT / "summary.json").read_text())
    assert set(found) == {FETCH, HOPPER}
    for dataset in found:
        assert set(found[dataset]) == {"bc", "control", "modip_dp", "modip_planner"}
        final = [
            row
            for row in rows
            if (row["dataset"], row["stage"], row["policy"]) == (dataset, "final", "dp")
        ]
        for measure in ("success", "return", "score"):
            values = [row[measure] for row in final]
            got = found[dataset]["modip_dp"].get(measure)
            assert got == (None if None in values else pytest.approx(np.mean(values)))


def test_page_loads_nothing_from_elsewhere(built: Built) -> None:
    html, found = page()
    for tag, name, value in found.links:
        inside = value.startswith(("#", "data:"))
        assert inside or (tag, name) == ("a", "href"), (tag, name, value[:80])
        assert inside or value.startswith("https://arxiv.org/")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "<script" not in html
    assert html.count("data:video/mp4;base64,") == 2 * 3
    assert html.count("<svg") == 4 + 3 + 2 + 3  # curves of success and return; the model's three


def test_tables_show_the_numbers_of_the_artifacts(built: Built) -> None:
    _, found = page()
    fetch = next(t for t in found.tables if t[-1][0].startswith("MODIP planner"))
    values = [
        built.metrics[FETCH, "modip", seed]["results"]["final"]["planner"] for seed in (0, 1, 2)
    ]
    success, returns = ([value[name] for value in values] for name in ("success", "return"))
    assert fetch[-1][1].startswith(f"{np.mean(success):.3f}")
    assert fetch[-1][3].startswith(f"{np.mean(returns):.2f}")
    low, high = re.findall(r"[\d.]+", fetch[-1][1])[1:]
    assert min(success) - 1e-3 <= float(low) <= float(high) <= max(success) + 1e-3
    each = next(t for t in found.tables if "Seed " in t[0])
    for row in each[1:]:
        name, policy = {"BC ": ("bc", "dp"), "BC control ": ("control", "dp"), "MODIP DP alone ": ("final", "dp"),
                        "MODIP planner ": ("final", "planner")}[row[0]]  # fmt: skip
        agent = "modip" if name == "final" else "bc"
        cell = built.metrics[FETCH, agent, int(row[1])]["results"][name][policy]
        assert row[2] == f"{cell['success']:.3f} "
        assert row[3] == f"{number(cell['return'])} ± {number(cell['return_std'])} "
    for dataset in (FETCH, HOPPER):
        assert f"{ENVS[dataset]} · {VERSIONS[dataset]}" in found.text
    assert "licence: the project's own" in found.text
    assert "3 seeds" in found.text


def test_success_is_a_dash_where_the_environment_has_none(built: Built) -> None:
    scores = [
        built.metrics[HOPPER, "bc", seed]["results"]["bc"]["dp"]["score"] for seed in (0, 1, 2)
    ]
    lines = table([row for row in built.rows if row["dataset"] == HOPPER])
    row = next(line for line in lines if line.startswith("BC ")).split()
    assert row[1] == "–"
    assert f"{np.mean(scores):.1f}" in row
    _, found = page()
    line = next(t for t in found.tables if "D4RL score mean " in t[0])[1]
    assert line[1].strip() == "–"
    assert line[4].startswith(f"{np.mean(scores):.1f}")


def test_terminal_table_fits(built: Built) -> None:
    for rows in (built.rows, [row for row in built.rows if row["seed"] == 0]):
        lines = table(rows)
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
        absent = table(rows, [f"{FETCH}/modip/{seed}" for seed in range(9)])
        assert len(absent) == len(lines) + 1
        assert "and 7 more" in absent[-1]


@pytest.mark.usefixtures("undrawn")
def test_one_seed_says_so_and_resamples_episodes() -> None:
    params, metrics = full([0])
    report.build(params)
    _, found = page()
    assert "one seed. Its interval resamples the 100 episodes" in found.text
    assert "over the 100 episodes of the only seed" in found.text
    planner = next(t for t in found.tables if t[-1][0].startswith("MODIP planner"))[-1]
    value, low, high = map(float, re.findall(r"[\d.]+", planner[1]))
    success = metrics[FETCH, "modip", 0]["results"]["final"]["planner"]["success"]
    assert value == pytest.approx(success, abs=5e-4)
    width = 2 * 1.96 * math.sqrt(success * (1 - success) / 100)
    assert high - low == pytest.approx(width, rel=0.25)


@pytest.mark.usefixtures("undrawn")
def test_missing_cells_are_named() -> None:
    params = parameters([FETCH], [0, 1])
    write_run(FETCH, "bc", 0)
    write_run(FETCH, "modip", 0)
    write_run(FETCH, "bc", 1)
    broken = report.ARTIFACTS / FETCH / "modip" / "1" / "evaluation" / "metrics.json"
    for content in (None, "{half a", '{"env": "x"}'):
        if content is not None:
            broken.parent.mkdir(parents=True, exist_ok=True)
            broken.write_text(content)
            write(broken.parent / "details" / "episodes.json", {})
        rows, missing = report.build(params)
        assert len(rows) == 6
        assert list(missing) == [f"{FETCH}/modip/1"]
        _, found = page()
        assert "1 of 4 runs are missing" in found.text
        assert f"{FETCH}/modip/1" in found.text
        assert table(rows, missing)[-1] == f"missing: {FETCH}/modip/1"
    assert report.stored(params) == (rows, list(missing))


@pytest.mark.usefixtures("undrawn")
def test_nothing_has_run_yet() -> None:
    params = parameters([FETCH, HOPPER], [0])
    rows, missing = report.build(params)
    assert rows == []
    assert len(missing) == 4
    assert "No run of this data set has results yet" in page()[1].text


@pytest.mark.usefixtures("undrawn")
def test_no_videos_says_why() -> None:
    params, _ = full([0], videos=False)
    report.build(params)
    html, found = page()
    assert "<video" not in html
    assert "No videos: install libegl1" in found.text


@pytest.mark.parametrize("value", [None, math.nan])
def test_nan_shows(value: float | None) -> None:
    params, metrics = full([0, 1])
    broken = metrics[FETCH, "modip", 1]
    broken["results"]["final"]["dp"]["return"] = value
    write(report.ARTIFACTS / FETCH / "modip" / "1" / "evaluation" / "metrics.json", broken)
    curve = report.ARTIFACTS / FETCH / "modip" / "1" / "curve.jsonl"
    curve.write_text(curve.read_text().replace('"return": ', '"return": null, "was": ', 3))
    points = (
        report.ARTIFACTS / FETCH / "modip" / "1" / "evaluation" / "details" / "calibration.json"
    )
    known = json.loads(points.read_text())
    known["value"]["predicted"][:2] = [value, value]
    known["error_by_step"][-1] = value
    write(points, known)
    rows, _ = report.build(params)
    assert sum(row["return"] is None for row in rows) == 1
    _, found = page()
    line = next(row for t in found.tables for row in t if row[0].startswith("MODIP DP alone"))
    assert line[3].strip() == line[4].strip() == "NaN"
    assert "798 points, and 2 that are NaN or infinite" in found.text
    assert any("NaN" in line for line in table(rows) if "DP alone" in line)


@pytest.mark.usefixtures("undrawn")
def test_text_from_files_is_escaped() -> None:
    params, _ = full([0])
    write_facts(FETCH)
    facts = report.about(FETCH)
    facts.write_text(facts.read_text().replace("noisy", "<img src='https://example.org/x.png'>"))
    report.build(params)
    assert "<img" not in page()[0]


def test_plots_are_files_too(built: Built) -> None:
    names = {path.name for path in (report.REPORT / "plots").glob("*.png")}
    ours = [f"{FETCH}_success_env_steps", f"{FETCH}_return_minutes", f"{HOPPER}_return_env_steps",
            f"{FETCH}_value", f"{FETCH}_reward", f"{HOPPER}_error_by_step"]  # fmt: skip
    assert {f"{name}.png" for name in ours} < names
    assert f"{HOPPER}_success_env_steps.png" not in names


@pytest.mark.usefixtures("undrawn")
def test_show_prints_the_stored_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params, _ = full([0, 1])
    tree = project_tree() | {"dataset": [FETCH, HOPPER], "agent": ["bc", "modip"], "seed": [0, 1]}
    YAML().dump(tree, Path("params.yaml"))
    arguments = report.parser()
    # Its handler would outlive the test, and write to a stream that is closed then.
    monkeypatch.setattr(stage, "_log_to_terminal", lambda: None)
    monkeypatch.setattr(sys, "argv", ["report"])
    monkeypatch.setenv("COLUMNS", "80")
    assert stage.run(arguments, report.body) == 0
    first = capsys.readouterr().out
    (report.REPORT / "index.html").unlink()
    monkeypatch.setattr(sys, "argv", ["report", "--show"])
    assert stage.run(arguments, report.body) == 0
    assert capsys.readouterr().out == first
    assert not (report.REPORT / "index.html").exists()
    assert len(first.splitlines()) <= 14
    assert params.dataset == (FETCH, HOPPER)


def test_show_without_a_report_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"summary\.json: no such file; `make run`"):
        report.stored(parameters([FETCH], [0]))


def test_commit_and_whether_files_differ_from_it() -> None:
    assert report.commit() == "unknown (not a git checkout)"
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], check=True)
    assert re.fullmatch(r"[0-9a-f]{12}, clean", report.commit())
    Path("params.yaml").touch()
    assert report.commit().endswith(", with uncommitted changes: params.yaml")


@pytest.mark.parametrize(
    ("value", "measure", "text"),
    [
        (None, "success", "–"),
        (math.nan, "return", "NaN"),
        (0.926, "success", "0.926"),
        (100.25, "score", "100.2"),
        (0.0, "return", "0.000"),
        (9.4151, "return", "9.415"),
        (-20.272, "return", "-20.27"),
        (3281.4, "return", "3,281"),
        (12345.6, "return", "12,346"),
    ],
)
def test_number(value: float | None, measure: str, text: str) -> None:
    assert number(value, measure) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (4.25, "4.2 s"), (59.6, "60 s"), (100.0, "1.7 min"), (1500.0, "25 min"), (9000.0, "2.5 h")],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
