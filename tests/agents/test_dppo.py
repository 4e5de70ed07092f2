"""DPPO: its budget and rollouts, what its value starts from, the knobs, and that it learns. The rest is chain_ppo's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modip.agents.dppo import DPPO
from modip.artifacts import read_policy, save_policy
from modip.config import Cell, DPPOConfig, load
from modip.critics import returns_to_go
from modip.diffusion import DiffusionPolicy
from modip.envs import BatchedEnv, toy
from modip.errors import UserError
from modip.loops import Interaction
from modip.splitting import SplitPolicy
from modip.types import ChunkStep
from tests.agents.test_learning import MARGIN, Noisy, mean_return
from tests.helpers import (
    ROOT,
    SPEC,
    cloned,
    demonstrations,
    differences,
    dppo_job,
    generator,
    interaction,
    new_parts,
    small_cell,
    snapshot,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Observations and fresh weights of each test are the same in every run."""
    torch.manual_seed(0)


def finish(job: Interaction) -> DPPO:
    while job.advance() is not None:
        pass
    agent = job.agent
    assert isinstance(agent, DPPO)
    return agent


def run(cell: Cell, seed: int = 0) -> DPPO:
    return finish(dppo_job(cell, seed))


# Budget and rollouts.


@pytest.mark.parametrize(("steps", "envs", "rollout"), [(60, 2, 20), (61, 3, 25), (96, 4, 1000), (31, 1, 1)])  # fmt: skip
@pytest.mark.parametrize("budget", [1.0, 2.5])
def test_the_budget_is_spent_in_full_rollouts(
    steps: int, envs: int, rollout: int, budget: float
) -> None:
    changes = {"modip.env_steps": steps, "modip.num_envs": envs, "modip.final_env_steps": 0}
    agent = run(small_cell({**changes, "dppo.rollout_steps": rollout, "dppo.budget": budget}))
    assert agent.budget == round(budget * steps)
    assert agent.budget <= agent.env_steps < agent.budget + 2 * envs
    ppo = agent.ppo
    # As many as their length promises, or more by what was rounded off.
    promised = max(1, round(agent.budget / rollout))
    assert min(promised, agent.budget // (2 * envs)) <= ppo.iteration <= 1.25 * promised
    each = 3 * ppo.batches
    assert ppo.value.grad_steps == 4 + ppo.iteration * each
    assert ppo.policy.grad_steps == (ppo.iteration - 1) * each


def test_ten_times_the_budget_is_a_variant() -> None:
    params = load(ROOT / "params.yaml")
    one, ten = (params.cell("fetch-pick-and-place", name) for name in ("dppo", "dppo-10x"))
    assert ten.dppo.budget == 10 * one.dppo.budget
    assert ten.dppo.model_copy(update={"budget": one.dppo.budget}) == one.dppo


@pytest.mark.parametrize("dataset", ["toy", "fetch-pick-and-place", "pusht-human", "d4rl/hopper-medium-v2", "robomimic/can-ph"])  # fmt: skip
def test_its_values_fit_every_data_sets_policy(dataset: str) -> None:
    cell = load(ROOT / "params.yaml").cell(dataset)
    assert cell.dppo.tuned_steps <= cell.diffusion.sampling_steps
    assert cell.diffusion.eta == 1.0


def test_a_rollout_remembers_the_chain_that_was_executed() -> None:
    cell = small_cell({"dppo.rollout_steps": 60})
    job = dppo_job(cell)
    agent: Any = job.agent
    executed: list[Tensor] = []
    observe = agent.observe

    def spy(step: ChunkStep) -> None:
        executed.append(step.action)
        observe(step)

    agent.observe = spy
    while len(executed) < 15:
        job.advance()
    chain = agent.ppo.chain[:, :, -1].view(15, 2, 4, 2)[:, :, :2]
    assert torch.equal(torch.stack(executed), chain.clamp(-1, 1))


def test_the_rewards_offset_is_added() -> None:
    plain, shifted = (dppo_job(small_cell({"critics.reward_offset": x})) for x in (0.0, -1.5))
    for job in (plain, shifted):
        job.agent.ppo.value.grad_steps = 4  # type: ignore[attr-defined]
        job.advance()
    one, other = (job.agent.ppo.reward[0] for job in (plain, shifted))  # type: ignore[attr-defined]
    torch.testing.assert_close(other, one - 1.5)


# The value's start.


def test_the_value_starts_as_the_demonstrations_value() -> None:
    """Before the first step: TD on them comes near their own discounted returns, where those are nearly whole."""
    cell = small_cell({"dppo.discount": 0.5, "dppo.value_updates": 300, "dppo.batch_size": 64, "dppo.width": 48, "dppo.value_lr": 3e-3})  # fmt: skip
    job = dppo_job(cell)
    agent: Any = job.agent
    start = snapshot(agent.ppo.policy.state_dict())
    while agent.offline_left:
        assert job.advance()
    assert job.env_steps == 0
    assert differences(start, agent.ppo.policy.state_dict()) == []
    table, end = agent.demos.table, agent.demos.end
    returns = returns_to_go(table[:, -2], end, 0.5)
    left = end - torch.arange(len(end))
    early = left > 8
    found = agent.ppo.value_of(table[:, :4]).detach()
    error = float((found - returns)[early].square().mean())
    assert error < 0.2 * float(returns[early].var())


def test_what_ends_well_has_no_value_after_it() -> None:
    agents = [dppo_job(small_cell({"critics.demos_end_well": x})).agent for x in (False, True)]
    ends = [float(agent.demos.table[:, -1].sum()) for agent in agents]  # type: ignore[attr-defined]
    assert ends == [0.0, 12.0]


# The parameters.


KNOBS: dict[str, Any] = {
    "dppo.tuned_steps": 1, "dppo.min_sampling_std": 0.3, "dppo.min_log_prob_std": 0.3, "dppo.discount": 0.5,
    "dppo.gae_decay": 0.5, "dppo.denoising_discount": 0.5, "dppo.clip": 1e-4, "dppo.clip_base": 1e-4,
    "dppo.clip_rate": 1.0, "dppo.advantage_tail": 0.3, "dppo.target_kl": 1e-9, "dppo.warmup_iterations": 1,
    "dppo.epochs": 3, "dppo.batch_size": 7, "dppo.lr": 1e-4, "dppo.value_lr": 1e-2, "dppo.grad_clip": 0.01,
    "dppo.width": 8, "dppo.layers": 2, "dppo.budget": 2.0, "dppo.rollout_steps": 12, "dppo.value_updates": 1,
    "critics.reward_offset": -1.0, "critics.demos_end_well": True, "critics.n_step": 1, "modip.env_steps": 90,
    "modip.num_envs": 3, "modip.episode_steps": 6,
}  # fmt: skip
MOVING = {"dppo.lr": 0.02, "dppo.epochs": 6, "dppo.warmup_iterations": 0, "dppo.tuned_steps": 3}
"""Far enough that a ratio leaves its range; a chain of two steps has but the ends of that range."""


def moving(changes: dict[str, Any]) -> Tensor:
    cell = small_cell({**MOVING, **changes})
    return run(cell).policy(torch.randn(8, 4, generator=generator(9)), generator())


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return moving({})


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_acts(knob: str, plain: Tensor) -> None:
    assert not torch.equal(moving({knob: KNOBS[knob]}), plain)


def test_every_knob_is_here() -> None:
    turned = {knob.split(".")[1] for knob in KNOBS if knob.startswith("dppo.")}
    assert turned == set(DPPOConfig.model_fields)


def test_a_policy_that_cannot_be_fine_tuned_is_refused() -> None:
    with pytest.raises(UserError, match=r"set diffusion.eta to 1.0"):
        dppo_job(small_cell({"diffusion.eta": 0.0}))


# What it leaves behind.


@pytest.mark.parametrize(("tuned", "kind"), [(2, SplitPolicy), (3, DiffusionPolicy)])
def test_what_it_leaves_behind_is_judged_by_the_ordinary_sampler(
    tuned: int, kind: type[DiffusionPolicy], tmp_path: Path
) -> None:
    agent = run(small_cell({"dppo.tuned_steps": tuned}))
    save_policy(tmp_path / "policy", agent.final["policy"], SPEC, {"seed": 0, "grad_steps": 1})
    policy, _ = read_policy(tmp_path / "policy")
    assert type(policy) is kind
    obs = torch.randn(5, 4)
    wanted = policy.sample(obs, generator(2))[:, :2]
    assert torch.equal(agent.act(obs, generator(2), explore=False), wanted)
    assert not torch.equal(agent.act(obs, generator(2), explore=True), wanted)


def test_the_clones_bits_stay() -> None:
    cell = small_cell()
    parts = new_parts(cell, demonstrations(cell))
    before = snapshot(parts.policy.state_dict())
    agent = finish(dppo_job(cell, parts=parts))
    assert differences(before, parts.policy.state_dict()) == []
    assert differences(before, {k: v for k, v in agent.final["policy"].state_dict().items() if k in before})  # fmt: skip


# It learns.


LEARNS: dict[str, Any] = {
    "diffusion.width": 48, "diffusion.blocks": 2, "diffusion.updates": 400, "diffusion.batch_size": 64,
    "diffusion.lr": 2e-3, "diffusion.ema_decay": 0.98,
    "modip.env_steps": 800, "modip.final_env_steps": 0, "modip.num_envs": 8,
    "dppo.budget": 5.0, "dppo.tuned_steps": 3, "dppo.rollout_steps": 160, "dppo.epochs": 5, "dppo.batch_size": 40,
    "dppo.lr": 1e-3, "dppo.width": 48, "dppo.layers": 2, "dppo.value_updates": 200, "dppo.warmup_iterations": 0,
    "dppo.advantage_tail": 0.0, "dppo.grad_clip": 10.0, "dppo.clip_base": 0.05,
}  # fmt: skip


def improvement(seed: int, env: BatchedEnv, *, informative: bool) -> tuple[float, float]:
    """Mean returns on the same 50 starts: of the clone, and of what was learned from there."""
    cell = small_cell(LEARNS)
    demos, clone = cloned(cell, seed, informative=informative)
    agent = DPPO(clone.learner.ema.requires_grad_(True), cell, demos, seed=seed)
    finish(interaction(cell, agent, seed, env, agent.budget))
    return mean_return(clone.policy), mean_return(agent.policy)


@pytest.mark.learn
def test_it_becomes_better_than_the_clone() -> None:
    before, after = improvement(0, BatchedEnv(toy.ENV_ID, 8), informative=True)
    assert after > before + MARGIN


@pytest.mark.learn
def test_from_rewards_that_say_nothing_there_is_nothing_to_gain() -> None:
    before, after = improvement(0, Noisy(toy.ENV_ID, 8), informative=False)
    assert after < before + MARGIN
