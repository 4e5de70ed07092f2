"""The agents, written out."""

from __future__ import annotations

from typing import NamedTuple

from modip.config import DATASET, Cell, Params, Variant, unknown, value_of
from modip.errors import UserError


class Entry(NamedTuple):
    """What the pipeline must know of an agent."""

    reads: tuple[str, ...]
    """Sections of the parameters that its training reads: a change elsewhere does not make it stale."""
    judged: dict[str, str]
    """What is evaluated: its name in the results, and the folder of its checkpoint in final/."""


AGENTS = {
    "bc": Entry(("diffusion", "critics", "modip"), {"dp": "policy"}),
    "modip": Entry(
        ("chunk", "diffusion", "world_model", "critics", "mppi", "modip", "evaluation"),
        {"dp": "policy", "planner": "model"},
    ),
    "dql": Entry(
        ("chunk", "critics", "modip", "dql", "evaluation"), {"dp": "policy", "ranked": "ranked"}
    ),
    "parl": Entry(
        ("diffusion", "critics", "modip", "parl", "evaluation"),
        {"dp": "policy", "ranked": "ranked"},
    ),
    "diwa": Entry(("world_model", "critics", "diwa", "evaluation"), {"dp": "policy"}),
    "dsrl": Entry(("chunk", "critics", "modip", "dsrl", "evaluation"), {"dp": "policy"}),
    "dppo": Entry(("critics", "modip", "dppo", "evaluation"), {"dp": "policy"}),
    "tdmpc2": Entry(
        ("critics", "modip", "tdmpc2", "evaluation"), {"planner": "planner", "prior": "policy"}
    ),
}


CLONED = ("chunk", "diffusion")
"""Sections that make the cloned policy, which every agent of a data set and seed starts from."""


def names(params: Params) -> tuple[str, ...]:
    """Every agent, and every variant of one that the parameters name."""
    return (*AGENTS, *params.variants)


def judged(agent: str, cell: Cell) -> dict[str, str]:
    """What is evaluated of an agent by these values: its names and folders. Without planning there is no planner."""
    found = AGENTS[agent].judged
    return found if agent != "modip" or cell.modip.planning else {"dp": found["dp"]}


def check(params: Params, where: str) -> Params:
    """The same. Raises UserError for an agent that is not there and a variant that cannot be; `where` names the file."""
    compared = {f"compare.{name}": tuple(one) for name, one in params.compare.items()}
    for field, chosen in {"agent": params.agent, **compared}.items():
        for agent in chosen:
            if agent not in names(params):
                raise UserError(unknown(f"{where}: {field}", agent, names(params)))
    for name, variant in params.variants.items():
        _check_variant(name, variant, params, f"{where}: variants.{name}")
    return params


def _check_variant(name: str, variant: Variant, params: Params, where: str) -> None:
    if variant.agent not in AGENTS:
        raise UserError(unknown(f"{where}.agent", variant.agent, tuple(AGENTS)))
    first, _, rest = name.partition(f"{variant.agent}-")
    if first or not rest or "/" in rest or not DATASET.fullmatch(name):
        raise UserError(
            f"{where}: the name must be {variant.agent}-, then letters, digits, - and _; rename it"
        )
    reads = AGENTS[variant.agent].reads
    for path in variant.values:
        section = path.split(".")[0]
        value_of(next(iter(params.cells.values())), path, f"variants.{name}.values")
        if section not in reads:
            raise UserError(
                f"{where}.values {path!r}: {variant.agent} does not read {section}; remove it, or choose a value of "
                f"{', '.join(reads)}"
            )
        if section in CLONED:
            raise UserError(
                f"{where}.values {path!r}: all agents start from one cloned policy, which {section} made; remove it, "
                f"or change {section} itself"
            )
