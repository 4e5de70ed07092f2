"""DQL: the losses against plain loops, the gradient through the chain, what is cloned, the targets, what is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modip
from modip.agents.dql import DQL, q_target, q_term, resampled
from modip.artifacts import read_policy, save_policy
from modip.config import Cell, DQLConfig, RankingConfig
from modip.diffusion import DiffusionPolicy
from modip.envs import BatchedEnv, toy
from modip.errors import UserError
from modip.ranking import RankedPolicy
from modip.types import ChunkStep, Window
from tests.agents.test_learning import MARGIN, Noisy, mean_return
from tests.helpers import (
    BRIEF,
    SMALL,
    SPEC,
    cloned,
    demonstrations,
    differences,
    dql_job,
    generator,
    interaction,
    new_parts,
    small_cell,
    snapshot,
)

RANKING = SMALL["dql"]["ranking"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Observations and fresh weights of each test are the same in every run."""
    torch.manual_seed(0)


def run(cell: Cell, seed: int = 0) -> DQL:
    job: Any = dql_job(cell, seed)
    while job.advance() is not None:
        pass
    agent: DQL = job.agent
    return agent


def randomise(module: nn.Module) -> None:
    """Weights far from their start, so that nothing is near 0 by chance."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator(5)))


def fresh(changes: dict[str, Any] | None = None) -> DQL:
    """Before any update, with policy, critics and both averages anywhere."""
    agent: Any = dql_job(small_cell(changes)).agent
    for learner in (agent.policy_learner, agent.critics):
        randomise(learner.module)
        randomise(learner.ema)
    with torch.no_grad():  # predictions inside [-1, 1], where no clip stops the gradient
        for net in (agent.policy_learner.module.net, agent.policy_learner.ema.net):
            net.out.weight.mul_(0.1)
            net.out.bias.mul_(0.1)
    assert isinstance(agent, DQL)
    return agent


# The losses.


def test_the_losses_are_the_papers() -> None:
    q = torch.tensor([[1.0, 5.0, -2.0], [3.0, -4.0, -1.0]], requires_grad=True)
    loss = q_term(q)
    magnitude = (3.0 + 4.0 + 1.0) / 3
    assert float(loss.detach()) == pytest.approx(-(1.0 + 5.0 - 2.0) / 3 / magnitude)
    (gradient,) = torch.autograd.grad(loss, q)
    assert gradient.tolist() == [pytest.approx([-1 / 3 / magnitude] * 3), [0.0] * 3]
    scaled = q_term(100 * q)  # in units of the values: rewards of any size need no other eta
    torch.testing.assert_close(scaled, loss)

    reward, discount = [1.0, 2.0], [0.81, 0.0]
    next_q = torch.tensor([[[1.0, 7.0], [3.0, 2.0]], [[5.0, 4.0], [0.0, 9.0]]])
    wanted = [
        r + d * min(max(critic[i].tolist()) for critic in next_q)
        for i, (r, d) in enumerate(zip(reward, discount, strict=True))
    ]
    found = q_target(torch.tensor(reward), torch.tensor(discount), next_q)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_the_critics_change_places_half_of_the_time() -> None:
    agent = fresh()
    window = agent.demos.window(torch.arange(16), 4)
    policy, critics, executed = agent.policy_learner.module, agent.critics.module, 4
    first = 0
    for i in range(40):
        agent.generator.manual_seed(i)
        _, found = agent._policy_losses(window)
        agent.generator.manual_seed(i)
        policy.loss(window.obs[:, 0], window.action, window.mask, agent.generator)
        chunk = policy.sample(window.obs[:, 0], agent.generator).flatten(1)[:, :executed]
        one, two = critics(window.obs[:, 0], chunk).tolist()
        orders = [
            -(sum(a) / 16) / (sum(abs(value) for value in b) / 16)
            for a, b in ((one, two), (two, one))
        ]
        near = [math.isclose(float(found.detach()), value, rel_tol=1e-4) for value in orders]
        assert sum(near) == 1, (orders, found)
        first += near[0]
    assert 10 <= first <= 30


def test_the_gradient_reaches_the_network_through_the_whole_chain() -> None:
    """Against finite differences of the same chain, of the same noise; and each step of it contributes."""
    agent = fresh({"dql.sampling_steps": 3})
    policy = agent.policy_learner.module.double()
    critics = agent.critics.module.double()
    obs = agent.demos.table[:16, :4].double()
    torch.set_default_dtype(torch.float64)
    try:

        def loss() -> Tensor:
            chunk = policy.sample_with_gradient(obs, generator(3))
            return q_term(critics(obs, chunk[:, :2].flatten(1)))

        base = loss()
        weights = [policy.net.inp.weight, policy.net.ups[0].weight, policy.net.time.weight]
        gradients = torch.autograd.grad(base, weights)
        magnitude = (
            critics(obs, policy.sample(obs, generator(3))[:, :2].flatten(1))[-1].abs().mean()
        )
        # The rows of the denoising steps that the chain visits, and no others.
        visited = gradients[2].abs().sum(1) > 1e-12
        assert visited.nonzero().flatten().tolist() == sorted(row[0] for row in policy._schedule)
        assert int(visited.sum()) == 3
        for weight, gradient in zip(weights, gradients, strict=True):
            direction = torch.randn(weight.shape, generator=generator(4))
            sides = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    weight.add_(direction, alpha=sign * 1e-6)
                    chunk = policy.sample(obs, generator(3))
                    # The magnitude has no gradient: it stays as it was.
                    sides.append(
                        float(-critics(obs, chunk[:, :2].flatten(1))[0].mean() / magnitude)
                    )
                    weight.sub_(direction, alpha=sign * 1e-6)
            slope = (sides[0] - sides[1]) / 2e-6
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4)
            assert abs(slope) > 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


def test_critics_do_not_learn_from_the_policys_loss() -> None:
    agent = fresh()
    window = agent.demos.window(torch.arange(16), 4)
    denoising, term = agent._policy_losses(window)
    (denoising + term).backward()
    assert all(p.grad is None and p.requires_grad for p in agent.critics.module.parameters())
    assert all(p.grad is not None for p in agent.policy_learner.module.parameters())


# What is cloned.


def test_the_denoising_loss_is_that_of_the_datas_chunks() -> None:
    """Not of the sampled ones, the trap: plain cloning of the window, masks included, where eta is 0."""
    agent = fresh({"dql.eta": 0.0})
    window = agent.demos.window(torch.tensor([0, 5, 18, 19]), 4)
    assert window.mask.sum() < 16  # two of them reach past an end
    state = agent.generator.get_state()
    found, _ = agent._policy_losses(window)
    policy = agent.policy_learner.module
    agent.generator.set_state(state)
    wanted = policy.loss(window.obs[:, 0], window.action, window.mask, agent.generator)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    agent.generator.set_state(state)
    sampled = policy.sample(window.obs[:, 0], generator())
    trap = policy.loss(window.obs[:, 0], sampled, window.mask, agent.generator)
    assert not torch.isclose(found, trap, rtol=0.1)


def test_without_the_q_term_it_clones() -> None:
    """Demonstrations of one action: the policy comes to it, from wherever it was. A policy tied to itself stays."""
    cell = small_cell({
        "dql.eta": 0.0, "dql.offline_updates": 200, "dql.updates": 0.0, "dql.policy_lr": 1e-2, "dql.critic_lr": 1e-6,
    })  # fmt: skip
    demos = demonstrations(cell)
    demos.table[:, 4:6] = torch.tensor([0.5, -0.25])
    agent = DQL(new_parts(cell, demos).policy, cell, demos, seed=0)
    obs = demos.table[:8, :4]
    wanted = torch.tensor([0.5, -0.25]).expand(8, 2, 2)
    assert (agent.policy(obs, generator()) - wanted).abs().mean() > 0.2
    while agent.update():
        pass
    torch.testing.assert_close(agent.policy(obs, generator()), wanted, rtol=0, atol=0.1)


def test_the_q_term_climbs_the_critics() -> None:
    """The same weights and batches: with a large eta the critics prefer what the policy becomes."""
    values = []
    for eta in (0.0, 10.0):
        cell = small_cell({
            "dql.eta": eta, "dql.offline_updates": 60, "dql.updates": 0.0, "dql.policy_lr": 1e-2, "dql.critic_lr": 1e-9,
        })  # fmt: skip
        agent: Any = dql_job(cell).agent
        while agent.update():
            pass
        obs = agent.demos.table[:64, :4]
        values.append(float(agent.critics.ema(obs, agent.policy(obs, generator()).flatten(1)).mean()))  # fmt: skip
    assert values[1] > values[0] + 0.1


# The targets.


@pytest.mark.parametrize("samples", [1, 3])
def test_td_is_that_of_chunks_right_at_ends_and_cuts(samples: int) -> None:
    """Row by row: three-step rewards, the value after them; none after an end; at a cut from the last row seen."""
    agent = fresh({"chunk.act_steps": 3, "dql.backup_samples": samples})
    g = generator(2)
    obs, action = torch.randn(5, 5, 4, generator=g), torch.rand(5, 5, 2, generator=g)
    reward = torch.randn(5, 5, generator=g)
    # Whole; ended by its second step; by its first; cut after its third step; and after its second, when a part of the
    # chunk was not executed: it has no target.
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])  # fmt: skip
    terminated = torch.zeros(5, 5)
    terminated[1, 1:] = terminated[2] = 1.0
    state = agent.generator.get_state()
    found, _ = agent._td_loss(Window(obs, action, reward, terminated, mask.float()))

    r, d = reward.tolist(), agent.config.discount
    next_obs = torch.stack([obs[i, row] for i, row in enumerate([3, 1, 0, 2, 1])])
    agent.generator.set_state(state)
    repeated = next_obs.repeat_interleave(samples, 0)
    chunk = agent.policy_learner.ema.sample(repeated, agent.generator)[:, :3].reshape(-1, 6)
    with torch.no_grad():
        next_q = agent.critics.ema(repeated, chunk).tolist()
        q = agent.critics.module(obs[:, 0], action[:, :3].reshape(5, 6))
    value = [
        min(max(member[i * samples : (i + 1) * samples]) for member in next_q) for i in range(5)
    ]
    target = {
        0: r[0][0] + d * r[0][1] + d**2 * r[0][2] + d**3 * value[0],
        1: r[1][0] + d * r[1][1],
        2: r[2][0],
        3: r[3][0] + d * r[3][1] + d**2 * value[3],
    }
    scale = float(agent.critics.module.scale)
    errors = [((float(q[e, i]) - y) / scale) ** 2 for i, y in target.items() for e in range(2)]
    assert float(found.detach()) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_rewards_carry_their_offset() -> None:
    agent: Any = dql_job(small_cell({"critics.reward_offset": -1.5})).agent
    flag = torch.zeros(2, 2, dtype=torch.bool)
    reward = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    agent.observe(ChunkStep(torch.zeros(2, 2, 4), torch.zeros(2, 2, 2), reward, flag, flag, ~flag))
    assert agent.replay.window(torch.tensor([0]), 2).reward.tolist() == [[-0.5, 0.5]]


# What acts.


def test_the_policy_is_the_clone_sampled_in_fewer_steps() -> None:
    cell = small_cell({"diffusion.denoising_steps": 6, "diffusion.sampling_steps": 6})
    parts = new_parts(cell, demonstrations(cell))
    randomise(parts.policy)
    agent = DQL(parts.policy, cell, demonstrations(cell), seed=0)
    it = agent.policy_learner.ema
    assert differences(parts.policy.state_dict(), it.state_dict()) == []
    assert (it.config.sampling_steps, len(it._schedule)) == (2, 2)
    obs = torch.randn(3, 4)
    assert not torch.equal(it.sample(obs, generator()), parts.policy.sample(obs, generator()))
    same = resampled(parts.policy, 6)
    assert torch.equal(same.sample(obs, generator()), parts.policy.sample(obs, generator()))
    with pytest.raises(UserError, match="sampling_steps 7 exceeds diffusion.denoising_steps 6"):
        small_cell({"dql.sampling_steps": 7})


def test_it_draws_by_the_softmax_of_the_smaller_averaged_q() -> None:
    agent = fresh()
    agent.critics.ema.scale.mul_(8.0)  # far enough apart
    obs = torch.randn(2000, 4)
    repeated, drawn = obs.repeat_interleave(4, 0), agent.ranked.sample(obs, generator(1))
    chunk = agent.policy_learner.ema.sample(repeated, generator(1))
    same = (chunk.view(2000, 4, 4, 2) == drawn.unsqueeze(1)).flatten(2).all(2)
    assert same.sum(1).tolist() == [1] * 2000
    with torch.no_grad():
        one, two = agent.critics.ema(repeated, chunk[:, :2].flatten(1)).tolist()
    smaller = [min(pair) for pair in zip(one, two, strict=True)]
    probability: list[float] = []
    for i in range(0, 8000, 4):
        total = sum(math.exp(value - smaller[i]) for value in smaller[i : i + 4])
        probability += [math.exp(value - smaller[i]) / total for value in smaller[i : i + 4]]
    order = sorted(range(8000), key=probability.__getitem__)
    wanted, found = [], []
    for group in range(0, 8000, 1000):
        wanted.append(sum(probability[i] for i in order[group : group + 1000]) / 1000)
        found.append(float(same.flatten()[order[group : group + 1000]].float().mean()))
    assert wanted[0] < 0.15 < 0.4 < wanted[-1]
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / 1000))


def test_what_acts_follows_every_update_and_a_resumption() -> None:
    agent = run(small_cell())
    obs = torch.randn(5, 4)
    ranked = RankedPolicy.over(agent.policy_learner.ema, agent.critics.ema, agent.config.ranking)
    wanted = ranked.sample(obs, generator())[:, :2]
    assert torch.equal(agent.act(obs, generator(), explore=True), wanted)
    other: Any = dql_job(small_cell(), seed=1).agent
    assert not torch.equal(other.act(obs, generator(), explore=True), wanted)
    other.load_state_dict(snapshot(agent.state_dict()))
    assert torch.equal(other.act(obs, generator(), explore=True), wanted)
    assert torch.equal(other.policy(obs, generator()), agent.policy(obs, generator()))


def test_both_policies_come_back_as_they_were(tmp_path: Path) -> None:
    agent = run(small_cell())
    obs = torch.randn(5, 4)
    for name, act in (("policy", agent.policy), ("ranked", agent.ranked.sample)):
        made = agent.final[name]
        save_policy(tmp_path / name, made, SPEC, {"seed": 0, "grad_steps": 1})
        policy, _ = read_policy(tmp_path / name)
        assert type(policy) is type(made)
        assert differences(made.state_dict(), policy.state_dict()) == []
        wanted = act(obs, generator(3))[:, :2]
        assert torch.equal(modip.load_policy(tmp_path / name, seed=3).act(obs), wanted)
    assert type(agent.final["policy"]) is DiffusionPolicy


# Offline, then online.


def test_it_prepares_without_an_environment_step() -> None:
    cell = small_cell({"dql.offline_updates": 9})
    job: Any = dql_job(cell)
    agent = job.agent
    for done in range(9):
        assert job.offline_left == 9 - done
        assert job.advance()
        assert (agent.critics.grad_steps, job.env_steps) == (done + 1, 0)
        assert agent.policy_learner.grad_steps == max(0, done + 1 - 2)  # warm-up
    assert not job.offline_left
    assert job.advance() == {}
    assert job.env_steps == 4
    assert not job.offline_left


def test_demonstrations_stay_in_the_batches() -> None:
    """A share of them; all, before there is anything else."""
    seen: list[int] = []

    class Watched(DQL):
        def _td_loss(self, window: Window) -> tuple[Tensor, Tensor]:
            demos = {tuple(row) for row in self.demos.table[:, :4].tolist()}
            seen.append(sum(tuple(row) in demos for row in window.obs[:, 0].tolist()))
            return super()._td_loss(window)

    cell = small_cell({"dql.offline_share": 0.25})
    demos = demonstrations(cell)
    job = interaction(cell, Watched(new_parts(cell, demos).policy, cell, demos, seed=0), 0)
    while job.advance() is not None:
        pass
    assert seen[:6] == [16] * 6
    assert set(seen[6:]) == {4}


@pytest.mark.parametrize(("steps", "envs", "updates"), [(60, 2, 1.0), (61, 3, 0.7), (31, 1, 0.3)])
def test_the_budget_is_modips(steps: int, envs: int, updates: float) -> None:
    changes = {"modip.env_steps": steps, "modip.num_envs": envs, "modip.final_env_steps": 0, "dql.updates": updates}  # fmt: skip
    agent = run(small_cell(changes))
    assert steps <= agent.env_steps < steps + 2 * envs
    for learner, offline in ((agent.policy_learner, 4), (agent.critics, 6)):
        assert abs(learner.grad_steps - offline - updates * agent.env_steps) <= 1


# The parameters.


KNOBS: dict[str, Any] = {
    "dql.ranking.ensemble": 3, "dql.ranking.width": 8, "dql.ranking.layers": 2, "dql.ranking.value": "mean",
    "dql.ranking.candidates": 3, "dql.ranking.keep": 1, "dql.ranking.temperature": 0.0,
    "dql.ranking.ascent_steps": (2, {"dql.ranking.ascent_size": 0.1}),
    "dql.ranking.ascent_size": (0.2, {"dql.ranking.ascent_steps": 2}),
    "dql.sampling_steps": 3, "dql.eta": 0.1, "dql.backup_samples": 2, "dql.offline_updates": 8, "dql.warmup_updates": 5, "dql.updates": 0.8,
    "dql.offline_share": 0.25, "dql.discount": 0.8, "dql.batch_size": 8, "dql.policy_lr": 3e-4, "dql.critic_lr": 3e-4,
    "dql.grad_clip": 0.01, "dql.ema_decay": 0.5, "critics.reward_offset": -1.0, "critics.demos_end_well": True,
    "modip.env_steps": 40, "modip.num_envs": 3, "modip.episode_steps": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return chunks(run(small_cell(BRIEF)))


def chunks(agent: DQL) -> Tensor:
    return agent.act(torch.randn(64, 4, generator=generator(9)), generator(), explore=False)


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_acts(knob: str, plain: Tensor) -> None:
    value, others = KNOBS[knob] if isinstance(KNOBS[knob], tuple) else (KNOBS[knob], {})
    assert not torch.equal(chunks(run(small_cell({**BRIEF, knob: value, **others}))), plain)


def test_every_knob_is_here() -> None:
    turned = {knob.split(".", 1)[1] for knob in KNOBS if knob.startswith("dql.")}
    fields = set(DQLConfig.model_fields) - {"ranking"}
    assert turned == fields | {f"ranking.{field}" for field in RankingConfig.model_fields}


# It learns.


LEARNS: dict[str, Any] = {
    "diffusion.width": 48, "diffusion.blocks": 2, "diffusion.updates": 400, "diffusion.batch_size": 64,
    "diffusion.lr": 2e-3, "diffusion.ema_decay": 0.98,
    "modip.env_steps": 800, "modip.final_env_steps": 0, "modip.num_envs": 4,
    "dql.ranking": {**RANKING, "width": 48, "layers": 2, "candidates": 16, "keep": 16},
    "dql.sampling_steps": 3, "dql.offline_updates": 200, "dql.warmup_updates": 100, "dql.updates": 0.3, "dql.batch_size": 64,
    "dql.policy_lr": 1e-3, "dql.critic_lr": 3e-3, "dql.ema_decay": 0.98,
}  # fmt: skip


def improvement(seed: int, env: BatchedEnv, *, informative: bool) -> tuple[float, float, float]:
    """Mean returns on the same 50 starts: of the clone, of what became of it alone, and with its critics' choice."""
    cell = small_cell(LEARNS)
    demos, clone = cloned(cell, seed, informative=informative)
    agent = DQL(clone.learner.ema.requires_grad_(True), cell, demos, seed=seed)
    before = mean_return(clone.policy)
    job = interaction(cell, agent, seed, env)
    while job.advance() is not None:
        pass
    ranked = lambda obs, g: agent.act(obs, g, explore=False)  # noqa: E731
    return before, mean_return(agent.policy), mean_return(ranked)


@pytest.mark.learn
def test_it_becomes_better_than_the_clone() -> None:
    before, alone, ranked = improvement(0, BatchedEnv(toy.ENV_ID, 4), informative=True)
    assert alone > before + MARGIN
    assert ranked > before + MARGIN


@pytest.mark.learn
def test_from_rewards_that_say_nothing_there_is_nothing_to_gain() -> None:
    before, alone, ranked = improvement(0, Noisy(toy.ENV_ID, 4), informative=False)
    assert alone < before + MARGIN
    assert ranked < before + MARGIN
