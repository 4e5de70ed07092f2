"""What every agent keeps to, whatever it learns: shapes, noise, what rests, exact resume, its budget."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from modip import checkpoint
from modip.agents import AGENTS
from modip.agents.bc import BC
from modip.diffusion import DiffusionPolicy
from modip.loops import Fit, Interaction
from modip.types import State
from tests.helpers import (
    JOBS,
    bc_job,
    demonstrations,
    differences,
    generator,
    leaves,
    modip_job,
    new_parts,
    small_cell,
    snapshot,
)

Job = Fit | Interaction
DENOISES = [agent for agent in AGENTS if agent != "tdmpc2"]
"""Agents that start from a clone, and leave a diffusion policy."""


def agent_of(job: Job) -> Any:
    return job.learner if isinstance(job, Fit) else job.agent


def policy_of(agent: str, it: Any) -> DiffusionPolicy:
    found = {
        "bc": "learner",
        "modip": "policy_learner",
        "dql": "policy_learner",
        "dppo": "ppo.policy",
        "diwa": "ppo.policy",
        "dsrl": "steered",
        "parl": "policy_learner",
    }[agent]
    policy = operator.attrgetter(found)(it)
    return policy if isinstance(policy, DiffusionPolicy) else policy.ema


def finish(job: Job, units: int | None = None) -> list[dict[str, float]]:
    """Advance to the end, or by so many units; the metrics of every update."""
    seen = []
    while units is None or units > 0:
        metrics = job.advance()
        if metrics is None:
            break
        if metrics:
            seen.append({name: float(value) for name, value in metrics.items()})
        if units is not None:
            units -= 1
    return seen


def saved(job: Job, path: Path) -> State:
    """The job's state by way of the disk."""
    checkpoint.save(path, "resume", job.state_dict(), {})
    return checkpoint.load(path, "resume")[0]


def test_every_agent_is_here() -> None:
    assert set(JOBS) == set(AGENTS)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("explore", [False, True])
def test_actions_are_chunks_in_range(agent: str, explore: bool) -> None:
    it = agent_of(JOBS[agent](small_cell()))
    for size in (1, 2, 5):
        chunk = it.act(torch.randn(size, 4) * 3, generator(), explore=explore)
        assert chunk.shape == (size, 1 if agent == "tdmpc2" else 2, 2)
        assert chunk.dtype == torch.float32
        assert chunk.abs().max() <= 1
        assert not chunk.requires_grad


@pytest.mark.parametrize("agent", AGENTS)
def test_the_same_noise_is_the_same_action(agent: str) -> None:
    it, obs = agent_of(JOBS[agent](small_cell())), torch.randn(3, 4)
    acts = [it.act, lambda o, g, explore: it.policy(o, g)]
    if agent == "modip":
        acts.append(lambda o, g, explore: it.planner(o, g))
    for act in acts:
        one = act(obs, generator(1), explore=False)
        assert torch.equal(one, act(obs, generator(1), explore=False))
        # What an actor has steered has no noise left.
        assert torch.equal(one, act(obs, generator(2), explore=False)) == (agent == "dsrl")
    one = it.act(obs, generator(1), explore=True)
    assert not torch.equal(one, it.act(obs, generator(2), explore=True))


@pytest.mark.parametrize("agent", AGENTS)
def test_acting_without_exploring_changes_nothing(agent: str) -> None:
    job = JOBS[agent](small_cell())
    finish(job, 6)
    before = snapshot(job.state_dict())
    it = agent_of(job)
    it.act(torch.randn(3, 4), generator(), explore=False)
    it.policy(torch.randn(3, 4), generator())
    assert differences(before, job.state_dict()) == []


@pytest.mark.parametrize("agent", DENOISES)
def test_a_batch_is_its_rows_given_the_noise(agent: str) -> None:
    policy = policy_of(agent, agent_of(JOBS[agent](small_cell())))
    policy._schedule = policy._sampling_schedule(3, 0.0)  # no noise but the first
    obs, noise = torch.randn(4, 4), torch.randn(4, *policy.shape)
    batch = policy.sample(obs, generator(), noise)
    for i in range(4):
        alone = policy.sample(obs[i : i + 1], generator(), noise[i : i + 1])
        torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("agent", AGENTS)
def test_learning_changes_what_learns_and_nothing_else(agent: str) -> None:
    job = JOBS[agent](small_cell())
    it = agent_of(job)
    demos = snapshot(it.demos.state_dict())
    start = snapshot(it.state_dict())
    finish(job)
    changed = {where.split("/")[1] for where in differences(start, it.state_dict())}
    learns = {
        "bc": {"learner"},
        "modip": {"policy", "model", "critics"},
        "dql": {"policy", "critics"},
        "dppo": {"ppo"},
        "diwa": {"ppo"},
        "dsrl": {"actor", "critics", "noise_critics", "temperature"},
        "parl": {"policy", "critics"},
        "tdmpc2": {"model", "prior"},
    }[agent]
    assert learns <= changed
    # Statistics of the data and the schedule are no weights: they stay.
    for where in differences(start, it.state_dict()):
        if where.startswith("/candidates"):  # copies that were not there at the start
            continue
        name = where.rpartition("/")[2]
        assert name not in {"alpha_bar", "delta", "reward_mean", "reward_std", "scale"}, where
        assert "normalizer" not in where
    assert differences(demos, it.demos.state_dict()) == []


def test_in_the_final_phase_only_the_policy_learns() -> None:
    cell = small_cell({"modip.env_steps": 60, "modip.final_env_steps": 24})
    job = modip_job(cell)
    agent = agent_of(job)
    while job.env_steps < 36:
        job.advance()
    assert agent.frozen
    while agent.update():  # what the online phase still owed
        pass
    rest = [part.state_dict() for part in (agent.model, agent.critics)]
    before, policy = snapshot({"parts": rest}), snapshot(agent.policy_learner.state_dict())
    steps = job.env_steps
    finish(job)
    assert job.env_steps > steps
    after = {"parts": [part.state_dict() for part in (agent.model, agent.critics)]}
    assert differences(before, after) == []
    assert differences(policy, agent.policy_learner.state_dict())


POINTS = (2, 27, 62)
"""Units of work: while some still prepare offline; in the middle of the environment steps; in the last phase, or at the end."""


@pytest.mark.parametrize("agent", AGENTS)
def test_a_resumed_run_is_the_run_bit_for_bit(agent: str, tmp_path: Path) -> None:
    """Through the disk, into an object that was built with another seed and has already been at work."""
    cell = small_cell({"diffusion.updates": 68})
    whole, seen, done = JOBS[agent](cell, seed=3), [], 0
    first, states = {}, {}
    for units in POINTS:
        seen += finish(whole, units - done)
        done, first[units], states[units] = units, len(seen), saved(whole, tmp_path / str(units))
        prepares = units == POINTS[0] and agent in ("dql", "dppo", "parl", "tdmpc2")
        assert (whole.offline_left > 0) == prepares
        if isinstance(whole, Interaction):  # in the middle of episodes, for most of these
            assert whole.env_steps < cell.modip.env_steps or units == POINTS[-1]
            running = [len(actions) for actions in whole.state_dict()["env"]["actions"]]
            assert units == POINTS[0] or any(running)
    seen += finish(whole)
    end = whole.state_dict()
    for units in POINTS:
        rest = JOBS[agent](cell, seed=4)
        finish(rest, 3)
        rest.load_state_dict(states[units])
        assert seen[: first[units]] + finish(rest) == seen
        assert differences(end, rest.state_dict()) == []


@pytest.mark.parametrize("agent", AGENTS)
def test_looking_at_a_run_does_not_change_it(agent: str, tmp_path: Path) -> None:
    """Saving after every unit, or never: the same end."""
    cell = small_cell({"modip.env_steps": 24, "modip.final_env_steps": 8, "diffusion.updates": 9})
    plain, watched = JOBS[agent](cell), JOBS[agent](cell)
    finish(plain)
    while finish(watched, 1) or watched.advance() is not None:
        saved(watched, tmp_path / "state")
    assert differences(plain.state_dict(), watched.state_dict()) == []


@pytest.mark.parametrize("agent", AGENTS)
def test_seeds_repeat_and_differ(agent: str) -> None:
    cell = small_cell({"modip.env_steps": 24, "modip.final_env_steps": 8})
    one, same, other = (finish(JOBS[agent](cell, seed=s)) for s in (0, 0, 1))
    assert one == same
    assert one != other
    assert all(set(a) == set(b) for a, b in zip(one, same, strict=True))


def poisoned(agent: str, part: str) -> Any:
    """The agent, built from parts of which one has diverged."""
    cell = small_cell()
    parts = new_parts(cell, demonstrations(cell))
    module: torch.nn.Module = getattr(parts, part)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(float("nan"))
    if agent != "bc":
        return agent_of(JOBS[agent](cell, parts=parts))
    return BC(parts.policy, cell, demonstrations(cell), num_updates=1, lr=1e-3, seed=0)


@pytest.mark.parametrize("part", ["model", "critics"])
def test_a_planner_that_has_diverged_says_so(part: str) -> None:
    with pytest.raises(FloatingPointError, match="world model or the critics"):
        poisoned("modip", part).act(torch.randn(2, 4), generator(), explore=True)


@pytest.mark.parametrize("agent", DENOISES)
def test_a_policy_that_has_diverged_says_so(agent: str) -> None:
    with pytest.raises(FloatingPointError, match="the policy has diverged"):
        poisoned(agent, "policy").act(torch.randn(2, 4), generator(), explore=True)


BUDGETS = {
    "chunks divide it": {"env_steps": 64, "final_env_steps": 16, "num_envs": 4},
    "nothing divides it": {"env_steps": 61, "final_env_steps": 13, "num_envs": 3},
    "a chunk across the border": {"env_steps": 70, "final_env_steps": 20, "num_envs": 8},
    "one environment": {"env_steps": 31, "final_env_steps": 7, "num_envs": 1},
    "no final phase": {"env_steps": 60, "final_env_steps": 0, "num_envs": 5},
    "final phase alone": {"env_steps": 40, "final_env_steps": 40, "num_envs": 5},
}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("updates", [0.5, 0.7])
def test_the_budget_is_kept(name: str, updates: float) -> None:
    """Environment steps to within a chunk of every environment; updates as many as promised."""
    changes = {f"modip.{k}": v for k, v in BUDGETS[name].items()}
    changes |= {"modip.policy_updates": updates, "modip.model_updates": 0.3}
    cell = small_cell(changes)
    config = cell.modip
    job = modip_job(cell)
    metrics = finish(job)
    chunk = config.num_envs * cell.chunk.act_steps
    assert config.env_steps <= job.env_steps < config.env_steps + chunk
    agent = agent_of(job)
    assert abs(agent.policy_learner.grad_steps - config.num_policy_updates) <= 1
    online = config.env_steps - config.final_env_steps
    assert abs(agent.model.grad_steps - 0.3 * online) <= 1
    assert abs(agent.critics.grad_steps - 0.25 * online) <= 1
    assert job.grad_steps == len(metrics)
    learned = (part.grad_steps for part in (agent.policy_learner, agent.model, agent.critics))
    assert job.grad_steps == sum(learned)


def test_the_control_takes_no_environment_step() -> None:
    job: Any = bc_job(small_cell())
    assert len(finish(job)) == small_cell().diffusion.updates
    assert job.env_steps == 0
    with pytest.raises(RuntimeError, match="demonstrations alone"):
        job.learner.observe(None)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_number_of_a_state_is_finite(agent: str) -> None:
    job = JOBS[agent](small_cell())
    finish(job)
    for where, value in leaves(job.state_dict()).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            unknown = where.endswith("episode_return")  # NaN: its episode is running
            assert unknown or bool(torch.isfinite(value).all()), where


def test_metrics_have_the_parts_names() -> None:
    names: set[str] = set()
    for job in (bc_job(small_cell()), modip_job(small_cell())):
        names |= {name for metrics in finish(job) for name in metrics}
    assert {name.partition("_")[0] for name in names} == {"policy", "model", "critic"}
