"""What the comparison's page says: tables, curves and statistics of the cells that `compare` in params.yaml names.

Writes report/compare.html, one file that needs nothing else, report/compare/*.png, and the rows into report/summary.json.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from modip.agents import AGENTS
from modip.config import SECTIONS, Params
from modip.files import write_atomically, write_json
from pipeline import report
from pipeline.convert import about
from pipeline.figures import PALETTE, Plot
from pipeline.report import AXES, REPORT, Cell, Key, Method, Row, Run, Summary, average, key, label
from pipeline.statistics import COVERAGE, Estimate, estimate, improvement, iqm, mean

PAGE, PLOTS = REPORT / "compare.html", REPORT / "compare"
OURS: Key = ("modip", "final", "dp")
LARGER = 1.5
"""Times the budget of environment steps, from which on a method is shown but compared with nobody."""


@dataclass(frozen=True)
class Ablation:
    """One line of the paper's table of ablations (its Table 2), by the name that the variant has here."""

    agent: str
    title: str
    halfcheetah: float | None  # return
    kitchen: float | None  # success on Kitchen-Complete


ABLATIONS = (
    Ablation("modip", "full", 13775.0, 0.94),
    Ablation("modip-no-planning", "policy only, no planning", 1178.7, 0.77),
    Ablation("modip-q-terminal", "Q(s, π(s)) at the plan’s end instead of V(s)", 7113.0, 0.55),
    Ablation("modip-moments-prior", "Gaussian prior instead of the DP’s chunks", 12413.0, 0.45),
    Ablation("modip-no-pretraining", "no offline pre-training", 11736.0, 0.74),
    Ablation("modip-gaussian-prior", "no prior, a wider search", None, None),
    Ablation("modip-policy-targets", "policy actions in the TD targets", None, None),
)


def cells(params: Params) -> list[Cell]:
    """Each data set's agents with their seeds."""
    return [
        (name, agent, seed)
        for name, one in params.compare.items()
        for agent, seeds in one.items()
        for seed in seeds
    ]


def agents_of(params: Params) -> list[str]:
    """Every agent that is compared anywhere, in order."""
    return list(dict.fromkeys(agent for one in params.compare.values() for agent in one))


def common(chosen: Iterable[Sequence[int]]) -> list[int]:
    """The seeds that all have, in order."""
    found = [set(seeds) for seeds in chosen]
    return sorted(set.intersection(*found)) if found else []


def is_ablation(params: Params, agent: str) -> bool:
    """A variant of MODIP: shown beside it, not among the rivals."""
    return agent in params.variants and params.base(agent) == "modip"


# What is computed from the rows.


@dataclass(frozen=True)
class Compared:
    """All data sets' rows of the rivals, in the order of the parameters; what each data set is judged by."""

    rows: dict[str, list[Row]]
    primary: dict[str, str]

    @property
    def keys(self) -> list[Key]:
        """The methods that have any result."""
        return list(dict.fromkeys(key(row) for rows in self.rows.values() for row in rows))

    def values(self, dataset: str, one: Key) -> list[float]:
        """A method's runs on one data set by its measure; what was not finite is NaN."""
        measure = self.primary[dataset]
        found = (row[measure] for row in self.rows[dataset] if key(row) == one)  # type: ignore[literal-required]
        return [math.nan if value is None else float(value) for value in found]


@dataclass(frozen=True)
class Improvement:
    """P(a run of one method beats a run of another), over the data sets where both have runs."""

    estimate: Estimate
    datasets: int


def chance(found: Compared, ours: Key, theirs: Key) -> Improvement | None:
    """None where no data set has runs of both."""
    pairs = [
        (x, y)
        for dataset in found.rows
        if (x := found.values(dataset, ours)) and (y := found.values(dataset, theirs))
    ]
    if not pairs:
        return None
    return Improvement(improvement([x for x, _ in pairs], [y for _, y in pairs]), len(pairs))


def chances(found: Compared) -> dict[tuple[Key, Key], Improvement | None]:
    """Every pair of two methods."""
    pairs: dict[tuple[Key, Key], Improvement | None] = {}
    for one, other in combinations(found.keys, 2):
        there = chance(found, one, other)
        pairs[one, other], pairs[other, one] = there, None
        if there is not None:
            value, low, high = there.estimate
            pairs[other, one] = Improvement(Estimate(1 - value, 1 - high, 1 - low), there.datasets)
    return pairs


def normalised(rows: Sequence[Row]) -> dict[tuple[Key, int], float] | None:
    """One data set's rows on a common scale: success where it has one, else a hundredth of the D4RL score; or None."""
    for measure, size in (("success", 1.0), ("score", 100.0)):
        if any(row[measure] is not None for row in rows):  # type: ignore[literal-required]
            return {
                (key(row), row["seed"]): math.nan if value is None else value / size
                for row in rows
                for value in [row[measure]]  # type: ignore[literal-required]
            }
    return None


@dataclass(frozen=True)
class Overall:
    """A method over all data sets that have a common scale; no summary where it lacks a run."""

    label: str
    colour: str
    summary: Summary | None
    lacks: list[str]  # "data set, seed"

    @property
    def top(self) -> float:
        """The largest finite number to draw."""
        found = [] if self.summary is None or self.summary.iqm is None else [*self.summary.iqm]
        return max((value for value in found if math.isfinite(value)), default=0.0)


def overall(
    found: Compared, seeds: Sequence[int], colours: dict[Key, str]
) -> tuple[list[str], list[Overall]]:
    """The data sets on the common scale and every method over them, runs x data sets on `seeds` as in rliable."""
    scaled = {name: each for name, rows in found.rows.items() if (each := normalised(rows))}
    if len(scaled) < 2 or not seeds:
        return list(scaled), []
    result = []
    for one in found.keys:
        lacks = [
            f"{name}, {seed}"
            for name in scaled
            for seed in seeds
            if (one, seed) not in scaled[name]
        ]
        summary = None
        if not lacks:
            strata = [[scores[one, seed] for seed in seeds] for scores in scaled.values()]
            summary = Summary(estimate(mean, *strata), estimate(iqm, *strata))
        result.append(Overall(label(one), colours[one], summary, lacks))
    return list(scaled), result


@dataclass(frozen=True)
class Cost:
    """What a method takes on one data set, each a mean over its runs; None where it was not measured."""

    method: Method
    parameters: float | None
    single: float | None  # ms per action at batch 1
    batch: float | None  # and at that of the evaluation
    updates: float | None
    update: float | None  # ms


def costs(runs: Sequence[Run], found: Sequence[Method]) -> tuple[str, list[Cost]]:
    """The evaluation's batch, and every method's cost."""
    size, result = "", []
    for method in found:
        agent, name, policy = method.key
        own = [
            run
            for run in runs
            if run.agent == agent and policy in run.metrics["results"].get(name, {})
        ]
        acting = [run.cost[name][policy] for run in own if run.cost is not None]
        times = [one["ms_per_action"] for one in acting]
        size = next((batch for one in times for batch in one if batch != "1"), size)
        training = [run.timing for run in own] if name != "bc" else []
        known = [one for one in training if one.get("updates")]
        result.append(
            Cost(
                method,
                average(one["parameters"] for one in acting),
                average(one["1"] for one in times),
                average(one.get(size, one["1"]) for one in times),
                average(one["updates"] for one in known),
                average(1000 * one["update_seconds"] / one["updates"] for one in known),
            )
        )
    return size, result


def imagined(runs: Sequence[Run], primary: dict[str, str]) -> list[dict[str, Any]]:
    """What agents believed of their policy beside what it was, where they say so; the return where success is unknown."""
    return [
        {
            "label": label((run.agent, name, policy)),
            "dataset": run.dataset,
            "seed": run.seed,
            "measure": measure,
            "imagined": result[f"imagined_{measure}"],
            "real": result[measure],
        }
        for run in runs
        for name, policies in run.metrics["results"].items()
        for policy, result in policies.items()
        if "imagined_return" in result
        for known in [result[f"imagined_{primary[run.dataset]}"] is not None]
        for measure in [primary[run.dataset] if known else "return"]
    ]


# The agents.


def coded(text: str) -> Markup:
    """A docstring's words for the page: what stands between backticks is code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """A docstring as paragraphs, ("p", [text]), and lists, ("ul", items)."""
    found: list[tuple[str, list[str]]] = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lead, *items = re.split(r"(?:^|\n)- ", part)
        if lead.strip():
            found.append(("p", [" ".join(lead.split())]))
        if items:
            found.append(("ul", [" ".join(item.split()) for item in items]))
    return found


def agent_view(params: Params, agent: str) -> dict[str, Any]:
    """An agent's page: its source, and what it reads of the parameters; of a variant what is different."""
    kind = params.base(agent)
    datasets = [name for name, one in params.compare.items() if agent in one]
    changed = params.variants[agent].values if agent in params.variants else None
    flat = {
        dataset: {
            where: value
            for section in SECTIONS
            for where, value in _flat(
                params.cell(dataset, agent).model_dump(mode="json")[section], section
            )
        }
        for dataset in datasets
    }
    reads = (kind, *(name for name in AGENTS[kind].reads if name not in (kind, "evaluation")))
    sections = {}
    for section in reads:
        rows = [
            (where, [flat[dataset][where] for dataset in datasets])
            for where in flat[datasets[0]]
            if where.startswith(f"{section}.") and (changed is None or where in changed)
        ]
        if rows:
            sections[section] = rows
    text = inspect.getdoc(importlib.import_module(f"modip.agents.{kind}")) or ""
    return {
        "id": agent,
        "kind": kind,
        "title": title(params, agent),
        "base": title(params, kind) if changed is not None else None,
        "blocks": blocks(text) if changed is None else [],
        "datasets": datasets,
        "sections": sections,
    }


def _flat(tree: dict[str, Any], at: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        where = f"{at}.{name}"
        found += _flat(value, where) if isinstance(value, dict) else [(where, value)]
    return found


def title(params: Params, agent: str) -> str:
    """What an agent is called: the shortest name of what is judged of it."""
    names = [label((agent, "final", policy)) for policy in AGENTS[params.base(agent)].judged]
    return min((name.removesuffix(" DP alone") for name in names), key=len)


# The page.


def dataset_view(
    dataset: str, params: Params, runs: Sequence[Run], colours: dict[Key, str], plots: Path
) -> dict[str, Any]:
    """What the page says of one data set: the rivals, and MODIP's variants beside it."""
    rivals = [run for run in runs if not is_ablation(params, run.agent)]
    related = {
        agent: seeds
        for agent, seeds in params.compare[dataset].items()
        if agent == "modip" or is_ablation(params, agent)
    }
    seeds = common(related.values())
    family = [run for run in runs if run.agent in related and run.seed in seeds]
    view = report.results_view(dataset, params, rivals, colours)
    variants = report.results_view(dataset, params, family, {**colours, **_variant_colours(params)})
    measure = view["primary"]
    alone = [method for method in variants["methods"] if method.key[2] == "dp"]
    batch, cost = costs(rivals, view["methods"])
    budget = params.cell(dataset).modip.env_steps
    usual = [method for method in view["methods"] if method.env_steps <= LARGER * budget]
    larger = [method for method in view["methods"] if method not in usual]
    kinds = {"bc", *(params.base(method.key[0]) for method in larger)}
    beside = [method for method in usual if method.key[0] in kinds]
    file = about(dataset)
    have = {run.agent for run in runs}
    return {
        **view,
        "facts": json.loads(file.read_text()) if file.is_file() else None,
        "budget": budget,
        "wanted": sorted(set().union(*params.compare[dataset].values())),
        "absent": [title(params, agent) for agent in params.compare[dataset] if agent not in have],
        "curves": _curves(dataset, rivals, usual, measure, list(AXES), plots / "rivals"),
        "legend": _legend(usual),
        "larger": [method.label for method in larger],
        "larger_curves": (
            _curves(dataset, rivals, [*beside, *larger], measure, list(AXES), plots / "larger")
            if larger
            else []
        ),
        "larger_legend": _legend([*beside, *larger]),
        "variants": {method.key: method for method in variants["methods"]},
        "variant_seeds": seeds if len(related) > 1 else [],
        "variant_curves": (
            _curves(dataset, family, alone, measure, ["env_steps"], plots / "variants")
            if len(alone) > 1
            else []
        ),
        "batch": batch,
        "costs": cost,
    }


def _legend(found: Sequence[Method]) -> list[tuple[Key, str, str]]:
    return [(method.key, method.label, method.colour) for method in found]


def _variant_colours(params: Params) -> dict[Key, str]:
    """MODIP and its variants, alike on every data set."""
    family = [agent for agent in agents_of(params) if is_ablation(params, agent)]
    return {
        (agent, "final", policy): PALETTE[(2 + i) % len(PALETTE)]
        for i, agent in enumerate(["modip", *family])
        for policy in AGENTS["modip"].judged
    }


def _curves(
    dataset: str,
    runs: Sequence[Run],
    found: Sequence[Method],
    measure: str,
    axes: list[str],
    folder: Path,
) -> list[Plot]:
    if not any(run.curve for run in runs):
        return []
    return [
        report.curves(folder, dataset, runs, found, measure, axis, legend=False) for axis in axes
    ]


def grouped(missing: dict[Cell, str]) -> list[tuple[str, str, list[int], str]]:
    """(data set, agent, seeds, the first one's reason) of cells without results."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for (dataset, agent, seed), why in missing.items():
        found.setdefault((dataset, agent), []).append((seed, why))
    return [(*pair, [seed for seed, _ in each], each[0][1]) for pair, each in found.items()]


def write(params: Params, place: Path) -> tuple[list[Row], list[str]]:
    """Write the page of the results in the tree `place`. Returns its rows, and the cells without results."""
    wanted = cells(params)
    shutil.rmtree(PLOTS, ignore_errors=True)
    PLOTS.mkdir(parents=True)
    target = PLOTS.resolve()
    with chdir(place):
        runs, missing = report.read(params, wanted)
        rows = [row for run in runs for row in run.rows()]
        rival = [row for row in rows if not is_ablation(params, row["agent"])]
        colours = {
            one: PALETTE[i % len(PALETTE)] for i, one in enumerate(dict.fromkeys(map(key, rival)))
        }
        datasets = list(params.compare)
        views = [
            dataset_view(
                name, params, [run for run in runs if run.dataset == name], colours, target
            )
            for name in datasets
        ]
    primary = {view["id"]: view["primary"] for view in views}
    most = {name: LARGER * params.cell(name).modip.env_steps for name in datasets}
    equal = [row for row in rival if row["env_steps"] <= most[row["dataset"]]]
    found = Compared(
        {name: [row for row in equal if row["dataset"] == name] for name in datasets}, primary
    )
    seeds = common(
        chosen
        for one in params.compare.values()
        for agent, chosen in one.items()
        if not is_ablation(params, agent)
    )
    scaled, methods = overall(found, seeds, colours)
    pairs = chances(found)
    html = report.page("compare_template.html.j2").render(
        datasets=views,
        agents=[agent_view(params, agent) for agent in agents_of(params)],
        missing=grouped(missing),
        cells=len(wanted),
        lost=len(missing),
        seeds=seeds,
        scaled=scaled,
        overall=methods,
        top=max([1.0, *(one.top for one in methods)]),
        coded=coded,
        keys=found.keys,
        names={one: label(one) for one in found.keys},
        colours=colours,
        pairs=pairs,
        larger=sorted({label(key(row)) for row in rival if row not in equal}),
        ours=OURS,
        variants=[
            (one, title(params, one[0]), colour)
            for one, colour in _variant_colours(params).items()
            if one[2] == "dp" and one[0] in {run.agent for run in runs}
        ],
        ablations=ABLATIONS if "modip" in agents_of(params) else (),
        chosen=agents_of(params),
        imagined=imagined(runs, primary),
        machine=report.machine(),
        coverage=COVERAGE,
    )
    write_atomically(PAGE, lambda path: path.write_text(html))
    _add(rows, {(run.dataset, run.agent, run.seed) for run in runs})
    return rows, ["/".join(map(str, cell)) for cell in missing]


def _add(rows: list[Row], made: set[Cell]) -> None:
    """Put the rows of the cells `made` into report/summary.json, in the place of any of the same cells."""
    path = REPORT / "summary.json"
    before: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    kept = [row for row in before if (row["dataset"], row["agent"], row["seed"]) not in made]
    write_json(path, [*kept, *rows])
