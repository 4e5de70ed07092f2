"""What makes it MODIP, and that each of its numbers does something."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from modip import mppi
from modip.agents.bc import BC
from modip.agents.modip import plan
from modip.config import (
    Cell,
    ChunkConfig,
    CriticsConfig,
    DiffusionConfig,
    ModipConfig,
    MPPIConfig,
    WorldModelConfig,
)
from modip.diffusion import DiffusionPolicy
from modip.loops import Fit
from modip.parts import learner, update_critics
from modip.pretraining import Pretraining
from modip.replay import Replay
from modip.types import ChunkStep, Plan
from tests.helpers import (
    Parts,
    demonstrations,
    episodes,
    generator,
    leaves,
    modip_job,
    new_parts,
    small_cell,
)


class Calls:
    """Counts the policy's denoisings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        sample = DiffusionPolicy.sample

        def counted(policy: DiffusionPolicy, *args: Any) -> Tensor:
            self.count += 1
            return sample(policy, *args)

        monkeypatch.setattr(DiffusionPolicy, "sample", counted)


@pytest.fixture
def denoisings(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def setting(changes: dict[str, Any]) -> tuple[Cell, Parts, Tensor]:
    cell = small_cell(changes)
    demos = demonstrations(cell)
    return cell, new_parts(cell, demos), demos.table[:3, :4]


@pytest.mark.parametrize("encoder", ["identity", "simnorm"])
@pytest.mark.parametrize("prior", ["diffusion", "moments", "gaussian"])
@pytest.mark.parametrize("samples", [0, 8])
def test_a_plan_is_worth_at_least_its_priors_best(
    encoder: str, prior: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, parts, obs = setting(
        {"world_model.encoder": encoder, "mppi.prior": prior, "mppi.samples": samples, "mppi.selection": "best"}
    )  # fmt: skip
    seen: list[tuple[Tensor, Tensor, Plan, Tensor]] = []
    search = mppi.plan

    def watched(value: mppi.ValueFn, candidates: Tensor, *rest: Any) -> Plan:
        found = search(value, candidates, *rest)
        seen.append((candidates, value(candidates), found, value(found.chunk[:, None])[:, 0]))
        return found

    monkeypatch.setattr(mppi, "plan", watched)
    plan(obs, *parts, cell, generator())
    ((candidates, value, found, of_chunk),) = seen
    assert candidates.shape[:2] == (3, 8)
    assert (found.value >= value.amax(1)).all()
    torch.testing.assert_close(of_chunk, found.value)
    assert candidates.abs().max() <= 1


def test_a_prior_of_moments_has_the_policys_mean_and_spread_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy that does one thing or the other: the candidates are around what is between them."""
    number = 4000
    cell, parts, obs = setting({"mppi.prior": "moments", "mppi.prior_samples": number})

    def sample(at: Tensor, _: torch.Generator) -> Tensor:
        side = torch.where(torch.arange(len(at)) % 4 == 0, 0.4, -0.4)
        return side[:, None, None].expand(-1, *parts.policy.shape)

    monkeypatch.setattr(parts.policy, "sample", sample)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    search = mppi.plan

    def watched(
        value: mppi.ValueFn, candidates: Tensor, mean: Tensor, std: Tensor, *rest: Any
    ) -> Plan:
        seen.append((candidates[:, :number], mean, std))
        return search(value, candidates, mean, std, *rest)

    monkeypatch.setattr(mppi, "plan", watched)
    plan(obs, *parts, cell, generator())
    ((candidates, mean, std),) = seen
    torch.testing.assert_close(mean, torch.full_like(mean, -0.2))
    spread = (0.25 * 0.6**2 + 0.75 * 0.2**2) ** 0.5
    torch.testing.assert_close(std, torch.full_like(std, spread))
    flat = candidates[0, :, 0]
    assert (flat.mean(0) + 0.2).abs().max() < 0.03
    assert (flat.std(0) - spread).abs().max() < 0.03
    assert ((flat - flat.sign() * 0.4).abs() > 0.05).float().mean() > 0.5
    assert flat.T.corrcoef()[0, 1].abs() < 0.1  # nor does one dimension know of the other


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
@pytest.mark.parametrize("act_steps", [1, 2, 4])
def test_any_planned_horizon_up_to_the_chunk_works(horizon: int, act_steps: int) -> None:
    cell = small_cell(
        {
            "mppi.horizon": horizon, "chunk.act_steps": act_steps, "modip.env_steps": 24,
            "modip.final_env_steps": 8,
        }
    )  # fmt: skip
    job = modip_job(cell)
    agent: Any = job.agent
    chunk = agent.act(torch.randn(2, 4), generator(), explore=True)
    assert chunk.shape == (2, min(horizon, act_steps), 2)
    assert agent.policy(torch.randn(2, 4), generator()).shape == (2, act_steps, 2)
    while job.advance() is not None:
        pass
    assert job.env_steps >= 24


@pytest.mark.parametrize("terminal", ["state_value", "policy_action_value"])
def test_no_gradient_passes_a_plan(terminal: str) -> None:
    cell, parts, obs = setting({"mppi.terminal_value": terminal})
    found = plan(obs, *parts, cell, generator())
    assert not any(part.requires_grad for part in found)
    assert all(p.grad is None for part in parts for p in part.parameters())


@pytest.mark.parametrize("target", ["state_value", "policy_action"])
def test_critics_teach_the_policy_and_the_model_nothing(target: str) -> None:
    cell, parts, _ = setting({"critics.td_target": target, "world_model.encoder": "simnorm"})
    learning = learner(parts.critics, cell.critics, lr=1e-3, num_updates=10)
    window = demonstrations(cell).window(torch.arange(20), cell.critics.n_step + 1)
    update_critics(learning, parts.model, window, cell.critics, parts.policy, generator())
    for part in (parts.policy, parts.model):
        assert all(p.grad is None for p in part.parameters())
    assert all(p.grad is not None for p in parts.critics.parameters())


@pytest.mark.parametrize(("target", "times"), [("state_value", 0), ("policy_action", 1)])
def test_only_the_ablation_denoises_for_a_critics_target(
    target: str, times: int, denoisings: Calls
) -> None:
    cell, parts, _ = setting({"critics.td_target": target})
    learning = learner(parts.critics, cell.critics, lr=1e-3, num_updates=10)
    window = demonstrations(cell).window(torch.arange(20), cell.critics.n_step + 1)
    update_critics(learning, parts.model, window, cell.critics, parts.policy, generator())
    assert denoisings.count == times


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(
    ("terminal", "prior", "first", "each_round"),
    [
        ("state_value", "diffusion", 1, 0),
        ("policy_action_value", "diffusion", 1, 1),
        ("state_value", "moments", 1, 0),
        ("state_value", "gaussian", 0, 0),
        ("policy_action_value", "gaussian", 0, 1),
    ],
)
def test_a_decision_denoises_once(
    terminal: str, prior: str, first: int, each_round: int, iterations: int, denoisings: Calls
) -> None:
    """The prior's chunks in one batch, outside the search; with the ablation, once more for every round's ends."""
    cell, parts, obs = setting(
        {"mppi.terminal_value": terminal, "mppi.prior": prior, "mppi.iterations": iterations}
    )
    plan(obs, *parts, cell, generator())
    assert denoisings.count == first + each_round * (1 + iterations)


def test_without_planning_the_policy_acts_that_would_plan() -> None:
    """A copy that rests as the planner does, with the same exploration."""
    changes = {"modip.planning": False, "modip.imagined_share": 0.5, "modip.explore_std": 0.0}
    job = modip_job(small_cell(changes))
    agent: Any = job.agent
    obs = torch.randn(3, 4)
    for _ in range(20):
        job.advance()
    resting = agent.resting[0].sample(obs, generator(1))[:, :2]
    assert torch.equal(agent.act(obs, generator(1), explore=True), resting)
    assert not torch.equal(agent.policy(obs, generator(1)), resting)
    assert agent.imagined == 0
    noisy: Any = modip_job(small_cell(changes | {"modip.explore_std": 0.1})).agent
    calm, wild = (noisy.act(obs, generator(1), explore=e) for e in (False, True))
    assert 0.0 < (calm - wild).abs().mean() < 0.2


IMITATION = {
    "modip.demo_share": {"start": 0.0, "end": 0.0}, "modip.imagined_share": 0.0, "modip.policy_updates": 6.0,
    "modip.policy_lr": 3e-3, "diffusion.width": 48, "modip.env_steps": 120, "modip.fresh_steps": 120,
    "diffusion.batch_size": 64,
}  # fmt: skip
"""Of executed plans alone, and enough of it to be seen."""


def test_what_it_imitates_is_what_it_planned() -> None:
    """With neither demonstrations nor imagined plans, the policy comes to act as the planner did."""
    cell = small_cell({**IMITATION, "modip.keep": 1.0})
    job = modip_job(cell)
    agent: Any = job.agent
    acts: list[Tensor] = []
    planner = agent.act

    def constant(obs: Tensor, noise: torch.Generator, *, explore: bool) -> Tensor:
        acts.append(planner(obs, noise, explore=explore))
        return torch.tensor([0.5, -0.5]).expand(len(obs), 2, 2)

    agent.act = constant
    while job.advance() is not None:
        pass
    got = agent.policy(agent.replay.table[:20, :4], generator())
    assert (got - torch.tensor([0.5, -0.5])).abs().mean() < 0.15
    demonstrated = agent.demos.table[:, 4:6]
    assert (demonstrated - torch.tensor([0.5, -0.5])).abs().mean() > 0.4


def test_of_what_was_executed_it_imitates_what_paid() -> None:
    """Two environments: one always does 0.5 and is paid for it, the other -0.5 and is not."""
    cell = small_cell({**IMITATION, "modip.keep": 0.5})
    agent: Any = modip_job(cell).agent
    obs = agent.demos.table[:, :4]
    paid = torch.tensor([1.0, 0.0])[:, None].expand(2, 2)
    action = (paid - 0.5)[..., None].expand(2, 2, 2)
    no = torch.zeros(2, 2, dtype=torch.bool)
    for i in range(30):  # an episode ends every 5 chunks
        cut = no.clone()
        cut[:, 1] = i % 5 == 4
        seen = obs[torch.randint(len(obs), (4,), generator=generator(i))].view(2, 2, 4)
        agent.observe(ChunkStep(seen, action, paid, no, cut, ~no))
        while agent.update():
            pass
    assert (agent.policy(obs[:50], generator()) - 0.5).abs().mean() < 0.2


def test_plans_for_imagined_states_are_the_last_planners_and_their_mirror_images() -> None:
    """In the final phase the plans of the planners before it are forgotten; half of all are imitated mirrored."""
    cell = small_cell(
        {
            "modip.imagined_share": 1.0, "modip.imagined_states": 3, "modip.demo_share": {"start": 0.0, "end": 0.0},
            "modip.env_steps": 48, "modip.final_env_steps": 16, "modip.plan_steps": 8, "modip.fresh_steps": 48,
        }
    )  # fmt: skip
    job = modip_job(cell)
    agent: Any = job.agent
    chunks = 0  # of both environments, two steps each
    while job.advance() is not None:
        if agent.frozen:
            chunks = (job.env_steps - 32) // 4
            assert agent.imagined == 3 * chunks
        else:
            assert agent.imagined == 3 * (job.env_steps // 4)
    assert chunks == 4
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    agent.demos = Replay.from_episodes(episodes(), 0.0, torch.device("cpu"), signs)
    window = agent._targets()
    rows = torch.cat([window.obs[:, 0], window.action[:, 0]], 1)
    plans = torch.cat([agent.imagined_obs, agent.imagined_chunk[:, 0]], 1)[: agent.imagined]
    as_planned = (rows[:, None] == plans).all(-1).any(1)
    mirrored = (rows[:, None] == signs * plans).all(-1).any(1)
    assert (as_planned ^ mirrored).all()
    assert as_planned.any()
    assert mirrored.any()


def test_what_acts_rests_for_a_block_and_in_the_last_phase() -> None:
    """Five blocks of 8 steps, then 12 of the final phase: its copies change when a block begins, and only then."""
    cell = small_cell(
        {
            "modip.env_steps": 52, "modip.final_env_steps": 12, "modip.plan_steps": 8, "modip.num_envs": 2,
            "modip.final_planner": "newest",
        }
    )  # fmt: skip
    job = modip_job(cell)
    agent: Any = job.agent
    acted: dict[int, str] = {}
    while job.advance() is not None:
        if max(agent.debt.values()) < 1:
            acted[job.env_steps] = str(
                [part.sum().item() for part in agent.acting.state_dict().values()]
            )
    copies = list(acted.values())
    changed = [
        steps for steps, a, b in zip(list(acted)[1:], copies, copies[1:], strict=False) if a != b
    ]
    assert changed == [8, 16, 24, 32, 40]


def blocks(pay: list[float], ended: set[int], offset: float = 0.0) -> Callable[[float], int]:
    """What to ask an agent that lived blocks of two chunks with these rewards, in `ended` with terminations.

    Asked, it lives another block of that reward, and says which block's copies act then.
    """
    cell = small_cell(
        {
            "modip.env_steps": 80, "modip.final_env_steps": 80 - 8 * len(pay), "modip.plan_steps": 8,
            "modip.episode_steps": 6, "modip.model_lr": 1e-2, "critics.reward_offset": offset,
        }
    )  # fmt: skip
    agent: Any = modip_job(cell).agent
    obs, no = agent.demos.table[:4, :4].view(2, 2, 4), torch.zeros(2, 2, dtype=torch.bool)
    acted: list[str] = []

    def copies() -> str:
        return str([part.sum().item() for part in agent.acting.state_dict().values()])

    def live(reward: float, *, end: bool) -> None:
        acted.append(copies())
        ends = no.clone()
        ends[:, 1] = end
        for _ in range(2):
            paid = torch.full((2, 2), reward)
            agent.observe(ChunkStep(obs, torch.zeros(2, 2, 2), paid, ends, no, ~no))
            while agent.update():
                pass

    def ask(reward: float) -> int:
        live(reward, end=False)
        return acted.index(copies())

    for i, reward in enumerate(pay):
        live(reward, end=i in ended)
    assert agent.frozen
    return ask


def test_the_last_phase_goes_back_to_what_earned_most() -> None:
    """The first block is not judged: nothing had lived for an episode. The third was lucky, and is found out."""
    ask = blocks([9.0, 1.0, 3.0, 2.0, 1.0, 1.0], set())
    assert [ask(2.0), ask(-9.0), ask(2.0)] == [2, 3, 3]


@pytest.mark.parametrize(("offset", "best"), [(0.0, 1), (-2.0, 3)])
def test_an_end_is_worth_what_it_ends(offset: float, best: int) -> None:
    """Where a step costs more than it pays, to end is good."""
    ask = blocks([1.0, 1.2, 1.0, 1.0, 1.0, 1.0], {3}, offset)
    assert ask(1.0) == best


@pytest.mark.parametrize("ends_well", [False, True])
def test_a_short_record_is_doubted_unless_ends_are_good(ends_well: bool) -> None:
    """The same rates, seen for twice as long, are worth more only where the unseen end would be a fall."""
    agent: Any = modip_job(small_cell({"critics.demos_end_well": ends_well})).agent
    once = {"reward": 8.0, "ends": 1.0, "steps": 8.0}
    twice = {name: 2.0 * amount for name, amount in once.items()}
    gain = agent._worth({"record": twice}) - agent._worth({"record": once})
    assert gain == pytest.approx(0.0, abs=1e-9) if ends_well else gain > 0.1


# Every knob acts. For each leaf of the configuration: another value than the small cell's, and what else must be set
# for it to have something to act on. A new field without a line here fails `test_every_knob_has_a_line`.
MODELS: dict[str, type[BaseModel]] = {
    "chunk": ChunkConfig,
    "diffusion": DiffusionConfig,
    "world_model": WorldModelConfig,
    "critics": CriticsConfig,
    "mppi": MPPIConfig,
    "modip": ModipConfig,
}
SIMNORM = {"world_model.encoder": "simnorm"}
PRIMARY: dict[str, Any] = {
    "chunk.horizon": 3,
    "chunk.act_steps": 1,
    "diffusion.prediction": "epsilon",
    "diffusion.denoising_steps": 5,
    "diffusion.sampling_steps": 2,
    "diffusion.eta": 0.0,
    "diffusion.width": 24,
    "diffusion.blocks": 2,
    "diffusion.updates": 5,
    "diffusion.batch_size": 12,
    "diffusion.lr": 2e-3,
    "diffusion.weight_decay": 0.1,
    "diffusion.grad_clip": 0.1,
    "diffusion.ema_decay": 0.1,
    "diffusion.hidden": [3],
    "world_model.encoder": "simnorm",
    "world_model.latent_dim": (24, SIMNORM),
    "world_model.ensemble": 1,
    "world_model.width": 24,
    "world_model.layers": 2,
    "world_model.loss_horizon": 3,
    "world_model.rho": 0.3,
    "world_model.dynamics_coef": 0.1,
    "world_model.reward_coef": 0.1,
    "world_model.end_coef": 0.1,
    "world_model.updates": 5,
    "world_model.batch_size": 12,
    "world_model.lr": 2e-3,
    "world_model.weight_decay": 0.1,
    "world_model.grad_clip": 0.1,
    "world_model.ema_decay": 0.1,
    "critics.ensemble": 4,
    "critics.width": 24,
    "critics.layers": 2,
    "critics.td_target": "policy_action",
    "critics.n_step": 2,
    "critics.expectile": 0.9,
    "critics.discount": 0.8,
    "critics.reward_offset": -1.0,
    "critics.demos_end_well": True,
    "critics.updates": 5,
    "critics.batch_size": 12,
    "critics.lr": 2e-3,
    "critics.weight_decay": 0.1,
    "critics.grad_clip": 0.1,
    "critics.ema_decay": 0.1,
    "mppi.horizon": 2,
    "mppi.prior_samples": 3,
    "mppi.perturbed_samples": 3,
    "mppi.perturbation": 0.4,
    "mppi.samples": 6,
    "mppi.iterations": 2,
    "mppi.elites": 3,
    "mppi.temperature": 2.0,
    "mppi.min_std": 0.4,
    "mppi.max_std": 0.06,
    "mppi.penalty": 3.0,
    "mppi.weighting": "raw",
    "mppi.selection": "best",
    "mppi.terminal_value": "policy_action_value",
    "mppi.prior": "gaussian",
    "modip.planning": False,
    "modip.offline_pretraining": False,
    "modip.env_steps": 72,
    "modip.num_envs": 3,
    "modip.episode_steps": 5,
    "modip.explore_std": 0.3,
    "modip.model_updates": 0.5,
    "modip.critic_updates": 0.5,
    "modip.policy_updates": 1.0,
    "modip.model_lr": 3e-3,
    "modip.critic_lr": 3e-3,
    "modip.policy_lr": 3e-3,
    "modip.plan_steps": 24,
    "modip.offline_share": 0.0,
    "modip.demo_share.start": 1.0,
    "modip.demo_share.end": 1.0,
    "modip.imagined_share": 0.9,
    "modip.imagined_states": 4,
    "modip.fresh_steps": 8,
    "modip.keep": 0.2,
    "modip.final_env_steps": 24,
    # A planner must have lived for an episode to be judged.
    "modip.final_planner": ("newest", {"modip.episode_steps": 4, "modip.plan_steps": 8}),
    "modip.final_updates": 9,
}
BASE = {
    "modip.explore_std": 0.05, "modip.model_lr": 5e-4, "modip.critic_lr": 5e-4, "modip.policy_lr": 5e-4,
    "modip.offline_share": 0.5, "modip.demo_share": {"start": 0.5, "end": 0.0}, "modip.imagined_share": 0.3,
    "modip.imagined_states": 6, "modip.fresh_steps": 24, "modip.keep": 1.0, "modip.env_steps": 44,
}  # fmt: skip


def fields(model: type[BaseModel], where: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{where}.{name}")
        else:
            yield f"{where}.{name}"


@functools.cache
def behaviour(changes: str = "{}") -> str:
    """All that a tiny pipeline does: clone, pre-train, interact; the actions it takes then and the steps it took.

    `changes` as JSON, to be remembered by.
    """
    cell = small_cell({**BASE, **json.loads(changes)})
    demos = demonstrations(cell)
    parts = new_parts(cell, demos)
    if cell.modip.offline_pretraining:
        config = cell.diffusion
        bc = BC(parts.policy, cell, demos, num_updates=config.updates, lr=config.lr, seed=0)
        cloning = Fit(bc)
        while cloning.advance() is not None:
            pass
        policy = bc.learner.ema.requires_grad_(True)
        offline = Pretraining(policy, parts.model, parts.critics, cell, demos, seed=0)
        learning = Fit(offline)
        while learning.advance() is not None:
            pass
        parts = Parts(
            policy,
            offline.model.ema.requires_grad_(True),
            offline.critics.ema.requires_grad_(True),
        )
    job = modip_job(cell, parts=parts)
    while job.advance() is not None:
        pass
    agent: Any = job.agent
    obs = demos.table[:5, :4]
    rows = agent.replay.window(torch.arange(int(agent.replay.filled[0])), 1)
    seen = {
        "policy": agent.policy(obs, generator()),
        "planner": agent.planner(obs, generator()),
        "value": agent.plan(obs, generator()).value,
        "taken": rows.action,
        "steps": [job.env_steps, job.grad_steps],
    }
    digest = hashlib.sha256()
    for where, value in leaves(seen).items():
        digest.update(where.encode())
        digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else str(value).encode())
    return digest.hexdigest()


def test_every_knob_has_a_line() -> None:
    wanted = {path for name, model in MODELS.items() for path in fields(model, name)}
    assert set(PRIMARY) == wanted


@pytest.mark.parametrize("knob", PRIMARY)
def test_every_knob_acts(knob: str) -> None:
    value, also = PRIMARY[knob], {}
    if isinstance(value, tuple):
        value, also = value
    assert behaviour(json.dumps(also)) != behaviour(json.dumps({**also, knob: value}))


def test_the_probe_sees_knobs_and_only_knobs() -> None:
    """What it cannot see: how results are judged. And without a change, nothing changes."""
    behaviour.cache_clear()
    one = behaviour()
    behaviour.cache_clear()
    assert behaviour() == one
    assert behaviour(json.dumps({"evaluation.episodes": 7})) == one
