"""MODIP (El Asri, Gratias-Quiquandon, Thome, Sigaud 2026, arXiv 2606.10825): plan, act, learn, distil.

Acts with an MPPI plan in the world model, with the policy's own chunks among the candidates and V(z) at the end.
Learns the model and the critics from offline and online data, on targets that no policy action enters. Distils what
was planned and executed into the diffusion policy with its ordinary denoising loss. No gradient passes the chain.

Deviations from the paper's description, each with its reason:
- the latent is the normalised observation by default: faster, and as good on low-dimensional states;
- what acts is a copy that rests for `plan_steps` environment steps, then takes over the newest averaged weights:
  a planner that changes with every update chases its few new data, and its return wobbles. What each copy really
  earned is known from training, so the last phase can go back to the best of them, and go on judging it;
- fresh executed chunks of the episodes that paid are distilled: batches of all ages never let the policy follow
  the planner, and the demonstrations that paid less than the planner drop out;
- the online stream's share of the batches grows with the stream, so that its first few rows do not fill them;
- the run ends with a distillation of the last phase's frozen planner, inside the budget of environment steps.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from modip import mppi
from modip.config import Cell
from modip.critics import Critics
from modip.diffusion import DiffusionPolicy
from modip.imagination import planned_return
from modip.nets import Learner
from modip.parts import learner, update_critics, update_model, update_policy
from modip.replay import Replay, concat
from modip.types import ChunkStep, Metrics, Plan, State, Window
from modip.world_model import WorldModel


def plan(
    obs: Tensor,
    policy: DiffusionPolicy,
    model: WorldModel,
    critics: Critics,
    cell: Cell,
    generator: torch.Generator,
) -> Plan:
    """Plan for B observations (B, Do): the policy's chunks are denoised once, in one batch, outside the search."""
    # Less bookkeeping than no_grad in a thousand small operations; copies may enter a loss again.
    with torch.inference_mode():
        found = _search(obs, policy, model, critics, cell, generator)
    return Plan(*(part.clone() for part in found))


def _search(
    obs: Tensor,
    policy: DiffusionPolicy,
    model: WorldModel,
    critics: Critics,
    cell: Cell,
    generator: torch.Generator,
) -> Plan:
    config, b = cell.mppi, obs.shape[0]
    h, action_dim = config.horizon, policy.shape[1]
    latent = model.encode(obs)
    if config.prior == "gaussian":
        mean = obs.new_zeros(b, h, action_dim)
        std = torch.full_like(mean, config.max_std)
    else:
        chunks = policy.sample(obs.repeat_interleave(config.prior_samples, 0), generator)
        prior = chunks.view(b, config.prior_samples, *policy.shape)[:, :, :h]
        mean, std = prior.mean(1), prior.std(1, correction=0).clamp(config.min_std, config.max_std)
    if config.prior != "diffusion":
        shape = (b, config.prior_samples, h, action_dim)
        noise = torch.randn(shape, generator=generator, device=obs.device)
        prior = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).clamp(-1.0, 1.0)
    candidates = prior
    if config.perturbed_samples:
        pick = torch.arange(config.perturbed_samples, device=obs.device) % config.prior_samples
        copies = prior[:, pick]
        noise = torch.randn(copies.shape, generator=generator, device=obs.device)
        candidates = torch.cat([prior, (copies + config.perturbation * noise).clamp(-1.0, 1.0)], 1)

    def first_action(at: Tensor) -> Tensor:
        return policy.sample(at, generator)[:, 0]

    terminal = first_action if config.terminal_value == "policy_action_value" else None

    def value(action: Tensor) -> Tensor:
        members = planned_return(model, critics, latent, action, cell.critics.discount, terminal)
        return members.mean(0) - config.penalty * members.std(0, correction=0)

    return mppi.plan(value, candidates, mean, std, config, generator)


CANDIDATES = 3
"""Copies of what acted that the final phase can go back to."""


class Modip:
    """The online agent over pre-trained (or fresh) parts; `demos` stays in every batch by its shares."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        model: WorldModel,
        critics: Critics,
        cell: Cell,
        demos: Replay,
        *,
        seed: int,
    ) -> None:
        config = cell.modip
        self.cell, self.config, self.demos = cell, config, demos
        self.critic_demos = demos.ended() if cell.critics.demos_end_well else demos
        self.policy_learner: Learner[DiffusionPolicy] = learner(
            policy, cell.diffusion, lr=config.policy_lr, num_updates=config.num_policy_updates
        )
        online = config.env_steps - config.final_env_steps
        self.model = learner(
            model,
            cell.world_model,
            lr=config.model_lr,
            num_updates=int(config.model_updates * online),
        )
        self.critics = learner(
            critics,
            cell.critics,
            lr=config.critic_lr,
            num_updates=int(config.critic_updates * online),
        )
        # What acts: copies that rest while their real return is measured.
        self.acting = nn.ModuleDict({"policy": policy, "model": model, "critics": critics})
        self.acting = copy.deepcopy(self.acting).requires_grad_(False)
        # What acted, by blocks: the running block's record, and the best copies so far with theirs.
        self.record = {"reward": 0.0, "ends": 0.0, "steps": 0.0}
        self.candidates: list[State] = []
        self.chosen = False  # the first candidate acts
        device = demos.table.device
        # Every chunk takes at least one step of each environment, so this many chunks spend the budget.
        capacity = -(-config.env_steps // config.num_envs) * cell.chunk.act_steps
        self.replay = Replay(
            config.num_envs, capacity, demos.obs_dim, demos.action_dim, device, demos.mirror,
            ends_well=cell.critics.demos_end_well,
        )  # fmt: skip
        self.generator = torch.Generator(device).manual_seed(seed)
        # What acts is judged over a whole episode, further than the critics' discount sees.
        self.longest = demos.longest
        self.env_steps = 0
        self.debt = {"model": 0.0, "critic": 0.0, "policy": 0.0}
        self.keep_above = -torch.inf
        ring = (
            max(1, config.fresh_steps // (cell.chunk.act_steps * config.num_envs))
            * config.imagined_states
        )
        self.imagined_obs = torch.zeros(ring, demos.obs_dim, device=device)
        self.imagined_chunk = torch.zeros(ring, *policy.shape, device=device)
        self.imagined = 0  # plans ever written to the ring

    offline_left = 0  # what it needs was pre-trained by stages of their own

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        policy = self.policy_learner.ema
        return policy.sample(obs, generator)[:, : policy.act_steps]

    @property
    def resting(self) -> tuple[DiffusionPolicy, WorldModel, Critics]:
        """What plans: the policy it samples from, the model and the critics, as they rest in this block."""
        policy, model, critics = self.acting.values()
        return cast(DiffusionPolicy, policy), cast(WorldModel, model), cast(Critics, critics)

    def plan(self, obs: Tensor, generator: torch.Generator) -> Plan:
        return plan(obs, *self.resting, self.cell, generator)

    def planner(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The plan's executed part, without exploration: (B, Do) -> (B, Ta, Da)."""
        return self.plan(obs, generator).chunk[:, : self.cell.chunk.act_steps]

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """(B, Do) -> (B, Ta, Da); with `explore`, also plans for imagined states and adds exploration noise."""
        b = obs.shape[0]
        if explore and self.config.planning and self.config.imagined_share > 0:
            obs = torch.cat([obs, self._states(self.config.imagined_states)])
        if self.config.planning:
            chunk = self.plan(obs, generator).chunk
        else:
            chunk = self.resting[0].sample(obs, generator)
        if explore and len(chunk) > b:
            self._remember(obs[b:], chunk[b:])
        chunk = chunk[:b, : self.cell.chunk.act_steps]
        if explore and self.config.explore_std > 0:
            noise = torch.randn(chunk.shape, generator=generator, device=chunk.device)
            chunk = (chunk + self.config.explore_std * noise).clamp(-1.0, 1.0)
        return chunk

    def _states(self, size: int) -> Tensor:
        """States to imagine from: demonstrated ones at first, then half of them fresh."""
        fresh = size // 2 if self.env_steps else 0
        parts = [self.demos.table[self.demos.sample_rows(size - fresh, self.generator)]]
        if fresh:
            parts.append(
                self.replay.table[self.replay.sample_rows(fresh, self.generator, self._fresh_rows)]
            )
        return torch.cat(parts)[:, : self.demos.obs_dim]

    def _remember(self, obs: Tensor, chunk: Tensor) -> None:
        size = len(self.imagined_obs)
        slot = (self.imagined + torch.arange(len(obs), device=obs.device)) % size
        self.imagined_obs[slot] = obs
        self.imagined_chunk[slot, : chunk.shape[1]] = chunk
        self.imagined += len(obs)

    @property
    def _fresh_rows(self) -> int:
        """Rows of each environment that are young enough; in the final phase, all the frozen planner's too."""
        config = self.config
        last = config.final_env_steps if self.frozen else 0
        return max(1, max(config.fresh_steps, last) // config.num_envs)

    @property
    def frozen(self) -> bool:
        """True in the final phase: model and critics rest, and the planner's chunks are collected."""
        return self.env_steps >= self.config.env_steps - self.config.final_env_steps

    def observe(self, step: ChunkStep) -> None:
        config = self.config
        # Of a chunk that crosses into the final phase, the steps before it count: the control's updates are as many.
        online = config.env_steps - config.final_env_steps
        learned = max(0, min(step.env_steps, online - self.env_steps))
        step = step._replace(reward=step.reward + self.cell.critics.reward_offset)
        self.replay.append(step)
        self.env_steps += step.env_steps
        self.debt["model"] += config.model_updates * learned
        self.debt["critic"] += config.critic_updates * learned
        self.debt["policy"] += config.policy_updates * learned
        if self.env_steps >= config.env_steps:
            self.debt["policy"] += config.final_updates
        self.record["reward"] += float(step.reward[step.mask].sum())
        self.record["ends"] += float(step.terminated.sum())
        self.record["steps"] += step.env_steps
        last_phase_begins = learned > 0 and self.frozen
        if last_phase_begins:
            self.imagined = 0  # the last phase's plans alone
        if (
            self.record["steps"] >= config.plan_steps
            or last_phase_begins
            or self.env_steps >= config.env_steps
        ):
            self._next_block(newest=not self.frozen or last_phase_begins)
        self._refresh_filter()

    def _next_block(self, *, newest: bool) -> None:
        """The newest averages act next, or, in the final phase, what earned most so far (`final_planner: best`).

        The best was lucky, too. So what it earns in the final phase is added to its record, and if that falls below
        another's, the other acts.
        """
        judged = self.config.final_planner == "best"
        if self.chosen:
            best = self.candidates[0]["record"]
            self.candidates[0]["record"] = {k: v + self.record[k] for k, v in best.items()}
        # Before each environment has lived for an episode, nothing has had the time to go wrong.
        elif judged and self.replay.filled.min() >= min(
            self.longest, self.config.episode_steps or self.longest
        ):
            weights = {name: part.clone() for name, part in self.acting.state_dict().items()}
            self.candidates.append({"weights": weights, "record": self.record})
        self.candidates = sorted(self.candidates, key=self._worth, reverse=True)[:CANDIDATES]
        self.record = dict.fromkeys(self.record, 0.0)
        self.chosen = self.frozen and bool(self.candidates)
        if self.chosen:
            self.acting.load_state_dict(self.candidates[0]["weights"])
        elif newest:
            averages = {
                "policy": self.policy_learner.ema,
                "model": self.model.ema,
                "critics": self.critics.ema,
            }
            for name, part in averages.items():
                self.acting[name].load_state_dict(part.state_dict())

    def _worth(self, candidate: State) -> float:
        """About the return of an episode: of a process that earns its mean reward and terminates at its mean rate.

        The rate is (ends + 1) / steps, Laplace's rule: a short record without an end may have been luck. Where an end
        is the goal, none is added: it would do a short record good.
        """
        record = candidate["record"]
        doubt = 0.0 if self.cell.critics.demos_end_well else 1.0
        return float(record["reward"] / (record["steps"] / self.longest + record["ends"] + doubt))

    def _refresh_filter(self) -> None:
        if self.config.keep >= 1.0:
            return
        returns = self.replay.episode_return.view(self.config.num_envs, -1)
        fresh = torch.cat([
            row[max(0, n - self._fresh_rows) : n] for row, n in zip(returns, self.replay.filled.tolist(), strict=True)
        ])  # fmt: skip
        known = fresh[~fresh.isnan()]
        if len(known):
            self.keep_above = float(known.quantile(1.0 - self.config.keep))

    def update(self) -> Metrics:
        for part in ("model", "critic", "policy"):
            if self.debt[part] >= 1.0:
                self.debt[part] -= 1.0
                match part:
                    case "model":
                        world = self.cell.world_model
                        window = self._mixed(self.demos, world.batch_size, world.loss_horizon + 1)
                        return update_model(self.model, window)
                    case "critic":
                        values = self.cell.critics
                        window = self._mixed(
                            self.critic_demos, values.batch_size, values.n_step + 1
                        )
                        return update_critics(
                            self.critics, self.model.ema, window, self.cell.critics, self.policy_learner.ema, self.generator
                        )  # fmt: skip
                    case "policy":
                        return update_policy(self.policy_learner, self._targets(), self.generator)
        return {}

    def _online(self, size: int, share: float) -> int:
        """Rows of a batch for the online stream: its share, once it is as long as a block."""
        return round(size * share * min(1.0, self.env_steps / self.config.plan_steps))

    def _mixed(self, demos: Replay, size: int, length: int) -> Window:
        """Windows of the data set and of the online stream, by `offline_share`."""
        online, generator = self._online(size, 1.0 - self.config.offline_share), self.generator
        old = demos.window(demos.sample_rows(size - online, generator), length, generator)
        rows = self.replay.sample_rows(online, generator)
        return concat(old, self.replay.window(rows, length, generator))

    @property
    def demo_share(self) -> float:
        share = self.config.demo_share
        online = max(1, self.config.env_steps - self.config.final_env_steps)
        return share.start + (share.end - share.start) * min(self.env_steps / online, 1.0)

    def _targets(self) -> Window:
        """What the policy imitates: demonstrations, imagined plans, and fresh executed chunks that paid."""
        size, horizon = self.cell.diffusion.batch_size, self.cell.chunk.horizon
        demos = size - self._online(size, 1.0 - self.demo_share)
        planned = round((size - demos) * self.config.imagined_share) if self.imagined else 0
        executed = size - demos - planned
        rows = self.replay.sample_rows(executed, self.generator, self._fresh_rows)
        # Of a running episode nobody knows what it will pay: its return is NaN, and it does not count. Nor does one
        # that missed its goal, where an end is the goal (`critics.demos_end_well`).
        window = self._that_paid(
            self.replay, rows, self.replay.episode_return[rows] >= self.keep_above
        )
        if demos:
            rows = self.demos.sample_rows(demos, self.generator)
            paid = self.demos.episode_return[rows] >= self.keep_above
            window = concat(window, self._that_paid(self.demos, rows, paid))
        if planned:
            known = min(self.imagined, len(self.imagined_obs))
            pick = torch.randint(
                known, (planned,), generator=self.generator, device=window.obs.device
            )
            obs = self.imagined_obs[pick].unsqueeze(1).expand(-1, horizon, -1)
            mask = (
                (torch.arange(horizon, device=pick.device) < self.cell.mppi.horizon)
                .float()
                .expand(planned, -1)
            )
            zeros = torch.zeros_like(mask)
            plans = Window(obs, self.imagined_chunk[pick], zeros, zeros, mask)
            window = concat(window, self.demos.mirrored(plans, self.generator))
        return window

    def _that_paid(self, source: Replay, rows: Tensor, paid: Tensor) -> Window:
        window = source.window(rows, self.cell.chunk.horizon, self.generator)
        return window._replace(mask=window.mask * paid.float().unsqueeze(1))

    def state_dict(self) -> State:
        return {
            "policy": self.policy_learner.state_dict(), "model": self.model.state_dict(),
            "critics": self.critics.state_dict(), "replay": self.replay.state_dict(),
            "generator": self.generator.get_state(), "env_steps": self.env_steps, "debt": dict(self.debt),
            "acting": self.acting.state_dict(), "record": dict(self.record), "candidates": self.candidates, "chosen": self.chosen,
            "keep_above": self.keep_above, "imagined": self.imagined,
            "imagined_obs": self.imagined_obs, "imagined_chunk": self.imagined_chunk,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        self.policy_learner.load_state_dict(state["policy"])
        self.model.load_state_dict(state["model"])
        self.critics.load_state_dict(state["critics"])
        self.replay.load_state_dict(state["replay"])
        self.generator.set_state(state["generator"])
        self.env_steps, self.debt = state["env_steps"], dict(state["debt"])
        self.acting.load_state_dict(state["acting"])
        self.record, self.candidates = dict(state["record"]), list(state["candidates"])
        self.chosen = state["chosen"]
        self.keep_above, self.imagined = state["keep_above"], state["imagined"]
        self.imagined_obs.copy_(state["imagined_obs"])
        self.imagined_chunk.copy_(state["imagined_chunk"])
