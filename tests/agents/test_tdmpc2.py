"""TD-MPC2: its losses against plain loops, its plan against MODIP's, warm starts, its two kinds of data, the knobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import modip
from modip import mppi
from modip.agents.bc import BC
from modip.agents.modip import plan as modips_plan
from modip.agents.tdmpc2 import TDMPC2, moved, over_steps, prior_loss, td_target
from modip.artifacts import read_diffusion, read_policy, save_policy
from modip.config import Cell, LatentConfig, SearchConfig, TDMPC2Config
from modip.envs import BatchedEnv, toy
from modip.errors import UserError
from modip.imagination import planned_return
from modip.latent import LatentPlanner, LatentPolicy, following
from modip.loops import Fit
from modip.nets import two_hot, two_hot_value
from modip.types import ChunkStep, Window
from tests.agents.test_learning import MARGIN, Noisy, mean_return
from tests.helpers import (
    BRIEF,
    SPEC,
    demonstrations,
    differences,
    generator,
    interaction,
    new_parts,
    small_cell,
    snapshot,
    tdmpc2_job,
)

ONLINE = {"tdmpc2.data": "online"}
FORMS: dict[str, dict[str, Any]] = {"demonstrations": {}, "online": ONLINE}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Observations and fresh weights of each test are the same in every run."""
    torch.manual_seed(0)


def agent_of(changes: dict[str, Any] | None = None) -> TDMPC2:
    job: Any = tdmpc2_job(small_cell(changes))
    agent: TDMPC2 = job.agent
    return agent


def run(cell: Cell, seed: int = 0) -> TDMPC2:
    job: Any = tdmpc2_job(cell, seed)
    while job.advance() is not None:
        pass
    agent: TDMPC2 = job.agent
    return agent


def randomise(*modules: nn.Module) -> None:
    """Weights far from their start, so that nothing is near 0 by chance."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator(5)))


def shuffled(agent: TDMPC2) -> TDMPC2:
    randomise(agent.model.module, agent.model.ema, agent.prior.module)
    return agent


# The losses.


def test_a_step_weighs_rho_to_its_number_and_only_rows_that_are_there() -> None:
    error = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    wanted = (1.0 * (1 + 3) / 2 + 0.5 * 2.0 + 0.25 * 0.0) / 3
    torch.testing.assert_close(over_steps(error, mask, 0.5), torch.tensor(wanted))


def test_the_target_takes_the_smaller_q_and_stops_at_an_end() -> None:
    reward = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    terminated = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    next_q = torch.tensor([[[1.0, 5.0], [-2.0, 7.0]], [[2.0, 9.0], [-3.0, 6.0]]])
    wanted = torch.tensor([[1 + 0.9 * 1, 2.0], [3 + 0.9 * -3, 4 + 0.9 * 6]])
    torch.testing.assert_close(td_target(reward, terminated, next_q, 0.9), wanted)


def test_the_priors_loss_falls_with_q_and_with_entropy() -> None:
    q, log_prob = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    first = -((1.0 - 0.1 * 0.5) + (3.0 - 0.1 * 2.0)) / 2
    second = -(2.0 - 0.1 * 1.0)
    found = prior_loss(q, log_prob, mask, entropy_coef=0.1, rho=0.5)
    torch.testing.assert_close(found, torch.tensor((first + 0.5 * second) / 2))


def test_the_range_runs_after_the_quantiles_and_is_at_least_one() -> None:
    value = torch.ones(())
    q = torch.linspace(0.0, 100.0, 101)
    for _ in range(3):
        value = moved(value, q, decay=0.9)
    wanted = 1.0
    for _ in range(3):
        wanted += 0.1 * (90.0 - wanted)
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(moved(torch.ones(()), 1e-3 * q, decay=0.0)) == 1.0


def example(rows: int = 4) -> Window:
    """Whole; ended by its second step; cut after its third row, which has no successor; of one row that ends."""
    g = generator(2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).float()
    terminated = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).float()
    return Window(
        torch.randn(rows, 4, 4, generator=g), torch.rand(rows, 4, 2, generator=g) * 2 - 1,
        3 * torch.randn(rows, 4, generator=g), terminated, mask,
    )  # fmt: skip


def soft_ce(logits: Tensor, value: float) -> float:
    """Cross-entropy against the two-hot label, by the definition."""
    label = two_hot(torch.tensor(value), len(logits))
    raw = [math.exp(x) for x in logits.tolist()]
    log_prob = [math.log(x / sum(raw)) for x in raw]
    return -sum(p * q for p, q in zip(label.tolist(), log_prob, strict=True))


def test_the_models_loss_is_the_papers_row_by_row() -> None:
    """With other weights than the published ones, so that each part shows."""
    weights = {"consistency_coef": 2.0, "reward_coef": 0.3, "value_coef": 0.7, "end_coef": 0.4}
    agent = shuffled(agent_of({**{f"tdmpc2.{k}": v for k, v in weights.items()}, "tdmpc2.rho": 0.6}))  # fmt: skip
    window = example()
    state = agent.generator.get_state()
    found, metrics, latents = agent._model_loss(window)

    agent.generator.set_state(state)
    model, ema, prior = agent.model.module, agent.model.ema, agent.prior.module
    with torch.no_grad():
        goal = model.encoder(window.obs)  # (B, 4, Dz)
        flat = goal[:, 1:].reshape(12, -1)
        chosen, _ = prior.sample(flat, agent.generator)
        pair = ema.two(agent.generator)
        next_q = two_hot_value(ema.q_logits(flat, chosen)[pair]).amin(0).view(4, 3)
        sums = {"consistency": [0.0] * 3, "reward": [0.0] * 3, "value": [0.0] * 3}
        counts = {"consistency": [0] * 3, "reward": [0] * 3, "value": [0] * 3}
        ends: list[float] = []
        for b in range(4):
            z = goal[b : b + 1, 0]
            for i in range(3):
                torch.testing.assert_close(latents[i, b], z[0])
                action = window.action[b : b + 1, i]
                reward, end = float(window.reward[b, i]), float(window.terminated[b, i])
                here, there = bool(window.mask[b, i]), bool(window.mask[b, i + 1])
                reward_logits = model.reward_logits(z, action)[0]
                q_logits = model.q_logits(z, action)[:, 0]
                z, logit = model.step(z, action)
                if there:
                    error = float((z[0] - goal[b, i + 1]).square().mean())
                    sums["consistency"][i] += error
                    counts["consistency"][i] += 1
                if here:
                    sums["reward"][i] += soft_ce(reward_logits, reward)
                    counts["reward"][i] += 1
                    p = 1 / (1 + math.exp(-float(logit)))
                    ends.append(-math.log(p if end else 1 - p))
                if here and (there or end):
                    y = reward + (0.0 if end else 0.9 * float(next_q[b, i]))
                    sums["value"][i] += sum(soft_ce(one, y) for one in q_logits) / len(q_logits)
                    counts["value"][i] += 1
    parts = {
        name: sum(0.6**i * sums[name][i] / max(1, counts[name][i]) for i in range(3)) / 3
        for name in sums
    }
    assert counts["value"] == [4, 3, 1]
    assert counts["consistency"] == [3, 2, 1]
    wanted = (
        2.0 * parts["consistency"] + 0.3 * parts["reward"] + 0.7 * parts["value"]
        + 0.4 * sum(ends) / len(ends)
    )  # fmt: skip
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(metrics["critic_loss"]) == pytest.approx(parts["value"], rel=1e-4)


def test_the_goal_and_the_target_carry_no_gradient() -> None:
    """The encoder learns from the first row alone: the others are goals."""
    agent = shuffled(agent_of())
    window = example()
    obs = window.obs.requires_grad_(True)
    agent._model_loss(window)[0].backward()
    assert obs.grad is not None
    assert obs.grad[:, 0].abs().sum() > 0
    assert torch.equal(obs.grad[:, 1:], torch.zeros_like(obs.grad[:, 1:]))


@pytest.mark.parametrize(
    ("changes", "steps", "shown"),
    [({}, 20, 2), ({}, 0, 4), ({"tdmpc2.offline_share": 0.25}, 20, 1), (ONLINE, 20, 0)],
)
def test_the_prior_climbs_the_mean_of_two_near_what_was_shown_and_moves_nothing_else(
    changes: dict[str, Any], steps: int, shown: int
) -> None:
    """The first `shown` rows are demonstrations': all of them before the first step, none online."""
    agent = shuffled(agent_of({"tdmpc2.entropy_coef": 0.2, "tdmpc2.range_decay": 0.5, **changes}))
    window = example()
    latents = agent._model_loss(window)[2]
    agent.env_steps = steps
    state, before = agent.generator.get_state(), agent.value_range
    found, entropy = agent._prior_loss(latents, window)
    agent.generator.set_state(state)
    flat = latents.transpose(0, 1).reshape(16, -1)
    action, log_prob = agent.prior.module.sample(flat, agent.generator)
    pair = agent.model.module.two(agent.generator)
    q = two_hot_value(agent.model.module.q_logits(flat, action)[pair]).mean(0).view(4, 4)
    gap = float(q[:, 0].detach().quantile(0.95) - q[:, 0].detach().quantile(0.05))
    value_range = 0.5 * float(before) + 0.5 * max(gap, 1.0)
    wanted = prior_loss(q / value_range, log_prob.view(4, 4), window.mask, 0.2, 0.5)
    mean = torch.tanh(agent.prior.module(flat)[0]).view(4, 4, 2).detach()
    for i in range(4):
        miss = [
            float((mean[b, i] - window.action[b, i]).square().mean())
            for b in range(shown)
            if window.mask[b, i]
        ]
        wanted = wanted + 0.5 * 0.5**i * sum(miss) / max(1, len(miss)) / 4
    torch.testing.assert_close(found, wanted)
    assert float(agent.value_range) == pytest.approx(value_range, rel=1e-5)
    torch.testing.assert_close(entropy, -log_prob.detach().mean())

    rest = snapshot(agent.model.module.state_dict())
    agent.prior.step(found)
    assert differences(rest, agent.model.module.state_dict()) == []


def test_at_first_every_reward_and_value_is_nothing() -> None:
    model = agent_of().model.module
    z, action = torch.rand(5, 16), torch.rand(5, 2)
    assert two_hot_value(model.reward_logits(z, action)).abs().max() < 1e-5
    assert two_hot_value(model.q_logits(z, action)).abs().max() < 1e-5


def test_a_latent_is_groups_that_sum_to_one() -> None:
    agent = shuffled(agent_of())
    z = agent.model.module.encoder(torch.randn(3, 5, 4))
    assert z.shape == (3, 5, 16)
    after, _ = agent.model.module.step(z.flatten(0, 1), torch.rand(15, 2))
    for latent in (z, after):
        assert (latent > 0).all()
        groups = latent.reshape(15, 8, 2)  # entry i belongs to group i mod 2
        torch.testing.assert_close(groups.sum(1), torch.ones(15, 2))


# The plan.


def test_the_planned_return_is_summed_step_by_step() -> None:
    agent = shuffled(agent_of())
    planner, model = agent.planner, agent.model.module
    obs, action = torch.randn(3, 4), torch.rand(3, 5, 3, 2) * 2 - 1
    latent = planner.encode(obs)
    g = generator(4)
    with torch.no_grad():
        _, end = model.step(latent.repeat_interleave(5, 0), action[:, :, 0].flatten(0, 1))
        model.dynamics.out.bias[..., -1] -= end.quantile(0.8)  # some sequences end, and some do not
        found = planner.value(latent, g)(action)
    g = generator(4)
    pair = model.two(g)
    wanted, ended, last = torch.zeros(3, 5), 0, []
    with torch.no_grad():
        for b in range(3):
            for n in range(5):
                z, alive = latent[b : b + 1], 1.0
                for i in range(3):
                    a = action[b, n, i].unsqueeze(0)
                    wanted[b, n] += 0.9**i * alive * two_hot_value(model.reward_logits(z, a))[0]
                    z, end = model.step(z, a)
                    if float(end) > 0:
                        alive = 0.0
                ended += alive == 0.0
                last.append((z, alive))
        z = torch.cat([one for one, _ in last])
        a, _ = agent.prior.module.sample(z, g)
        q = two_hot_value(model.q_logits(z, a)[pair]).mean(0)
    assert 0 < ended < 15
    wanted += 0.9**3 * torch.tensor([alive for _, alive in last]).view(3, 5) * q.view(3, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_candidates_are_the_priors_own_sequences() -> None:
    agent = shuffled(agent_of())
    latent = agent.planner.encode(torch.randn(2, 4))
    with torch.no_grad():
        found = agent.planner.candidates(latent, generator(6))
        g, z, steps = generator(6), latent.repeat_interleave(4, 0), []
        for _ in range(3):
            action, _ = agent.prior.module.sample(z, g)
            steps.append(action)
            z, _ = agent.model.module.step(z, action)
    assert torch.equal(found, torch.stack(steps, 1).view(2, 4, 3, 2))


class OurParts(LatentPlanner):
    """TD-MPC2's planner over our world model and V, with MODIP's Gaussian candidates."""

    def give(self, world: Any, critics: Any, discount: float) -> None:
        self.parts = (world, critics, discount)

    def encode(self, obs: Tensor) -> Tensor:
        return self.parts[0].encode(obs)

    def candidates(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        search = self.search
        shape = (len(latent), search.prior_samples, *self.shape)
        return (search.max_std * torch.randn(shape, generator=generator)).clamp(-1, 1)

    def value(self, latent: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        world, critics, discount = self.parts
        return lambda action: planned_return(world, critics, latent, action, discount).mean(0)


@pytest.mark.parametrize("selection", ["mean", "best", "sample"])
@pytest.mark.parametrize("weighting", ["standardised", "raw"])
def test_with_our_model_and_value_it_is_our_plan(selection: str, weighting: str) -> None:
    """Bit for bit: TD-MPC2's planner, `mppi.plan`, and MODIP's own with a Gaussian prior."""
    same = {"selection": selection, "weighting": weighting, "max_std": 0.7, "iterations": 2}
    ours = {"mppi.prior": "gaussian", "mppi.perturbed_samples": 0, "mppi.penalty": 0.0}
    cell = small_cell({**{f"mppi.{name}": value for name, value in same.items()}, **ours})
    parts = new_parts(cell, demonstrations(cell))
    randomise(parts.model, parts.critics)
    search = SearchConfig(**{name: getattr(cell.mppi, name) for name in SearchConfig.model_fields})
    latent = cell.tdmpc2.latent
    planner = OurParts.new(4, 2, latent, search, 0.9, parts.policy.normalizer)
    assert isinstance(planner, OurParts)
    planner.give(parts.model, parts.critics, cell.critics.discount)

    obs = torch.randn(5, 4)
    found = planner.plan(obs, generator(3), planner.cold(5, obs.device))
    g = generator(3)
    encoded = planner.encode(obs)
    direct = mppi.plan(
        planner.value(encoded, g), planner.candidates(encoded, g), torch.zeros(5, 3, 2),
        torch.full((5, 3, 2), 0.7), search, g,
    )  # fmt: skip
    modips = modips_plan(obs, *parts, cell, generator(3))
    for mine, plain, other in zip(found, direct, modips, strict=True):
        assert torch.equal(mine, plain)
        assert torch.equal(mine, other)


def test_a_planner_or_prior_that_has_diverged_says_so() -> None:
    for part in ("model", "prior"):
        agent = agent_of()
        with torch.no_grad():
            for p in getattr(agent, part).module.parameters():
                p.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="planned return is not finite"):
            agent.act(torch.randn(2, 4), generator(), explore=True)
        with pytest.raises(FloatingPointError, match="the policy has diverged"):
            agent.alone.sample(torch.randn(2, 4), generator())


# Acting: warm starts, noise, first steps.


def test_a_warm_start_is_the_last_plan_one_step_on_until_the_episode_ends() -> None:
    agent = shuffled(agent_of())
    g, obs = generator(1), torch.randn(2, 4)
    agent.act(obs, g, explore=True)
    cold = agent.planner.plan(obs, generator(1), torch.zeros(2, 3, 2))
    wanted = torch.cat([cold.mean[:, 1:], torch.zeros(2, 1, 2)], 1)
    assert torch.equal(agent.mean, wanted)
    assert torch.equal(agent.mean, following(cold.mean))

    chunk = agent.act(obs, generator(2), explore=True)
    plan = agent.planner.plan(obs, generator(2), wanted)
    assert torch.equal(agent.mean, following(plan.mean))
    g = generator(2)
    agent.planner.plan(obs, g, wanted)
    noise = torch.randn(2, 1, 2, generator=g)
    assert torch.equal(chunk, (plan.chunk[:, :1] + plan.std[:, :1] * noise).clamp(-1, 1))

    before = agent.mean
    ends = torch.tensor([[False], [True]])
    zeros, flags = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    for terminated, truncated in ((flags, flags), (flags, ends), (ends, flags)):
        agent.mean = before
        agent.observe(ChunkStep(obs[:, None], chunk, zeros, terminated, truncated, ~flags))
        assert torch.equal(agent.mean[0], before[0])
        over = bool((terminated | truncated)[1])
        assert torch.equal(agent.mean[1], torch.zeros(3, 2) if over else before[1])


@pytest.mark.parametrize("form", FORMS)
def test_random_actions_first_online_alone_and_offline_updates_with_demonstrations_alone(
    form: str,
) -> None:
    job: Any = tdmpc2_job(small_cell(FORMS[form]))
    agent = job.agent
    start = snapshot(agent.model.state_dict())
    if form == "demonstrations":
        assert agent.offline_left
        for _ in range(4):
            assert agent.offline_left
            assert job.advance()
            assert job.env_steps == 0
        assert not agent.offline_left
    else:
        assert not agent.offline_left
        while job.env_steps < 12:
            assert job.advance() == {}
            assert torch.equal(agent.mean, torch.zeros(2, 3, 2))
        assert differences(start, agent.model.state_dict()) == []
        action = agent.replay.window(torch.arange(6), 1).action
        assert action.abs().max() <= 1
        assert len(action.unique()) == action.numel()
    while job.advance() is not None:
        pass
    owed = 4 if form == "demonstrations" else 0
    assert agent.model.grad_steps == agent.prior.grad_steps == owed + 30
    assert job.grad_steps == agent.model.grad_steps


def test_demonstrations_enter_by_their_share_or_not_at_all() -> None:
    """Rows of the demonstrations are told by their rewards."""
    for form, share, wanted in (("demonstrations", 0.25, 4), ("online", 0.25, 0)):
        job: Any = tdmpc2_job(small_cell({**FORMS[form], "tdmpc2.offline_share": share}))
        job.agent.demos.table[:, -2] = 7.0
        while job.env_steps < 20:
            job.advance()
        window = job.agent._batch()
        assert window.obs.shape == (16, 4, 4)
        assert int((window.reward[:, 0] == 7.0).sum()) == wanted


def test_two_different_q_functions_are_asked() -> None:
    model, g = agent_of().model.module, generator()
    pairs = {tuple(sorted(model.two(g).tolist())) for _ in range(60)}
    assert pairs == {(0, 1), (0, 2), (1, 2)}


# The parameters.


KNOBS: dict[str, Any] = {
    "tdmpc2.data": "online",
    "tdmpc2.latent": {"latent_dim": 8, "encoder_width": 16, "width": 16, "ensemble": 3, "bins": 11},
    "tdmpc2.search.horizon": 2,
    "tdmpc2.offline_updates": 9, "tdmpc2.offline_share": 0.0, "tdmpc2.updates": 1.0, "tdmpc2.discount": 0.5,
    "tdmpc2.rho": 0.9, "tdmpc2.consistency_coef": 1.0, "tdmpc2.reward_coef": 2.0, "tdmpc2.value_coef": 2.0,
    "tdmpc2.end_coef": 0.1, "tdmpc2.entropy_coef": 1.0, "tdmpc2.bc_coef": 2.0, "tdmpc2.batch_size": 8,
    "tdmpc2.lr": 3e-4, "tdmpc2.encoder_rate": 1.0, "tdmpc2.grad_clip": 0.01, "tdmpc2.ema_decay": 0.1,
    "critics.reward_offset": -1.0, "critics.demos_end_well": True, "modip.env_steps": 40, "modip.num_envs": 3,
    "modip.episode_steps": 6,
}  # fmt: skip
SEARCH: dict[str, Any] = {
    "prior_samples": 2, "samples": 4, "iterations": 2, "elites": 2, "temperature": 0.01, "weighting": "standardised",
    "min_std": 1.0, "max_std": 0.2, "selection": "mean",
}  # fmt: skip


def actions(agent: TDMPC2) -> Tensor:
    return agent.policy(torch.randn(8, 4, generator=generator(9)), generator())


@pytest.fixture(scope="module")
def plain() -> Tensor:
    torch.manual_seed(0)
    return actions(run(small_cell(BRIEF)))


@pytest.mark.parametrize("knob", [*KNOBS, *(f"tdmpc2.search.{name}" for name in SEARCH)])
def test_every_knob_acts(knob: str, plain: Tensor) -> None:
    changes = {**BRIEF, knob: KNOBS.get(knob, SEARCH.get(knob.rpartition(".")[2]))}
    assert not torch.equal(actions(run(small_cell(changes))), plain)


def test_the_first_steps_number_acts() -> None:
    one, other = (actions(run(small_cell({**ONLINE, "tdmpc2.seed_steps": n}))) for n in (12, 20))
    assert not torch.equal(one, other)


def test_every_knob_is_here() -> None:
    turned = {knob.split(".")[1] for knob in KNOBS if knob.startswith("tdmpc2.")}
    # The range stays at its least in a run this short: `moved` and the prior's loss have tests of their own.
    assert turned | {"search", "seed_steps", "range_decay"} == set(TDMPC2Config.model_fields)
    assert {*SEARCH, "horizon"} == set(SearchConfig.model_fields)
    assert set(KNOBS["tdmpc2.latent"]) == set(LatentConfig.model_fields)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("steps", "envs"), [(60, 2), (61, 3), (31, 1)])
def test_the_budget_is_modips(form: str, steps: int, envs: int) -> None:
    changes = {"modip.env_steps": steps, "modip.num_envs": envs, "modip.final_env_steps": 0}
    agent = run(small_cell({**FORMS[form], **changes}))
    assert steps <= agent.env_steps < steps + envs


# What is saved.


def test_planner_and_prior_come_back_and_act(tmp_path: Path) -> None:
    agent = run(small_cell({"tdmpc2.search.selection": "mean"}))
    shuffled(agent)
    obs = torch.randn(5, 4)
    kinds = {"planner": LatentPlanner, "policy": LatentPolicy}
    for name, policy in agent.final.items():
        save_policy(tmp_path / name, policy, SPEC, {"seed": 0, "grad_steps": 1})
        found, spec = read_policy(tmp_path / name)
        assert isinstance(found, kinds[name])
        assert spec == SPEC
        assert found.settings == policy.settings
        assert differences(dict(policy.state_dict()), dict(found.state_dict())) == []
        wanted = policy.sample(obs, generator(3))[:, :1]
        assert torch.equal(modip.load_policy(tmp_path / name, seed=3).act(obs), wanted)
    assert torch.equal(
        wanted, agent.alone.sample(obs, generator(4))
    )  # the prior alone has no noise
    with pytest.raises(UserError, match="holds no diffusion policy"):
        read_diffusion(tmp_path / "planner")


def test_the_clone_is_not_used() -> None:
    """Of the policy that the pipeline hands over, only the dimensions and the normaliser matter."""
    cell = small_cell()
    parts = new_parts(cell, demonstrations(cell))
    before = snapshot(parts.policy.state_dict())
    torch.manual_seed(1)
    one: Any = tdmpc2_job(cell, parts=parts)
    while one.advance() is not None:
        pass
    assert differences(before, parts.policy.state_dict()) == []
    randomise(parts.policy.net)
    torch.manual_seed(1)
    two: Any = tdmpc2_job(cell, parts=parts)
    while two.advance() is not None:
        pass
    assert differences(one.state_dict(), two.state_dict()) == []


# It learns.


LEARNS: dict[str, Any] = {
    "diffusion.width": 48, "diffusion.blocks": 2, "diffusion.updates": 400, "diffusion.batch_size": 64,
    "diffusion.lr": 2e-3, "diffusion.ema_decay": 0.98,
    "modip.env_steps": 600, "modip.final_env_steps": 0, "modip.num_envs": 4,
    "tdmpc2.latent": {"latent_dim": 32, "encoder_width": 48, "width": 48, "ensemble": 3, "bins": 51},
    "tdmpc2.search.horizon": 2, "tdmpc2.search.prior_samples": 8, "tdmpc2.search.samples": 40, "tdmpc2.search.iterations": 2,
    "tdmpc2.search.elites": 8, "tdmpc2.search.temperature": 0.5,
    "tdmpc2.offline_updates": 500, "tdmpc2.offline_share": 0.5, "tdmpc2.updates": 1.5, "tdmpc2.discount": 0.9,
    "tdmpc2.batch_size": 64, "tdmpc2.lr": 3e-3, "tdmpc2.ema_decay": 0.95, "tdmpc2.seed_steps": 200, "tdmpc2.bc_coef": 2.0,
}  # fmt: skip


class Returns(NamedTuple):
    """On the same 50 starts."""

    clone: float  # of the same demonstrations, by the diffusion policy
    untrained: float
    planner: float


def improvement(env: BatchedEnv, form: str, *, informative: bool) -> Returns:
    cell = small_cell({**LEARNS, **FORMS[form]})
    demos = demonstrations(cell, 40)
    clone = BC(
        new_parts(cell, demos).policy, cell, demos, num_updates=400, lr=cell.diffusion.lr, seed=0
    )
    fit = Fit(clone)
    while fit.advance() is not None:
        pass
    if not informative:
        order = torch.randperm(len(demos.table), generator=generator())
        demos.table[:, -2] = demos.table[order, -2]
    agent = TDMPC2(clone.learner.ema, cell, demos, seed=0)
    untrained = mean_return(agent.policy)
    job = interaction(cell, agent, 0, env)
    while job.advance() is not None:
        pass
    return Returns(mean_return(clone.policy), untrained, mean_return(agent.policy))


@pytest.mark.learn
def test_with_demonstrations_it_becomes_better_than_their_clone() -> None:
    found = improvement(BatchedEnv(toy.ENV_ID, 4), "demonstrations", informative=True)
    assert found.planner > found.clone + MARGIN


@pytest.mark.learn
def test_online_it_learns_from_nothing() -> None:
    found = improvement(BatchedEnv(toy.ENV_ID, 4), "online", informative=True)
    assert found.planner > found.untrained + 8.0


@pytest.mark.learn
def test_from_rewards_that_say_nothing_there_is_nothing_to_gain() -> None:
    found = improvement(Noisy(toy.ENV_ID, 4), "demonstrations", informative=False)
    assert found.planner < found.clone
