"""DSRL: the losses against values computed in plain loops, what stays frozen, what each chunk began with, the knobs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import modip
from modip.agents.dsrl import DSRL, actor_loss, soft_target, temperature_loss
from modip.artifacts import read_policy, save_policy
from modip.config import Cell, DSRLConfig
from modip.envs import BatchedEnv, toy
from modip.errors import UserError
from modip.steering import NoiseActor, SteeredPolicy
from modip.types import Window
from tests.agents.test_learning import MARGIN, Noisy, mean_return
from tests.helpers import (
    SPEC,
    cloned,
    demonstrations,
    differences,
    dsrl_job,
    generator,
    interaction,
    new_parts,
    small_cell,
    snapshot,
)

NOISE = {"dsrl.critic": "noise", "dsrl.offline_share": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {"aliased": {}, "noise": NOISE}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Observations and fresh weights of each test are the same in every run."""
    torch.manual_seed(0)


def run(cell: Cell, seed: int = 0) -> DSRL:
    job: Any = dsrl_job(cell, seed)
    while job.advance() is not None:
        pass
    agent: DSRL = job.agent
    return agent


def randomise(module: nn.Module) -> None:
    """Weights far from their start, so that nothing is near 0 by chance."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator(5)))


def noise_actor() -> NoiseActor:
    actor = NoiseActor(4, 8, small_cell().dsrl.actor)
    randomise(actor)
    return actor


# The losses.


def test_the_losses_are_sacs() -> None:
    q = torch.tensor([[1.0, 5.0, -2.0], [3.0, 4.0, -1.0]])
    log_prob, temperature = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(0.3)
    reward, discount = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.81, 0.0, 0.9])
    smallest = [1.0, 4.0, -2.0]
    wanted = [
        r + d * (s - 0.3 * p)
        for r, d, s, p in zip(
            [1.0, 2.0, 3.0], [0.81, 0.0, 0.9], smallest, [0.5, -1.0, 2.0], strict=True
        )
    ]
    found = soft_target(reward, discount, q, log_prob, temperature)
    torch.testing.assert_close(found, torch.tensor(wanted))
    mean = sum(0.3 * p - s for p, s in zip([0.5, -1.0, 2.0], smallest, strict=True)) / 3
    torch.testing.assert_close(actor_loss(q, log_prob, temperature), torch.tensor(mean))


@pytest.mark.parametrize(("entropy", "direction"), [(-3.0, -1.0), (1.0, 1.0)])
def test_the_temperature_rises_where_the_entropy_is_below_its_target(
    entropy: float, direction: float
) -> None:
    """The gradient is that of log temperature: descent raises it for a negative one."""
    log = torch.tensor(-1.0, requires_grad=True)
    loss = temperature_loss(log, torch.full((4,), -entropy), target_entropy=-1.0)
    loss.backward()
    assert log.grad is not None
    assert float(log.grad.sign()) == direction
    assert float(log.grad) == pytest.approx(entropy + 1.0)


def test_the_noise_is_bounded_and_its_density_is_the_distributions() -> None:
    actor, obs = noise_actor(), torch.randn(2000, 4)
    noise, log_prob = actor.sample(obs, generator(3))
    assert noise.abs().max() <= 1.5
    mean, log_std = actor(obs)
    dist = TransformedDistribution(Normal(mean.double(), log_std.double().exp()), TanhTransform())
    wanted = dist.log_prob(noise.double() / 1.5).sum(-1)
    inside = noise.abs().amax(-1) < 1.49  # atanh near the bound loses digits
    assert inside.sum() > 10
    torch.testing.assert_close(log_prob.double()[inside], wanted[inside], rtol=1e-3, atol=1e-3)
    far, _ = actor.sample(1e3 * obs, generator(3))
    assert torch.isfinite(far).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_td_is_that_of_chunks_right_at_ends_and_cuts(variant: str) -> None:
    """Row by row: three-step rewards, the value after them; none after an end; at a cut from the last row seen."""
    agent = dsrl_job(small_cell({**VARIANTS[variant], "chunk.act_steps": 3})).agent
    assert isinstance(agent, DSRL)
    for learner in (agent.critics, agent.actor):
        randomise(learner.module)
        randomise(learner.ema)
    g = generator(2)
    obs, action = torch.randn(5, 4, 4, generator=g), torch.rand(5, 4, 2, generator=g)
    reward = torch.randn(5, 4, generator=g)
    # Whole; ended by its second step; by its first; cut after its third step; and after its second, when a part of the
    # chunk was not executed: it has no target.
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    terminated = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])  # fmt: skip
    noise = torch.randn(5, 8, generator=g)
    state = agent.generator.get_state()
    window = Window(obs, action, reward, terminated.float(), mask.float())
    found, _ = agent._td_loss(window, noise)

    r, d = reward.tolist(), agent.config.discount
    rows = [3, 1, 0, 2, 1]
    next_obs = torch.stack([obs[i, row] for i, row in enumerate(rows)])
    agent.generator.set_state(state)
    norm = agent.steered.normalizer
    with torch.no_grad():
        w, log_prob = agent.actor.module.sample(norm(next_obs), agent.generator)
        chunk = agent.steered.sample(next_obs, agent.generator, w)[:, :3].reshape(5, 6)
        taken = action[:, :3].reshape(5, 6)
        next_x, x = (chunk, taken) if variant == "aliased" else (w, noise)
        next_q, q = agent.critics.ema(next_obs, next_x), agent.critics.module(obs[:, 0], x)
        temperature = float(agent.temperature.module.log.exp())
    soft = [min(next_q[:, i].tolist()) - temperature * float(log_prob[i]) for i in range(5)]
    target = {
        0: r[0][0] + d * r[0][1] + d**2 * r[0][2] + d**3 * soft[0],
        1: r[1][0] + d * r[1][1],
        2: r[2][0],
        3: r[3][0] + d * r[3][1] + d**2 * soft[3],
    }
    scale = float(agent.critics.module.scale)
    errors = [((float(q[e, i]) - y) / scale) ** 2 for i, y in target.items() for e in range(2)]
    assert float(found.detach()) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


# What is frozen, and what the actor's noise does.


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_policys_bits_stay(variant: str) -> None:
    cell = small_cell(VARIANTS[variant])
    parts = new_parts(cell, demonstrations(cell))
    before = snapshot(parts.policy.state_dict())
    job: Any = dsrl_job(cell, parts=parts)
    start = snapshot(job.agent.steered.actor.state_dict())
    while job.advance() is not None:
        pass
    assert differences(before, parts.policy.state_dict()) == []
    after = job.agent.steered.state_dict()
    assert differences(before, {name: after[name] for name in before}) == []
    assert differences(start, job.agent.steered.actor.state_dict())


def test_without_noise_of_its_own_it_is_the_policy_sampled_deterministically() -> None:
    """An actor of zeros and no variance gives w = 0: the base policy's DDIM chunk from there."""
    cell = small_cell({"diffusion.eta": 0.0})
    parts = new_parts(cell, demonstrations(cell))
    randomise(parts.policy)
    agent = DSRL(parts.policy, cell, demonstrations(cell), seed=0)
    out = agent.steered.actor.net.out
    with torch.no_grad():
        out.weight.zero_()
        out.bias.zero_()
        out.bias[..., 8:] = -20.0
    obs = torch.randn(6, 4)
    wanted = parts.policy.sample(obs, generator(), torch.zeros(6, 4, 2))[:, :2]
    assert torch.equal(agent.act(obs, generator(1), explore=False), wanted)
    agent.env_steps = cell.modip.env_steps  # past the initial rollouts
    torch.testing.assert_close(agent.act(obs, generator(2), explore=True), wanted, rtol=0, atol=1e-5)  # fmt: skip


def test_the_sampler_is_deterministic_whatever_the_policys_own() -> None:
    """The trained policy's eta = 1 would bury what the actor chose."""
    cell = small_cell({"diffusion.eta": 1.0})
    parts = new_parts(cell, demonstrations(cell))
    steered = SteeredPolicy.over(parts.policy, cell.dsrl.actor)
    obs, noise = torch.randn(3, 4), torch.randn(3, 4, 2)
    one, two = (steered.sample(obs, generator(seed), noise) for seed in (1, 2))
    assert torch.equal(one, two)
    random = [parts.policy.sample(obs, generator(seed), noise) for seed in (1, 2)]
    assert not torch.equal(*random)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_chunk_is_remembered_with_the_noise_it_began_with(variant: str) -> None:
    agent = run(small_cell({**VARIANTS[variant], "modip.num_envs": 3}))
    assert agent.chunks > 8
    rows, noise = agent.first[: agent.chunks], agent.noise[: agent.chunks]
    window = agent.replay.window(rows, 2)
    chunk = agent.steered.sample(window.obs[:, 0], generator(), noise)[:, :2]
    executed = window.mask.bool()
    torch.testing.assert_close(window.action[executed], chunk[executed], rtol=0, atol=1e-5)


def test_at_first_it_acts_by_the_policys_own_noise_and_learns_nothing() -> None:
    cell = small_cell({"dsrl.updates": 1.0, "dsrl.initial_share": 0.5, "dsrl.actor": {"width": 16, "layers": 1, "bound": 0.7}})  # fmt: skip
    job: Any = dsrl_job(cell)
    agent = job.agent
    start = snapshot(agent.actor.state_dict())
    while job.env_steps < 28:
        assert job.advance() == {}
    assert differences(start, agent.actor.state_dict()) == []
    noise = agent.noise[: agent.chunks]
    at_bound = (noise.abs() == 0.7).float().mean()
    assert float(at_bound) == pytest.approx(math.erfc(0.7 / math.sqrt(2)), abs=0.15)
    while job.advance() is not None:
        pass
    assert agent.actor.grad_steps == job.grad_steps == agent.env_steps


# The parameters.


KNOBS: dict[str, Any] = {
    "dsrl.actor": {"width": 16, "layers": 1, "bound": 1.0}, "dsrl.ensemble": 3, "dsrl.width": 8, "dsrl.layers": 2,
    "dsrl.initial_share": 0.4, "dsrl.updates": 1.0, "dsrl.distillations": 1, "dsrl.offline_share": 0.0,
    "dsrl.discount": 0.8, "dsrl.target_entropy": -8.0, "dsrl.initial_temperature": 1.0, "dsrl.batch_size": 8,
    "dsrl.lr": 3e-4, "dsrl.grad_clip": 0.01, "dsrl.ema_decay": 0.5, "critics.reward_offset": -1.0,
    "critics.demos_end_well": True, "modip.env_steps": 40, "modip.num_envs": 3, "modip.episode_steps": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return chunks(run(small_cell()))


def chunks(agent: DSRL) -> Tensor:
    return agent.policy(torch.randn(8, 4, generator=generator(9)), generator())


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_acts(knob: str, plain: Tensor) -> None:
    assert not torch.equal(chunks(run(small_cell({knob: KNOBS[knob]}))), plain)


def test_every_knob_is_here() -> None:
    turned = {knob.split(".")[1] for knob in KNOBS if knob.startswith("dsrl.")}
    assert turned | {"critic"} == set(DSRLConfig.model_fields)


def test_the_critics_differ(plain: Tensor) -> None:
    assert not torch.equal(chunks(run(small_cell(NOISE))), plain)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("steps", "envs", "updates"), [(60, 2, 1.0), (61, 3, 0.7), (31, 1, 0.3)])
def test_the_budget_is_modips(variant: str, steps: int, envs: int, updates: float) -> None:
    changes = {"modip.env_steps": steps, "modip.num_envs": envs, "modip.final_env_steps": 0, "dsrl.updates": updates}  # fmt: skip
    agent = run(small_cell({**VARIANTS[variant], **changes}))
    assert steps <= agent.env_steps < steps + 2 * envs
    for learner in (agent.actor, agent.critics, agent.temperature):
        assert abs(learner.grad_steps - updates * agent.env_steps) <= 1


def test_demonstrations_hold_no_noise() -> None:
    with pytest.raises(UserError, match="offline_share 0.5 needs critic aliased: .* set it to 0"):
        small_cell({"dsrl.critic": "noise"})


# What is saved.


def test_a_steered_policy_comes_back_and_steers(tmp_path: Path) -> None:
    agent = run(small_cell())
    randomise(agent.steered.actor)
    save_policy(tmp_path / "policy", agent.steered, SPEC, {"seed": 0, "grad_steps": 1})
    policy, spec = read_policy(tmp_path / "policy")
    assert isinstance(policy, SteeredPolicy)
    assert spec == SPEC
    assert differences(agent.steered.state_dict(), policy.state_dict()) == []
    obs = torch.randn(5, 4)
    wanted = agent.policy(obs, generator())
    assert torch.equal(modip.load_policy(tmp_path / "policy", seed=3).act(obs), wanted)


# It learns.


LEARNS: dict[str, Any] = {
    "diffusion.width": 48, "diffusion.blocks": 2, "diffusion.updates": 400, "diffusion.batch_size": 64,
    "diffusion.lr": 2e-3, "diffusion.ema_decay": 0.98,
    "modip.env_steps": 800, "modip.final_env_steps": 0, "modip.num_envs": 4,
    "dsrl.actor": {"width": 48, "layers": 2, "bound": 1.5}, "dsrl.width": 48, "dsrl.layers": 2, "dsrl.batch_size": 64,
    "dsrl.initial_share": 0.15, "dsrl.lr": 3e-3, "dsrl.ema_decay": 0.98,
}  # fmt: skip


def improvement(seed: int, env: BatchedEnv, *, informative: bool) -> tuple[float, float]:
    """Mean returns on the same 50 starts: of the clone, and of the same clone steered by what was learned."""
    cell = small_cell(LEARNS)
    demos, clone = cloned(cell, seed, informative=informative)
    agent = DSRL(clone.learner.ema, cell, demos, seed=seed)
    job = interaction(cell, agent, seed, env)
    while job.advance() is not None:
        pass
    return mean_return(clone.policy), mean_return(agent.policy)


@pytest.mark.learn
def test_steering_becomes_better_than_the_clone() -> None:
    before, after = improvement(0, BatchedEnv(toy.ENV_ID, 4), informative=True)
    assert after > before + MARGIN


@pytest.mark.learn
def test_from_rewards_that_say_nothing_there_is_nothing_to_gain() -> None:
    before, after = improvement(0, Noisy(toy.ENV_ID, 4), informative=False)
    assert after < before + MARGIN
