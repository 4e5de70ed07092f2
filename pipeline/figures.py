"""The report's figures: each is an inline SVG in the page and a PNG in report/plots."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.statistics import Calibration

INK = "#010203"
"""Stands for the page's own text colour, which a dark page makes light."""

PALETTE = (
    "#8b93a1", "#c9871f", "#3b82d6", "#17a07a", "#a06bd6", "#d65a5a", "#7a8f2b", "#2aa3b8", "#8a5a3c", "#d667a8",
    "#5b5fc7", "#b8a12a", "#4f9d4a", "#7fb0c9", "#b0768f", "#b5532d",
)  # fmt: skip
"""Colours that can be told apart, on white and on black, with any colour vision."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True)
class Curve:
    """A policy's value along the online phase: for each seed its (x, y), in order of x; and its final one."""

    label: str
    colour: str
    seeds: Sequence[Sequence[tuple[float, float]]]
    final: tuple[float, float]


@dataclass(frozen=True)
class Reference:
    """A policy that does not learn online: a level, reached at `x` (None: at no particular x)."""

    label: str
    colour: str
    y: float
    x: float | None


@dataclass
class Plot:
    """One drawn figure."""

    alt: str
    svg: str


@contextmanager
def _drawing(path: Path, xlabel: str, ylabel: str, width: float) -> Iterator[tuple[Axes, Plot]]:
    """Axes to draw on, `width` inches wide; afterwards the PNG is at `path` and the SVG in the plot."""
    alt = f"{ylabel} against {xlabel}"
    plot = Plot(alt, "")
    path.parent.mkdir(
        parents=True, exist_ok=True
    )  # an id like d4rl/hopper-medium-v2 names a folder
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": str(path)}):
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        yield axes, plot
        figure.savefig(path, dpi=150)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing, dpi=150)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    plot.svg = svg.replace("<svg", '<svg role="img" aria-label="' + alt.replace('"', "'") + '"', 1)


def learning(
    path: Path,
    xlabel: str,
    ylabel: str,
    curves: Sequence[Curve],
    references: Sequence[Reference],
    unit_interval: bool,
    legend: bool,
) -> Plot:
    """Curves with the mean over seeds and, with several, the range from the worst to the best seed.

    Without a `legend`, which the page has then, it is drawn smaller, for three in a row.
    """
    with _drawing(path, xlabel, ylabel, 4.8 if legend else 3.8) as (axes, plot):
        for level in references:
            axes.axhline(level.y, color=level.colour, linestyle=(0, (4, 2)), linewidth=1.4)
            marker = "D" if level.x is not None else ""
            axes.plot(
                [level.x or 0.0], [level.y], color=level.colour, linestyle=(0, (4, 2)),
                marker=marker, markersize=6, label=level.label, clip_on=False,
            )  # fmt: skip
        for curve in curves:
            _draw(axes, curve)
        axes.set_xlim(left=0.0)
        # More numbers would run into each other from 10,000 on.
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,g}")
        if unit_interval:
            axes.set_ylim(-0.02, 1.02)
        if legend and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.03), ncols=4)
    return plot


def _draw(axes: Axes, curve: Curve) -> None:
    # The k-th evaluations of the seeds belong together: they have the same env_steps.
    points: Mapping[int, list[tuple[float, float]]] = defaultdict(list)
    for seed in curve.seeds:
        for k, point in enumerate(seed):
            points[k].append(point)
    x = [float(np.mean([point[0] for point in group])) for group in points.values()]
    y = [[point[1] for point in group] for group in points.values()]
    if len(curve.seeds) > 1:
        low, high = [min(group) for group in y], [max(group) for group in y]
        axes.fill_between(x, low, high, color=curve.colour, alpha=0.14, linewidth=0)
    axes.plot(
        x, [float(np.mean(group)) for group in y], color=curve.colour, linewidth=2.0,
        marker="o", markersize=4, label=curve.label, clip_on=False,
    )  # fmt: skip
    axes.plot(*curve.final, color=curve.colour, marker="D", markersize=7, clip_on=False)


def predictions(
    path: Path,
    xlabel: str,
    ylabel: str,
    predicted: Sequence[float],
    real: Sequence[float],
    bins: Calibration,
) -> Plot:
    """Each pair as a dot, the binned means with their standard errors, and where both would be equal."""
    with _drawing(path, xlabel, ylabel, 4.0) as (axes, plot):
        axes.scatter(
            predicted, real, s=9, color=PALETTE[2], alpha=0.28, linewidth=0, rasterized=True,
            label="states",
        )  # fmt: skip
        finite = [v for v in (*predicted, *real) if math.isfinite(v)]
        ends = (min(finite), max(finite)) if finite else (0.0, 1.0)
        axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="perfect")
        axes.errorbar(
            bins.predicted, bins.real, yerr=bins.error, color=PALETTE[1], linewidth=2.0,
            marker="o", markersize=4, label="binned mean",
        )  # fmt: skip
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.03), ncols=3)
    return plot


def error_by_step(path: Path, seeds: Mapping[int, Sequence[float]]) -> Plot:
    """Error of the predicted observation after 1, 2, ... steps, a line per seed."""
    xlabel, ylabel = "steps predicted ahead", "RMS error (normalised observation)"
    with _drawing(path, xlabel, ylabel, 4.0) as (axes, plot):
        for colour, (seed, errors) in zip(PALETTE[2:] * len(seeds), seeds.items(), strict=False):
            steps = range(1, len(errors) + 1)
            axes.plot(steps, errors, color=colour, marker="o", markersize=4, label=f"seed {seed}")
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.03), ncols=3)
    return plot
