"""PA-RL: the losses against plain loops, whose chunks teach and bootstrap, best-of-N, the knobs, and that it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modip.agents.parl import (
    PARL,
    UNBOUNDED,
    Lesson,
    conservative_loss,
    subsampled_min,
    value_loss,
)
from modip.chunk_critics import ChunkBatch
from modip.config import Cell, PARLConfig
from modip.critics import returns_to_go
from modip.envs import BatchedEnv, toy
from modip.errors import UserError
from modip.types import ChunkStep
from tests.agents.test_learning import MARGIN, Noisy, mean_return
from tests.helpers import (
    BRIEF,
    cloned,
    differences,
    generator,
    interaction,
    parl_job,
    small_cell,
    snapshot,
)

IQL = {"parl.critic": "iql"}
VARIANTS: dict[str, dict[str, Any]] = {"calql": {}, "iql": IQL}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Observations and fresh weights of each test are the same in every run."""
    torch.manual_seed(0)


def run(cell: Cell, seed: int = 0) -> PARL:
    job: Any = parl_job(cell, seed)
    while job.advance() is not None:
        pass
    agent: PARL = job.agent
    return agent


def randomise(*modules: nn.Module) -> None:
    """Weights far from their start, so that nothing is near 0 by chance."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator(5)))


def agent_of(changes: dict[str, Any] | None = None) -> PARL:
    """Before its first update, with weights at random."""
    agent = untouched(changes)
    for learner in (agent.critics, agent.value, agent.policy_learner):
        randomise(learner.module, learner.ema)
    return agent


def untouched(changes: dict[str, Any] | None = None) -> PARL:
    """Before its first update, as it was cloned."""
    agent: PARL = parl_job(small_cell(changes)).agent  # type: ignore[assignment]
    return agent


# The losses.


def test_the_smallest_of_a_random_few_counts() -> None:
    q = torch.tensor([[1.0, 6.0], [2.0, 5.0], [3.0, 4.0]])
    pairs = {(1.0, 5.0), (1.0, 4.0), (2.0, 4.0)}
    seen = {tuple(subsampled_min(q, 2, generator(seed)).tolist()) for seed in range(30)}
    assert seen == pairs
    assert subsampled_min(q, 3, generator()).tolist() == [1.0, 4.0]


def test_the_conservative_term_is_bounded_by_the_returns_that_were_seen() -> None:
    g = generator(1)
    random_q, policy_q = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 2, generator=g)
    data_q = torch.randn(2, 3, generator=g)
    bound, weight = torch.tensor([0.2, UNBOUNDED, 5.0]), [1.0, 1.0, 0.0]
    found = conservative_loss(random_q, policy_q, data_q, bound, torch.tensor(weight))
    total = 0.0
    for e in range(2):
        for b in range(3):
            policy = [max(v, float(bound[b])) for v in policy_q[e, b].tolist()]
            pushed = math.log(sum(math.exp(v) for v in [*random_q[e, b].tolist(), *policy]))
            total += weight[b] * (pushed - float(data_q[e, b]))
    assert float(found) == pytest.approx(total / (2 * 2), rel=1e-5)


def test_below_the_bound_nothing_pushes_the_policys_chunks() -> None:
    random_q = torch.zeros(1, 2, 3, requires_grad=True)
    policy_q = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]], requires_grad=True)
    data_q = torch.zeros(1, 2, requires_grad=True)
    bound = torch.tensor([0.0, UNBOUNDED])
    conservative_loss(random_q, policy_q, data_q, bound, torch.ones(2)).backward()
    assert random_q.grad is not None
    assert policy_q.grad is not None
    assert data_q.grad is not None
    assert (random_q.grad > 0).all()
    assert (policy_q.grad[0] > 0).tolist() == [[True, False], [True, True]]
    assert (data_q.grad < 0).all()


def test_the_value_learns_an_expectile() -> None:
    v, q, weight = [0.0, 1.0, 2.0], [1.0, -1.0, 9.0], [1.0, 1.0, 0.0]
    found = value_loss(torch.tensor(v), torch.tensor(q), 0.7, torch.tensor(weight))
    # Too low by 1, at 0.7; too high by 2, at 0.3.
    assert float(found) == pytest.approx((0.7 * 1.0 + 0.3 * 4.0) / 2)


# What the critics learn.


def lesson(agent: PARL) -> Lesson:
    g = generator(2)
    size, n = agent.config.batch_size, agent.config.conservative.policy_chunks
    ends = torch.zeros(size)
    ends[::3] = 1.0
    batch = ChunkBatch(
        torch.randn(size, 4, generator=g), torch.rand(size, 4, generator=g), torch.randn(size, generator=g),
        0.81 * (1.0 - ends), torch.randn(size, 4, generator=g), (torch.arange(size) % 5 > 0).float(),
    )  # fmt: skip
    bound = torch.where(torch.arange(size) % 2 == 0, 1.0, UNBOUNDED)
    proposed = torch.rand(size, n, 4, generator=g) * 2 - 1
    return Lesson(batch, bound, proposed, torch.rand(size, 4, 2, generator=g) * 2 - 1)


def losses(agent: PARL, monkeypatch: pytest.MonkeyPatch, *learners: str) -> dict[str, float]:
    """The losses that the next update would take a step with."""
    seen = {}

    def catch(name: str) -> Callable[[Tensor], None]:
        return lambda loss: seen.__setitem__(name, float(loss.detach()))

    for name in learners:
        monkeypatch.setattr(getattr(agent, name), "step", catch(name))
    assert agent.update()
    return seen


def test_calql_bootstraps_from_improved_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: reward and the smallest of a few averaged critics at the improved chunk's executed part."""
    agent = agent_of({"parl.conservative.weight": 0.0})
    given = lesson(agent)
    monkeypatch.setattr(agent, "_prepare", lambda: None)
    monkeypatch.setattr(agent, "_lessons", lambda: given)
    state = agent.generator.get_state()
    found = losses(agent, monkeypatch, "critics")["critics"]
    agent.generator.set_state(state)
    batch = given.batch
    with torch.no_grad():
        q = agent.critics.module(batch.obs, batch.chunk)
        following = agent.critics.ema(batch.next_obs, given.improved[:, :2].reshape(-1, 4))
    members = torch.randperm(3, generator=agent.generator)[:2].tolist()
    scale = float(agent.critics.module.scale)
    errors = []
    for i in range(len(q[0])):
        worst = min(float(following[e, i]) for e in members)
        y = float(batch.reward[i]) + float(batch.discount[i]) * worst
        if batch.weight[i]:
            errors += [((float(q[e, i]) - y) / scale) ** 2 for e in range(3)]
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_conservative_term_is_of_random_and_proposed_chunks_in_units_of_the_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = agent_of()
    given, critics = lesson(agent), agent.critics.module
    state = agent.generator.get_state()
    found = float(agent._conservative(given).detach())
    agent.generator.set_state(state)
    states = agent.config.conservative.states
    uniform = torch.rand(states, 3, 4, generator=agent.generator) * 2 - 1
    total, count = 0.0, 0.0
    mean, scale = float(critics.mean), float(critics.scale)
    for i in range(states):
        obs = given.batch.obs[i : i + 1]

        def q(chunk: Tensor, obs: Tensor = obs) -> list[float]:
            return [(v - mean) / scale for v in critics(obs, chunk.unsqueeze(0))[:, 0].tolist()]

        bound = (float(given.bound[i]) - mean) / scale
        for e in range(3):
            low = [q(chunk)[e] for chunk in uniform[i]]
            low += [max(bound, q(chunk)[e]) for chunk in given.proposed[i]]
            pushed = math.log(sum(math.exp(v) for v in low))
            total += float(given.batch.weight[i]) * (pushed - q(given.batch.chunk[i])[e])
        count += float(given.batch.weight[i])
    assert found == pytest.approx(total / (3 * count), rel=1e-3, abs=1e-4)
    # And it enters with its weight.
    monkeypatch.setattr(agent, "_prepare", lambda: None)
    monkeypatch.setattr(agent, "_lessons", lambda: given)
    agent.generator.set_state(state)
    whole = losses(agent, monkeypatch, "critics")["critics"]
    assert whole > 0


def test_iql_bootstraps_from_the_value_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(IQL)
    batch = lesson(agent).batch
    monkeypatch.setattr(agent, "_transitions", lambda size: (batch, torch.zeros(size)))
    state = agent.generator.get_state()
    found = losses(agent, monkeypatch, "critics", "value")
    agent.generator.set_state(state)
    members = torch.randperm(3, generator=agent.generator)[:2].tolist()
    none = batch.chunk[:, :0]
    with torch.no_grad():
        q, target = (c(batch.obs, batch.chunk) for c in (agent.critics.module, agent.critics.ema))
        v, following = (
            agent.value.module(batch.obs, none)[0],
            agent.value.ema(batch.next_obs, none)[0],
        )
    scale = float(agent.critics.module.scale)
    q_errors, v_errors = [], []
    for i in range(len(v)):
        if not batch.weight[i]:
            continue
        y = float(batch.reward[i]) + float(batch.discount[i]) * float(following[i])
        q_errors += [((float(q[e, i]) - y) / scale) ** 2 for e in range(3)]
        error = (min(float(target[e, i]) for e in members) - float(v[i])) / scale
        v_errors.append((0.7 if error > 0 else 0.3) * error**2)
    assert found["critics"] == pytest.approx(sum(q_errors) / len(q_errors), rel=1e-4)
    assert found["value"] == pytest.approx(sum(v_errors) / len(v_errors), rel=1e-4)


# Lessons.


def test_a_lesson_comes_out_of_the_pool_as_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of({"parl.pool": 16})
    state = agent.generator.get_state()
    agent._prepare()
    assert agent.lessons == 16
    agent.generator.set_state(state)
    batch, bound = agent._transitions(16)
    proposed = agent.ranked.propose(batch.next_obs, agent.generator)
    improved = agent.ranked.improve(batch.next_obs, proposed, agent.generator)
    found = agent._unpack(agent.pool)
    for one, two in zip(found.batch, batch, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(found.bound, bound)
    assert torch.equal(found.proposed, proposed[:, :2, :4])
    assert torch.equal(found.improved, improved)
    # Then so many more per update, over the oldest.
    before = agent.pool.clone()
    agent._prepare()
    changed = (agent.pool != before).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 12
    assert agent.lessons == 20


def test_the_policy_learns_improved_chunks_by_its_own_denoising_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = agent_of()
    given = lesson(agent)
    monkeypatch.setattr(agent, "_lessons", lambda: given)
    agent.due = {"critic": 0.0, "policy": 1.0}
    state = agent.generator.get_state()
    found = losses(agent, monkeypatch, "policy_learner")["policy_learner"]
    agent.generator.set_state(state)
    policy, x0 = agent.policy_learner.module, given.improved.flatten(1)
    step = torch.randint(6, (16,), generator=agent.generator)
    eps = torch.randn(x0.shape, generator=agent.generator)
    total = 0.0
    for i in range(16):
        a = float(policy.alpha_bar[step[i]])
        noisy = math.sqrt(a) * x0[i : i + 1] + math.sqrt(1 - a) * eps[i : i + 1]
        obs = policy.normalizer(given.batch.next_obs[i : i + 1])
        out = policy.net(noisy, int(step[i]), policy.net.condition(obs))
        total += float((out - x0[i]).detach().square().mean())
    assert found == pytest.approx(total / 16, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_it_learns_is_better_by_its_critics_than_what_it_was(variant: str) -> None:
    agent = agent_of(VARIANTS[variant])
    batch, _ = agent._transitions(32)
    obs = batch.next_obs
    proposed = agent.ranked.propose(obs, generator())
    improved = agent.ranked.improve(obs, proposed, generator())
    value = agent.ranked.value(obs)
    assert value(improved[:, :2].reshape(32, 1, 4)).mean() > value(proposed[..., :4]).mean(1).mean()


def test_returns_bound_q_where_they_were_seen() -> None:
    """Of demonstrations, and of episodes that are over; a running one has none."""
    agent = agent_of({"modip.num_envs": 2})
    demos = agent.demos
    assert torch.equal(agent.demo_bound, returns_to_go(demos.table[:, -2], demos.end, 0.9))
    reward = torch.tensor([[1.0, 2.0], [5.0, 7.0]])
    ended = torch.tensor([[False, True], [False, False]])
    no = torch.zeros_like(ended)
    parts = (torch.randn(2, 2, 4), torch.rand(2, 2, 2), reward)
    agent.observe(ChunkStep(*parts, no, no, ~no))
    assert (agent.bound == UNBOUNDED).all()
    agent.observe(ChunkStep(*parts, no, ended, ~no))
    first = [1 + 0.9 * (2 + 0.9 * (1 + 0.9 * 2)), 2 + 0.9 * (1 + 0.9 * 2), 1 + 0.9 * 2, 2.0]
    torch.testing.assert_close(agent.bound[:4], torch.tensor(first))
    assert (agent.bound[4:] == UNBOUNDED).all()


def test_an_end_is_known_after_a_resume() -> None:
    job: Any = parl_job(small_cell())
    while job.advance() is not None:
        pass
    assert (job.agent.bound > UNBOUNDED).any()
    other: Any = parl_job(small_cell(), seed=3).agent
    other.load_state_dict(snapshot(job.agent.state_dict()))
    assert torch.equal(other.bound, job.agent.bound)


# Acting.


def test_without_ascent_and_temperature_it_acts_by_the_best_of_n() -> None:
    changes = {"parl.ranking.ascent_steps": 0, "parl.ranking.temperature": 0.0}
    start = copy.deepcopy(untouched(changes).policy_learner.ema)
    agent = agent_of(changes)
    obs = torch.randn(5, 4)
    clone, critics = start, agent.critics.ema
    own = clone.sample(obs.repeat_interleave(4, 0), generator(3)).view(5, 4, 4, 2)[:, :, :2]
    found = agent.act(obs, generator(3), explore=True)
    for b in range(5):
        worth = [float(critics(obs[b : b + 1], c.reshape(1, 4)).mean()) for c in own[b]]
        assert torch.equal(found[b], own[b, worth.index(max(worth))])


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_acts_by_the_critics_average_as_it_stands(variant: str) -> None:
    """Not by a copy from the start; and the clone proposes, whatever was learned."""
    changes = {**VARIANTS[variant], "parl.proposers": 1}
    agent = run(small_cell(changes))
    start = untouched(changes).policy_learner.ema
    assert differences(start.state_dict(), agent.policy_learner.ema.state_dict()) != []
    fresh = type(agent.ranked).over(start, agent.critics.ema, agent.config.ranking)
    obs = torch.randn(5, 4)
    assert differences(fresh.state_dict(), agent.final["ranked"].state_dict()) == []
    assert torch.equal(agent.policy(obs, generator(1)), fresh.sample(obs, generator(1))[:, :2])
    assert agent.final["policy"] is agent.policy_learner.ema


def test_what_was_learned_proposes_from_its_turn_on() -> None:
    """As it stood then: after each third of 60 steps, and not at their end."""
    job: Any = parl_job(small_cell({"parl.proposers": 3, "modip.env_steps": 60}))
    agent = job.agent
    turns, proposer = [], snapshot(agent.ranked.net.state_dict())
    while True:
        steps, learned = agent.env_steps, snapshot(agent.policy_learner.ema.net.state_dict())
        if job.advance() is None:
            break
        now = snapshot(agent.ranked.net.state_dict())
        if differences(now, proposer):
            assert differences(now, learned) == []
            turns.append((steps, agent.env_steps))
            proposer = now
    assert len(turns) == 2
    for i, (before, after) in enumerate(turns):
        assert before < 20 * (i + 1) <= after


# Its course.


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_critics_learn_before_the_first_step_and_the_policy_does_not(variant: str) -> None:
    job: Any = parl_job(small_cell({**VARIANTS[variant], "parl.offline_updates": 5}))
    agent = job.agent
    start = snapshot(agent.policy_learner.state_dict())
    for done in range(5):
        assert agent.offline_left
        assert job.env_steps == 0
        assert job.advance()
        assert agent.critics.grad_steps == done + 1
    assert not agent.offline_left
    assert differences(start, agent.policy_learner.state_dict()) == []
    assert job.advance() == {}
    assert job.env_steps > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("steps", "envs", "updates"), [(60, 2, 1.0), (61, 3, 0.7), (31, 1, 0.3)])
def test_the_budget_is_modips(variant: str, steps: int, envs: int, updates: float) -> None:
    changes = {
        "modip.env_steps": steps, "modip.num_envs": envs, "modip.final_env_steps": 0,
        "parl.critic_updates": updates, "parl.policy_updates": updates / 2,
    }  # fmt: skip
    agent = run(small_cell({**VARIANTS[variant], **changes}))
    assert steps <= agent.env_steps < steps + 2 * envs
    assert abs(agent.critics.grad_steps - 3 - updates * agent.env_steps) <= 1
    assert abs(agent.policy_learner.grad_steps - updates / 2 * agent.env_steps) <= 1
    assert agent.value.grad_steps == (agent.critics.grad_steps if variant == "iql" else 0)


# The parameters.


KNOBS: dict[str, Any] = {
    "parl.ranking.ensemble": 2, "parl.ranking.width": 8, "parl.ranking.layers": 2, "parl.ranking.value": "min",
    "parl.ranking.candidates": 3, "parl.ranking.keep": 1, "parl.ranking.ascent_steps": 0,
    "parl.ranking.ascent_size": 0.5, "parl.ranking.temperature": 0.0, "parl.subsample": 1,
    "parl.conservative.weight": 5.0, "parl.conservative.states": 2, "parl.conservative.random_chunks": 1,
    "parl.conservative.policy_chunks": 1, "parl.proposers": 1, "parl.improvements": 2, "parl.pool": 16, "parl.offline_updates": 0,
    "parl.critic_updates": 0.25, "parl.policy_updates": 0.25, "parl.offline_share": 0.0, "parl.discount": 0.8,
    "parl.batch_size": 8, "parl.critic_lr": 1e-2, "parl.policy_lr": 1e-2, "parl.grad_clip": 0.01,
    "parl.ema_decay": 0.5, "critics.reward_offset": -1.0, "critics.demos_end_well": True, "modip.env_steps": 40,
    "modip.num_envs": 3, "modip.episode_steps": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return {
        variant: chunks(run(small_cell({**BRIEF, **changes})))
        for variant, changes in VARIANTS.items()
    }


def chunks(agent: PARL) -> Tensor:
    return agent.policy(torch.randn(8, 4, generator=generator(9)), generator())


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_acts(knob: str, plain: dict[str, Tensor]) -> None:
    assert not torch.equal(chunks(run(small_cell({**BRIEF, knob: KNOBS[knob]}))), plain["calql"])


def test_the_expectile_acts_where_there_is_a_value(plain: dict[str, Tensor]) -> None:
    assert not torch.equal(
        chunks(run(small_cell({**BRIEF, **IQL, "parl.expectile": 0.95}))), plain["iql"]
    )
    assert not torch.equal(plain["iql"], plain["calql"])


def test_every_knob_is_here() -> None:
    turned = {knob.split(".")[1] for knob in KNOBS if knob.startswith("parl.")}
    assert turned | {"critic", "expectile"} == set(PARLConfig.model_fields)
    nested = {knob.split(".")[2] for knob in KNOBS if knob.count(".") == 2}
    fields = PARLConfig.model_fields
    parts = [fields[name].annotation for name in ("ranking", "conservative")]
    assert nested == {name for part in parts for name in part.model_fields}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"subsample": 4}, "subsample 4 exceeds ranking.ensemble 3: lower it"),
        ({"conservative.states": 17}, "conservative.states 17 exceeds batch_size 16: lower it"),
        (
            {"conservative.policy_chunks": 5},
            "conservative.policy_chunks 5 exceeds ranking.candidates 4: lower it",
        ),
        ({"pool": 15}, "batch_size 16 exceeds pool 15: lower it"),
    ],
)
def test_values_that_do_not_fit_are_named(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        small_cell({f"parl.{name}": value for name, value in changes.items()})


# It learns.


LEARNS: dict[str, Any] = {
    "diffusion.width": 48, "diffusion.blocks": 2, "diffusion.updates": 400, "diffusion.batch_size": 64,
    "diffusion.lr": 2e-3, "diffusion.ema_decay": 0.98,
    "modip.env_steps": 400, "modip.final_env_steps": 0, "modip.num_envs": 4,
    "parl.ranking": {
        "ensemble": 4, "width": 48, "layers": 2, "value": "mean", "candidates": 16, "keep": 4, "ascent_steps": 4,
        "ascent_size": 0.3, "temperature": 0.0,
    },
    "parl.conservative": {"weight": 0.005, "states": 16, "random_chunks": 4, "policy_chunks": 2},
    "parl.improvements": 8, "parl.pool": 512, "parl.offline_updates": 300, "parl.batch_size": 64,
    "parl.critic_updates": 1.0, "parl.policy_updates": 1.0, "parl.critic_lr": 3e-3, "parl.policy_lr": 2e-3, "parl.discount": 0.95,
    "parl.ema_decay": 0.98,
}  # fmt: skip


def improvement(
    seed: int, env: BatchedEnv, variant: str, *, informative: bool
) -> tuple[float, float, float]:
    """Mean returns on the same 50 starts: of the clone, then of the policy alone and of the ranked one."""
    cell = small_cell({**LEARNS, **VARIANTS[variant]})
    demos, clone = cloned(cell, seed, informative=informative)
    start = copy.deepcopy(clone.learner.ema).requires_grad_(True)
    agent = PARL(start, cell, demos, seed=seed)
    job = interaction(cell, agent, seed, env)
    while job.advance() is not None:
        pass
    learned = agent.policy_learner.ema

    def alone(obs: Tensor, g: torch.Generator) -> Tensor:
        return learned.sample(obs, g)[:, :2]

    return mean_return(clone.policy), mean_return(alone), mean_return(agent.policy)


@pytest.mark.learn
def test_the_policy_becomes_better_than_the_clone() -> None:
    before, alone, ranked = improvement(0, BatchedEnv(toy.ENV_ID, 4), "calql", informative=True)
    assert alone > before + MARGIN
    assert ranked > before + MARGIN


@pytest.mark.learn
def test_in_sample_critics_teach_it_too() -> None:
    before, alone, ranked = improvement(0, BatchedEnv(toy.ENV_ID, 4), "iql", informative=True)
    assert alone > before + MARGIN
    assert ranked > before + MARGIN


@pytest.mark.learn
def test_from_rewards_that_say_nothing_there_is_nothing_to_gain() -> None:
    before, alone, ranked = improvement(0, Noisy(toy.ENV_ID, 4), "calql", informative=False)
    assert alone < before + MARGIN
    assert ranked < before + MARGIN
