"""Small cells of the toy data set, and the parts and jobs built from them, for tests of behaviour.

The tree is the project's own params.yaml, so it always has every field, with small values put over the numbers that
matter to a test: no test depends on a tuned value.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from ruamel.yaml import YAML
from torch import Tensor

from modip.agents.bc import BC
from modip.agents.diwa import DiWA
from modip.agents.dppo import DPPO
from modip.agents.dql import DQL
from modip.agents.dsrl import DSRL
from modip.agents.modip import Modip
from modip.agents.parl import PARL
from modip.agents.tdmpc2 import TDMPC2
from modip.config import SECTIONS, Cell, build
from modip.critics import Critics
from modip.data import toy
from modip.data.episodes import Episodes
from modip.diffusion import DiffusionPolicy
from modip.envs import BatchedEnv
from modip.loops import Fit, Interaction, Rival
from modip.parts import new_critics, new_model, new_policy
from modip.replay import Replay
from modip.types import Agent, Spec, State
from modip.world_model import WorldModel

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SPEC = Spec("toy", "modip/Toy-v0", 4, 2)

SMALL: dict[str, dict[str, Any]] = {
    "chunk": {"horizon": 4, "act_steps": 2},
    "diffusion": {
        "prediction": "sample", "denoising_steps": 6, "sampling_steps": 3, "eta": 1.0, "width": 16, "blocks": 1,
        "updates": 4, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-4, "grad_clip": 1.0, "ema_decay": 0.9,
        "hidden": [],
    },
    "world_model": {
        "encoder": "identity", "latent_dim": 16, "ensemble": 2, "width": 16, "layers": 1, "loss_horizon": 2,
        "updates": 4, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-4, "grad_clip": 10.0, "ema_decay": 0.9,
    },
    "critics": {
        "ensemble": 2, "width": 16, "layers": 1, "td_target": "state_value", "n_step": 3, "expectile": 0.7,
        "discount": 0.9, "reward_offset": 0.0, "demos_end_well": False, "updates": 4, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-4,
        "grad_clip": 10.0, "ema_decay": 0.9,
    },
    "mppi": {
        "horizon": 3, "prior_samples": 4, "perturbed_samples": 4, "perturbation": 0.2, "samples": 8, "iterations": 1,
        "elites": 4, "temperature": 0.5, "weighting": "standardised", "min_std": 0.05, "max_std": 0.5, "penalty": 1.0, "selection": "mean",
        "terminal_value": "state_value", "prior": "diffusion",
    },
    "modip": {
        "planning": True, "offline_pretraining": True, "env_steps": 60, "final_env_steps": 12, "num_envs": 2,
        "model_updates": 0.25, "critic_updates": 0.25, "policy_updates": 0.5, "final_updates": 5,
        "plan_steps": 12,
    },
    "dsrl": {
        "critic": "aliased", "actor": {"width": 16, "layers": 1, "bound": 1.5}, "ensemble": 2, "width": 16, "layers": 1,
        "initial_share": 0.2,
        "updates": 0.5, "distillations": 2, "offline_share": 0.5, "discount": 0.9,
        "target_entropy": 0.0, "initial_temperature": 0.1, "batch_size": 16, "lr": 1e-3, "grad_clip": 10.0,
        "ema_decay": 0.9,
    },
    "dql": {
        "ranking": {
            "ensemble": 2, "width": 16, "layers": 1, "value": "min", "candidates": 4, "keep": 4, "ascent_steps": 0,
            "ascent_size": 0.0, "temperature": 1.0,
        },
        "sampling_steps": 2, "eta": 1.0, "backup_samples": 1, "offline_updates": 6, "warmup_updates": 2, "updates": 0.5,
        "offline_share": 0.5, "discount": 0.9, "batch_size": 16, "policy_lr": 1e-3, "critic_lr": 1e-3,
        "grad_clip": 10.0, "ema_decay": 0.9,
    },
    "parl": {
        "critic": "calql",
        "ranking": {
            "ensemble": 3, "width": 16, "layers": 1, "value": "mean", "candidates": 4, "keep": 2, "ascent_steps": 2,
            "ascent_size": 0.05, "temperature": 1.0,
        },
        "subsample": 2, "conservative": {"weight": 0.1, "states": 8, "random_chunks": 3, "policy_chunks": 2},
        "expectile": 0.7, "proposers": 2, "improvements": 4, "pool": 32, "offline_updates": 3, "critic_updates": 0.5,
        "policy_updates": 0.5, "offline_share": 0.5, "discount": 0.9, "batch_size": 16, "critic_lr": 1e-3,
        "policy_lr": 1e-3, "grad_clip": 10.0, "ema_decay": 0.9,
    },
    "dppo": {
        "tuned_steps": 2, "min_sampling_std": 0.1, "min_log_prob_std": 0.1, "discount": 0.9, "gae_decay": 0.95,
        "denoising_discount": 0.9, "clip": 0.1, "clip_base": 0.01, "clip_rate": 3.0, "advantage_tail": 0.05,
        "target_kl": 1.0, "warmup_iterations": 1, "epochs": 3, "batch_size": 2, "lr": 1e-3, "value_lr": 1e-3,
        "grad_clip": 1.0, "width": 16, "layers": 1, "budget": 1.0, "rollout_steps": 24, "value_updates": 4,
    },
    "tdmpc2": {
        "data": "demonstrations",
        "latent": {"latent_dim": 16, "encoder_width": 16, "width": 16, "ensemble": 3, "bins": 11},
        "search": {
            "horizon": 3, "prior_samples": 4, "samples": 8, "iterations": 1, "elites": 4, "temperature": 2.0,
            "weighting": "raw", "min_std": 0.05, "max_std": 2.0, "selection": "sample",
        },
        "seed_steps": 12, "offline_updates": 4, "offline_share": 0.5, "bc_coef": 0.5, "updates": 0.5, "discount": 0.9, "batch_size": 16, "lr": 1e-3,
        "ema_decay": 0.9,
    },
    "diwa": {
        "tuned_steps": 2, "min_sampling_std": 0.1, "min_log_prob_std": 0.1, "discount": 0.9, "gae_decay": 0.9,
        "denoising_discount": 0.9, "clip": 0.1, "clip_base": 0.05, "clip_rate": 3.0, "advantage_tail": 0.05,
        "target_kl": 1.0, "warmup_iterations": 1, "epochs": 2, "batch_size": 6, "lr": 1e-3, "value_lr": 1e-3,
        "grad_clip": 10.0, "width": 16, "layers": 1,
        "num_envs": 3, "decisions": 4, "iterations": 18, "starts": "first", "bc_coef": 0.05, "penalty": 0.0,
    },
    "evaluation": {
        "episodes": 6, "num_envs": 3, "first_seed": 10_000, "curve_points": 2, "curve_episodes": 4, "videos": 0,
    },
}  # fmt: skip


BRIEF = {"modip.env_steps": 30}
"""Half of the small cell's steps, which are enough to see whether a value acts."""


@functools.cache
def project_tree() -> dict[str, Any]:
    """The project's own params.yaml, to be copied before it is changed: reading it takes a tenth of a second."""
    tree: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    return tree


def small_tree(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole of params.yaml for the toy data set alone; `changes` by dotted name, as {"mppi.horizon": 2}."""
    tree = copy.deepcopy(project_tree())
    tree["dataset"] = ["toy"]
    tree["data"] = {
        "toy": {"source": "toy", "env": "modip/Toy-v0", "episodes": 12, "noise": 1.0, "seed": 7}
    }
    tree["runtime"] = {"device": "cpu", "threads": 1, "checkpoint_seconds": 20.0}
    for name in SECTIONS:
        small = copy.deepcopy(SMALL[name])  # `changes` may go into its nested values
        tree[name] = {"base": {**tree[name]["base"], **small}, "by_dataset": {"toy": {}}}
    tree["variants"] = {}
    tree["compare"] = {"toy": {"bc": [0, 1], "modip": [0, 1]}}
    tree["tune"] |= {
        "dataset": "toy", "env_steps": 48, "points": 2, "episodes": 4, "trials": 3,
        "shortlist": 1, "shortlist_seeds": [9], "confirm_seeds": [1, 2],
        "parameters": {"mppi.horizon": {"type": "int", "low": 1, "high": 4, "log": False}},
        "objective": {"policy": "planner", "metric": "return"}, "pruner": {"type": "none"},
    }  # fmt: skip
    for path, value in (changes or {}).items():
        section, *fields = path.split(".")
        at = tree[section]["base"]
        for field in fields[:-1]:
            at = at[field]
        at[fields[-1]] = value
    return tree  # fmt: skip


def small_cell(changes: Mapping[str, Any] | None = None) -> Cell:
    """The checked cell of `small_tree`."""
    return build(small_tree(changes), Path("params.yaml")).cell("toy")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def episodes(number: int = 12) -> Episodes:
    """Noisy demonstrations of the toy task, 20 steps each, all truncated."""
    source = toy.ToySource(source="toy", env="modip/Toy-v0", episodes=number, noise=1.0, seed=7)
    return toy.collect("toy", source, lambda: None)


def demonstrations(cell: Cell, number: int = 12) -> Replay:
    return Replay.from_episodes(episodes(number), cell.critics.reward_offset, CPU)


class Parts(NamedTuple):
    """Untrained, as the pipeline builds them."""

    policy: DiffusionPolicy
    model: WorldModel
    critics: Critics


def new_parts(cell: Cell, demos: Replay, seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    model = new_model(cell, SPEC, demos)
    return Parts(
        new_policy(cell, SPEC, demos), model, new_critics(cell, SPEC, demos, model.latent_dim)
    )


def bc_job(cell: Cell, seed: int = 0) -> Fit:
    demos = demonstrations(cell)
    torch.manual_seed(seed)
    policy = new_policy(cell, SPEC, demos)
    config = cell.diffusion
    return Fit(BC(policy, cell, demos, num_updates=config.updates, lr=config.lr, seed=seed))


def modip_job(cell: Cell, seed: int = 0, parts: Parts | None = None) -> Interaction:
    demos = demonstrations(cell)
    agent = Modip(*(parts or new_parts(cell, demos, seed)), cell, demos, seed=seed)
    return interaction(cell, agent, seed)


def cloned(cell: Cell, seed: int, *, informative: bool) -> tuple[Replay, BC]:
    """Forty demonstrations and their clone; where not `informative`, their rewards are shuffled afterwards."""
    demos = demonstrations(cell, 40)
    policy = new_parts(cell, demos, seed).policy
    clone = BC(policy, cell, demos, num_updates=400, lr=cell.diffusion.lr, seed=seed)
    fit = Fit(clone)
    while fit.advance() is not None:
        pass
    if not informative:
        shuffled = torch.randperm(len(demos.table), generator=generator(seed))
        demos.table[:, -2] = demos.table[shuffled, -2]
    return demos, clone


def rival_job(
    make: Callable[..., Rival], cell: Cell, seed: int = 0, parts: Parts | None = None
) -> Interaction:
    """An agent that starts from the cloned policy alone."""
    demos = demonstrations(cell)
    agent = make((parts or new_parts(cell, demos, seed)).policy, cell, demos, seed=seed)
    return interaction(cell, agent, seed, budget=agent.budget)


def diwa_job(cell: Cell, seed: int = 0, parts: Parts | None = None) -> Fit:
    demos = demonstrations(cell)
    policy, model, _ = parts or new_parts(cell, demos, seed)
    return Fit(DiWA(policy, model, cell, demos, seed=seed))


def interaction(
    cell: Cell,
    agent: Agent,
    seed: int,
    env: BatchedEnv | None = None,
    budget: int | None = None,
) -> Interaction:
    """The agent in the toy environment, or in `env`, with the cell's budget, or its own."""
    config = cell.modip
    return Interaction(
        agent, env or BatchedEnv("modip/Toy-v0", config.num_envs), env_steps=budget or config.env_steps, episode_steps=config.episode_steps,
        seed=seed, device=torch.device("cpu"),
    )  # fmt: skip


dql_job, dppo_job, dsrl_job, parl_job, tdmpc2_job = (
    functools.partial(rival_job, make) for make in (DQL, DPPO, DSRL, PARL, TDMPC2)
)
JOBS: dict[str, Callable[..., Fit | Interaction]] = {
    "bc": bc_job,
    "modip": modip_job,
    "dql": dql_job,
    "dppo": dppo_job,
    "diwa": diwa_job,
    "dsrl": dsrl_job,
    "parl": parl_job,
    "tdmpc2": tdmpc2_job,
}
"""A small job of every agent, from fresh parts."""


def leaves(state: Any, where: str = "") -> dict[str, Any]:
    """A nested state as {path: tensor or value}."""
    if isinstance(state, Mapping):
        return {
            k: v for key, part in state.items() for k, v in leaves(part, f"{where}/{key}").items()
        }
    if isinstance(state, list | tuple):
        return {
            k: v for i, part in enumerate(state) for k, v in leaves(part, f"{where}/{i}").items()
        }
    return {where: state}  # fmt: skip


def differences(a: State, b: State) -> list[str]:
    """Paths at which two states are not the same bit for bit (NaN equals NaN)."""
    one, two = leaves(a), leaves(b)
    if one.keys() != two.keys():
        return sorted(one.keys() ^ two.keys())
    return [where for where in one if not _same(one[where], two[where])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(
            ((a == b) | ((a != a) & (b != b))).all()
        )  # fmt: skip
    return a == b or (a != a and b != b)


def snapshot(state: State) -> State:
    """A copy that later updates do not reach."""
    return copy.deepcopy(state)


def table(data: Episodes) -> pa.Table:
    """An episode file as a user with nothing but pyarrow would write it, checked by nobody."""
    columns: dict[str, Any] = {
        name: pa.array(list(rows), pa.list_(pa.float32(), rows.shape[1]))
        for name, rows in (("observation", data.observation), ("action", data.action))
    }
    for name in ("episode_id", "step", "reward", "terminated", "truncated"):
        columns[name] = pa.array(getattr(data, name))
    metadata = {b"modip_dataset": json.dumps(asdict(data.info)).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)
