"""The comparison: its page from synthetic cells, its figures by plain loops, and the program killed and continued."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from modip.config import Params, build, load
from modip.errors import UserError
from pipeline import compare, comparison, copied, report, slots
from pipeline.comparison import ABLATIONS, OURS, Compared, blocks, chances, normalised
from pipeline.report import Row, label
from pipeline.workspace import Stage, StageError
from tests.helpers import project_tree, small_tree
from tests.pipeline.test_end_to_end import Clone, _left_behind
from tests.pipeline.test_report import FETCH, HOPPER, Page, write, write_facts, write_run

PUSHT = "pusht-human"
VARIANT = "modip-q-terminal"


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parameters(agents: Sequence[str], seeds: dict[str, list[int]]) -> Params:
    tree = copy.deepcopy(project_tree())
    values = {"agent": "modip", "values": {"mppi.terminal_value": "policy_action_value"}}
    tree["variants"] = {VARIANT: values}
    tree["modip"]["by_dataset"][FETCH] = {"env_steps": 10_000}  # what the synthetic runs took
    tree["compare"] = {name: dict.fromkeys(agents, chosen) for name, chosen in seeds.items()}
    return build(tree, Path("params.yaml"))


class Built(NamedTuple):
    """A page that exists: tests only read it."""

    folder: Path
    params: Params
    rows: list[Row]
    missing: list[str]
    html: str
    page: Page


LOST = {(HOPPER, "dsrl", 2), (FETCH, VARIANT, 4)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Three agents and a variant on two data sets, of which two runs are missing; and a data set without any."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seeds = {FETCH: [0, 1, 2, 3, 4], HOPPER: [0, 1, 2], PUSHT: [0, 1, 2]}
        params = parameters(["bc", "modip", "dsrl", VARIANT], seeds)
        for cell in comparison.cells(params):
            if cell[0] != PUSHT and cell not in LOST:
                write_run(*cell)
        write_facts(FETCH)
        rows, missing = comparison.write(params, folder)
        html = comparison.PAGE.read_text()
    return Built(folder, params, rows, missing, html, Page(html))


def table(found: Page, corner: str) -> list[list[str]]:
    """The first table whose first cell is `corner`."""
    return next(t for t in found.tables if t[0][0].strip() == corner)


def row(found: list[list[str]], name: str) -> list[str]:
    return next(line for line in found if line[0].strip() == name)


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"-?[\d.]+", text.replace(",", ""))]


def test_the_page_needs_nothing_else(built: Built) -> None:
    for tag, name, value in built.page.links:
        inside = value.startswith("#")
        assert inside or (tag, name) == ("a", "href"), (tag, name, value[:80])
        assert inside or value.startswith("https://arxiv.org/")
    assert "<script" not in built.html
    assert not re.search(r"url\((?!#)", built.html)
    ids = set(re.findall(r' id="([^"]+)"', built.html))
    targets = {value[1:] for tag, _, value in built.page.links if tag == "a" and value[0] == "#"}
    assert targets <= ids
    assert {f"agent-{agent}" for agent in comparison.agents_of(built.params)} < ids


def test_missing_runs_are_named(built: Built) -> None:
    cells = comparison.cells(built.params)
    lost = [cell for cell in cells if cell[0] == PUSHT or cell in LOST]
    assert built.missing == ["/".join(map(str, cell)) for cell in lost]
    assert f"{len(lost)} of {len(cells)} runs are missing" in built.page.text
    assert f"{HOPPER}/dsrl, seed 2: no data/artifacts/{HOPPER}/dsrl/2" in built.page.text
    assert f"{PUSHT}/modip, seeds 0, 1, 2: no " in built.page.text
    assert "No run yet: BC, MODIP, DSRL, MODIP (q terminal)" in built.page.text
    assert "DSRL seeds 0, 1 only" in {line[0].strip() for t in built.page.tables for line in t}
    assert f"1 run missing: {HOPPER}, 2" in row(table(built.page, "Policy"), "DSRL")[1]


def test_curves_are_against_steps_time_and_updates(built: Built) -> None:
    names = {
        str(path.relative_to(built.folder / comparison.PLOTS))
        for path in built.folder.rglob("*.png")
    }
    for axis in ("env_steps", "minutes", "updates"):
        assert f"rivals/{FETCH}_success_{axis}.png" in names
        assert f"rivals/{HOPPER}_return_{axis}.png" in names
    assert f"variants/{FETCH}_success_env_steps.png" in names
    assert built.html.count("<svg") == 2 * 3 + 2


def value(found: Row, dataset: str) -> float:
    """The normalised score, from the definition."""
    one = found["success"] if dataset == FETCH else found["score"]
    assert one is not None
    return one if dataset == FETCH else one / 100


def test_all_data_sets_are_pooled_on_their_common_seeds(built: Built) -> None:
    line = row(table(built.page, "Policy"), "MODIP planner")
    pooled = sorted(
        value(one, one["dataset"])
        for one in built.rows
        if (one["agent"], one["policy"]) == ("modip", "planner") and one["seed"] < 3
    )
    assert len(pooled) == 6
    assert numbers(line[1])[0] == pytest.approx(
        np.mean(pooled[1:-1]), abs=6e-4
    )  # a quarter of 6 is 1
    assert numbers(line[2])[0] == pytest.approx(np.mean(pooled), abs=6e-4)
    low, high = numbers(line[2])[1:]
    assert pooled[0] < low < np.mean(pooled) < high < pooled[-1]
    assert f"Not in it, for want of runs or of such a scale: {PUSHT}" in built.page.text


def test_the_probability_of_improvement_is_counted_in_pairs(built: Built) -> None:
    def runs(dataset: str, policy: str, agent: str) -> list[float]:
        return [
            value(one, dataset)
            for one in built.rows
            if (one["dataset"], one["agent"], one["policy"], one["stage"])
            == (dataset, agent, policy, "bc" if agent == "bc" else "final")
        ]

    wanted = []
    for dataset in (FETCH, HOPPER):
        ours, theirs = runs(dataset, "dp", "modip"), runs(dataset, "planner", "modip")
        won = sum((x > y) + 0.5 * (x == y) for x in ours for y in theirs)
        wanted.append(won / len(ours) / len(theirs))
    tables = [t for t in built.page.tables if "P(MODIP better) " in t[0]]
    line = row(tables[0], "MODIP planner")
    assert numbers(line[1])[0] == pytest.approx(np.mean(wanted), abs=6e-4)
    assert line[3].strip() == "2"
    pairs = table(built.page, "Row beats column")
    at = [cell.strip() for cell in pairs[0]].index("MODIP planner")
    assert numbers(row(pairs, "MODIP DP alone")[at])[0] == pytest.approx(np.mean(wanted), abs=6e-3)
    back = [cell.strip() for cell in pairs[0]].index("MODIP DP alone")
    assert numbers(row(pairs, "MODIP planner")[back])[0] == pytest.approx(
        1 - np.mean(wanted), abs=6e-3
    )
    assert row(pairs, "DSRL")[[c.strip() for c in pairs[0]].index("DSRL")].strip() == "·"


def test_every_pairs_mirror_image_adds_up() -> None:
    rng = np.random.default_rng(0)
    rows = [
        _row(dataset, agent, seed, float(rng.integers(0, 4)))
        for dataset, agents in ((FETCH, "abc"), (PUSHT, "ab"))
        for agent in agents
        for seed in range(3)
    ]
    both = {name: [one for one in rows if one["dataset"] == name] for name in (FETCH, PUSHT)}
    found = Compared(both, {FETCH: "success", PUSHT: "success"})
    pairs = chances(found)
    assert len(pairs) == 6
    for one, other in itertools.combinations(found.keys, 2):
        there, back = pairs[one, other], pairs[other, one]
        assert there is not None
        assert back is not None
        assert there.datasets == (1 if "c" in (one[0], other[0]) else 2)
        assert there.estimate.value + back.estimate.value == pytest.approx(1.0)
        assert (there.estimate.low, there.estimate.high) == pytest.approx((1 - back.estimate.high, 1 - back.estimate.low))  # fmt: skip


def _row(dataset: str, agent: str, seed: int, success: float | None, score: float | None = None) -> Row:  # fmt: skip
    return {
        "dataset": dataset, "env": "x", "agent": agent, "stage": "final", "policy": "dp", "seed": seed,
        "env_steps": 1, "episodes": 10, "success": success, "return": 1.0, "score": score, "seconds": None,
    }  # fmt: skip


def test_the_common_scale() -> None:
    a = ("a", "final", "dp")
    assert normalised([_row("x", "a", 0, 0.25, 90.0)]) == {(a, 0): 0.25}
    assert normalised([_row("x", "a", 0, None, 90.0)]) == {(a, 0): 0.9}
    assert normalised([_row("x", "a", 0, None)]) is None
    broken = normalised([_row("x", "a", 0, 0.5), _row("x", "a", 1, None)])
    assert broken is not None
    assert math.isnan(broken[a, 1])


def test_costs_are_means_over_the_runs(built: Built) -> None:
    found = [t for t in built.page.tables if "ms per update " in t[0]]
    header, fetch = [cell.strip() for cell in found[0][0]], found[0]
    line = dict(zip(header, row(fetch, "MODIP planner"), strict=True))
    assert numbers(line["Parameters"]) == [1002]
    assert numbers(line["ms per action batch 1"]) == [4.0]
    assert numbers(line["ms per action batch 25"]) == [0.5]
    assert numbers(line["Updates"]) == [2000]
    assert numbers(line["ms per update"]) == [51.0]  # (100 + 2) s / 2000
    assert line["Training"].strip() == "8.2 min"
    assert row(fetch, "BC")[4].strip() == "–"  # it was trained before


def test_ablations_stand_in_the_papers_order(built: Built) -> None:
    found = next(t for t in built.page.tables if t[0][0].strip() == "Variant")
    assert [line[0].split(" not in")[0].strip() for line in found[2:]] == [
        one.title for one in ABLATIONS
    ]
    full, q = found[2], found[4]
    assert (full[-2].strip(), full[-1].strip()) == ("13,775", "0.94")
    assert found[3][-2].strip() == "1,178.7 (sic)"
    successes = [
        one["success"]
        for one in built.rows
        if (one["dataset"], one["agent"], one["policy"]) == (FETCH, VARIANT, "dp")
    ]
    assert len(successes) == 4
    assert numbers(q[1])[0] == pytest.approx(
        np.mean([one for one in successes if one is not None]), abs=6e-4
    )
    assert "not in the comparison" in found[3][0]
    assert "not in the comparison" not in q[0]


def test_an_agents_page_has_its_source_and_its_values(built: Built) -> None:
    own = built.html[built.html.index('id="agent-dsrl"') :]
    own = own[: own.index("</details>")]
    assert "arXiv 2506.15799" in own
    assert "Deviations from the authors" in own
    text = Page(own)
    values = next(t for t in text.tables if any(line[0].strip() == "critic" for line in t))
    assert [cell.strip() for cell in values[0]] == ["Value", FETCH, HOPPER, PUSHT]
    discount = [built.params.cell(dataset).dsrl.discount for dataset in (FETCH, HOPPER, PUSHT)]
    assert [float(cell) for cell in row(values, "discount")[1:]] == discount
    variant = built.html[built.html.index(f'id="agent-{VARIANT}"') :]
    variant = variant[: variant.index("</details>")]
    assert 'href="#agent-modip"' in variant
    assert [line[0].strip() for line in Page(variant).tables[0]] == ["Value", "terminal_value"]


def test_the_text_says_what_the_figures_do_not_show(built: Built) -> None:
    for part in (
        "10,000 on fetch-pick-and-place", "30,000 on hopper", "surrogate", "80 million", "MODIP’s values were chosen",
        "75 % of cases", "84 % of cases", "CPU",
    ):  # fmt: skip
        assert part in built.page.text.replace("\xa0", " "), part


def test_rows_join_the_summary(built: Built) -> None:
    path = report.REPORT / "summary.json"
    other, old = _row("toy", "bc", 0, 0.5), _row(FETCH, "modip", 0, 0.1)
    write(path, [other, old])
    params = parameters(["modip"], {FETCH: [0, 1]})
    write_run(FETCH, "modip", 0)
    rows, missing = comparison.write(params, Path.cwd())
    assert missing == [f"{FETCH}/modip/1"]
    assert json.loads(path.read_text()) == [other, *rows]
    assert [one["policy"] for one in rows] == ["dp", "planner"]


@pytest.mark.parametrize("agents", [["bc"], ["modip"], ["dsrl"]])
def test_a_page_of_a_single_run_or_none(agents: list[str]) -> None:
    params = parameters(agents, {HOPPER: [3]})
    assert comparison.write(params, Path.cwd()) == ([], [f"{HOPPER}/{agents[0]}/3"])
    assert "1 of 1 runs are missing" in Page(comparison.PAGE.read_text()).text
    write_run(HOPPER, agents[0], 3)
    rows, missing = comparison.write(params, Path.cwd())
    found = Page(comparison.PAGE.read_text())
    assert not missing
    assert rows
    assert "Nothing here can tell a better method from a luckier seed" in found.text
    assert not [t for t in found.tables if "P(MODIP better) " in t[0] and agents != ["modip"]]


def test_what_took_more_steps_than_the_budget_is_compared_with_nobody() -> None:
    params = parameters(["bc", "modip", "dsrl"], {FETCH: [0, 1]})
    for agent, seed in itertools.product(["bc", "modip", "dsrl"], [0, 1]):
        found = write_run(FETCH, agent, seed)
        if agent == "dsrl":
            found["results"]["final"]["dp"]["env_steps"] = 60_000
            write(report.ARTIFACTS / FETCH / agent / str(seed) / "evaluation/metrics.json", found)
    comparison.write(params, Path.cwd())
    page = Page(comparison.PAGE.read_text())
    assert "DSRL" not in [cell.strip() for cell in table(page, "Row beats column")[0]]
    assert "more environment steps than the budget: DSRL." in page.text
    results = next(t for t in page.tables if "Env steps " in t[0])
    assert row(results, "DSRL")[5].strip() == "60,000"
    assert "DSRL took many more, and is in no comparison" in page.text


@pytest.mark.parametrize("success", [0.987, None])
def test_imagined_results_stand_beside_the_real_ones(success: float | None) -> None:
    params = parameters(["dsrl"], {FETCH: [0]})
    found = write_run(FETCH, "dsrl", 0)
    believed = {"imagined_success": success, "imagined_return": 32.1}
    found["results"]["final"]["dp"] |= believed
    write(report.ARTIFACTS / FETCH / "dsrl/0/evaluation/metrics.json", found)
    comparison.write(params, Path.cwd())
    tables = Page(comparison.PAGE.read_text()).tables
    line = next(t for t in tables if "Imagined " in t[0])[1]
    real = found["results"]["final"]["dp"]
    wanted = ["success", "0.987", f"{real['success']:.3f}"]
    if success is None:
        wanted = ["return", "32.10", f"{real['return']:.2f}"]
    assert [cell.strip() for cell in line] == ["DSRL", FETCH, "0", *wanted]


def test_a_variants_name_follows_its_agents() -> None:
    assert label(OURS) == "MODIP DP alone"
    assert label((VARIANT, "final", "planner")) == "MODIP (q terminal) planner"
    assert label(("dsrl-noise", "final", "dp")) == "DSRL (noise)"
    assert label(("bc-long", "control", "dp")) == "BC (long) control"


def test_a_docstring_as_paragraphs_and_lists() -> None:
    text = "One line.\n\nTwo\nlines:\n- first\n  goes on\n- second - with a dash\n\nLast."
    assert blocks(text) == [
        ("p", ["One line."]), ("p", ["Two lines:"]), ("ul", ["first goes on", "second - with a dash"]), ("p", ["Last."]),
    ]  # fmt: skip


def test_only_what_the_cells_need_is_run() -> None:
    def one(name: str, needs: set[str], **options: str) -> Stage:
        return Stage(name, options, frozenset(needs))

    found = {
        stage.name: stage
        for stage in (
            one("convert@a", set(), dataset="a"),
            one("convert@b", set(), dataset="b"),
            one("finetune@a-x-0", {"convert@a"}, dataset="a", agent="x", seed="0"),
            one("finetune@a-x-1", {"convert@a"}, dataset="a", agent="x", seed="1"),
            one("evaluate@a-x-0", {"finetune@a-x-0"}, dataset="a", agent="x", seed="0"),
            one("evaluate@a-x-1", {"finetune@a-x-1"}, dataset="a", agent="x", seed="1"),
            one("report", {"evaluate@a-x-0", "evaluate@a-x-1"}),
        )
    }
    assert list(compare.needed(found, [("a", "x", 1)])) == [
        "convert@a",
        "finetune@a-x-1",
        "evaluate@a-x-1",
    ]


def graph(shape: dict[str, set[str]]) -> dict[str, Stage]:
    """Stages `kind@dataset-agent-seed`, and what they need."""
    found = {}
    for name, needs in shape.items():
        dataset, agent, seed = name.partition("@")[2].split("-")
        options = {"dataset": dataset, "agent": agent, "seed": seed}
        found[name] = Stage(name, options, frozenset(needs))
    return found


def test_stages_run_side_by_side_and_a_failed_one_takes_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [("t", agent, seed) for agent in ("a", "b") for seed in (0, 1)]
    names = ["-".join(map(str, cell)) for cell in cells]
    shape: dict[str, set[str]] = {f"finetune@{name}": set() for name in names}
    shape |= {f"evaluate@{name}": {f"finetune@{name}"} for name in names}
    together, at_work = threading.Barrier(2, timeout=60), []
    lock, most = threading.Lock(), 0

    def repro(one: Stage, home: Path, *_: object) -> None:
        nonlocal most
        with lock:
            at_work.append(one.name)
            most = max(most, len(at_work))
        if one.name in ("finetune@t-a-1", "finetune@t-b-0"):
            together.wait()  # it ends only if both are at work at once
        with lock:
            at_work.remove(one.name)
        if one.name == "finetune@t-b-0":
            raise StageError("diverged")

    monkeypatch.setattr(compare.workspace, "stages", lambda home: graph(shape))
    monkeypatch.setattr(compare.travel, "restore", lambda *_: ["finetune@t-a-0"])
    monkeypatch.setattr(compare.workspace, "repro", repro)
    found = compare.make(tmp_path, cells, 2)
    assert found.failed == {"finetune@t-b-0": "diverged"}
    assert found.skipped == {"evaluate@t-b-0": "finetune@t-b-0"}
    assert found.done == set(shape) - {"finetune@t-b-0", "evaluate@t-b-0"}
    assert most == 2


def test_what_is_trained_is_judged_before_more_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, set[str]] = {f"finetune@t-a-{seed}": set() for seed in (0, 1)}
    shape |= {f"evaluate@t-a-{seed}": {f"finetune@t-a-{seed}"} for seed in (0, 1)}
    order: list[str] = []
    monkeypatch.setattr(compare.workspace, "stages", lambda home: graph(shape))
    monkeypatch.setattr(compare.travel, "restore", lambda *_: [])
    monkeypatch.setattr(compare.workspace, "repro", lambda one, *_: order.append(one.name))
    compare.make(tmp_path, [("t", "a", 0), ("t", "a", 1)], 1)
    assert order == ["finetune@t-a-0", "evaluate@t-a-0", "finetune@t-a-1", "evaluate@t-a-1"]


@pytest.mark.e2e
def test_the_copy_follows_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = Clone(tmp_path / "clone")
    monkeypatch.chdir(clone.folder)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", clone.env["DVC_SITE_CACHE_DIR"])
    home, new = compare.HOME, Path("modip/new.py")
    new.write_text("x = 1")
    Path("dvc.lock").write_text("of the tree")
    copied.bring(Path("params.yaml"), home, {"dataset": ["other"], "seed": [7, 8]})
    assert (home / new).read_text() == "x = 1"
    inside = load(home / "params.yaml")
    assert (inside.dataset, inside.agent, inside.seed) == (("other",), ("bc", "modip"), (7, 8))
    assert (home / "dvc.lock").read_text() == "of the tree"
    (home / "dvc.lock").write_text("of the copy")
    (home / "made.txt").write_text("a result")
    new.unlink()
    Path("modip/errors.py").write_text("# changed")
    copied.bring(Path("params.yaml"), home, {"dataset": ["toy"]})
    assert not (home / new).exists()
    assert (home / "modip/errors.py").read_text() == "# changed"
    assert load(home / "params.yaml").dataset == ("toy",)
    assert (home / "dvc.lock").read_text() == "of the copy"
    assert (home / "made.txt").exists()


class Comparison(Clone):
    """A clone whose comparison is small: two agents with a seed each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.params = small_tree({"diffusion.updates": 400})
        self.params["runtime"]["checkpoint_seconds"] = 0.1
        self.params["agent"] = ["bc"]
        self.params["compare"] = {"toy": {"bc": [0], "dsrl": [0]}}
        self.save()

    def begin(self, log: Path, *options: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.compare", *options],
                cwd=self.folder, env=self.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def ended(text: str) -> set[str]:
    return set(re.findall(r" (\S+) is done; \d+ of 9", text))


@pytest.mark.e2e
def test_a_comparison_that_is_killed_goes_on(tmp_path: Path) -> None:
    """What was done stays done, what was running is finished, and the user's own files are as they were."""
    clone, logs = Comparison(tmp_path / "clone"), [tmp_path / f"log{i}" for i in range(2)]
    before = (clone.folder / "params.yaml").read_text()
    running = clone.begin(logs[0], "--jobs", "2")
    try:
        while len(ended(logs[0].read_text())) < 4:
            assert running.poll() is None, logs[0].read_text()
            time.sleep(0.1)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(timeout=30)
    assert _left_behind(clone.folder / compare.HOME) == []
    assert clone.begin(logs[1], "--jobs", "2").wait(timeout=300) == 0, logs[1].read_text()
    first, second = (logs[i].read_text() for i in range(2))
    kept = int(re.findall(r"(\d+) of 9 stages are up to date", second)[0])
    assert kept >= 4
    assert len(ended(second)) == 9 - kept
    assert not ended(first) & ended(second)
    rows = json.loads((clone.folder / "report/summary.json").read_text())
    assert {(one["agent"], one["stage"], one["seed"]) for one in rows} == {
        ("bc", "bc", 0), ("bc", "control", 0), ("dsrl", "final", 0),
    }  # fmt: skip
    html = (clone.folder / comparison.PAGE).read_text()
    assert "2 of 2 runs" in html
    assert (clone.folder / "params.yaml").read_text() == before
    assert not (clone.folder / "dvc.lock").exists()
    assert not (clone.folder / "data/artifacts").exists()


def test_two_comparisons_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(["bc"], {FETCH: [0]})
    held = slots.try_lock(compare.HOME / "lock")
    assert held is not None
    monkeypatch.setattr(sys, "argv", ["compare"])
    with pytest.raises(UserError, match="another comparison is at work"):
        compare.body(compare.parser().parse_args(), params)
    held.release()
    monkeypatch.setattr(sys, "argv", ["compare", "--jobs", "0"])
    with pytest.raises(UserError, match=r"--jobs \(value 0\): at least one"):
        compare.body(compare.parser().parse_args(), params)
