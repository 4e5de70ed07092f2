"""TD-MPC2 (Hansen, Su & Wang, ICLR 2024, arXiv 2310.16828): plan in a latent model that predicts what matters.

No clone is improved here: encoder, dynamics, reward, end of episode, Q and a Gaussian prior begin at random. Windows
of h + 1 rows are imagined from their first latent: z' = d(z, a), and

- model: consistency_coef * |z' - sg(encoder(s'))|^2 + reward_coef * CE(reward) + value_coef * CE(Q), the CEs soft, over
  bins of symlog; predicted step i weighs rho^i; + end_coef * BCE(end).
- Q learns r + discount * min over two of the averaged Q functions of Q(s', a'), a' sampled from the prior at s'.
- prior: maximises Q(z, a) / range + entropy_coef * entropy on the imagined latents; Q is the mean of two, the range runs
  after the distance of its 5 % and 95 % quantiles, and is at least 1. With demonstrations, also less
  bc_coef * |its mean - the demonstrated action|^2 on theirs (TD3+BC's form): away from all data Q is a guess.
- acting: MPPI (`modip.latent`), replanned in every step around the last plan, one action executed; in training with
  noise of the plan's deviation.

`data: online` is the published agent: random actions first, then its own steps. `data: demonstrations` learns from the
demonstrations before its first step, and has them in every batch: MODIP's data, at no random step. Its authors
released no such form.

Deviations from the authors' code, each with its reason:
- elites stay from round to round (`modip.mppi`), so two Q functions are drawn per plan, not per round;
- the end of an episode is an output of the dynamics, not a network of its own: one less in every planned step;
- the entropy is that of the squashed action; the authors' is that of the Gaussian, times the dimension;
- LayerNorm + SiLU, AdamW with decaying rates and gradients clipped apart for model and prior, no dropout of 1 % in Q:
  the networks and optimisers of all agents here;
- observations are normalised by the demonstrations' statistics in both forms, as for all agents;
- a truncated episode's last row has no target, for its successor was not stored;
- evaluations plan from nothing in every step: what is judged keeps no memory between its calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modip.config import Cell
from modip.diffusion import DiffusionPolicy
from modip.latent import GaussianPrior, LatentModel, LatentPlanner, LatentPolicy, following
from modip.nets import Learner, M, squashed, two_hot_loss, two_hot_value
from modip.replay import Replay, mixed
from modip.types import ChunkPolicy, ChunkStep, Metrics, State, Window


def over_steps(error: Tensor, mask: Tensor, rho: float) -> Tensor:
    """Mean over steps i of rho^i times the mean of error (B, h) where mask (B, h) is 1."""
    weight = torch.pow(rho, torch.arange(error.shape[1], device=error.device))
    return (weight * (error * mask).sum(0) / mask.sum(0).clamp(min=1.0)).mean()


def td_target(reward: Tensor, terminated: Tensor, next_q: Tensor, discount: float) -> Tensor:
    """reward (B, h) + discount * the smaller of next_q (2, B, h), nothing after an end: (B, h)."""
    return reward + discount * (1.0 - terminated) * next_q.amin(0)


def prior_loss(
    q: Tensor, log_prob: Tensor, mask: Tensor, entropy_coef: float, rho: float
) -> Tensor:
    """-(scaled q + entropy_coef * entropy), each (B, h + 1), weighed as the predicted steps are."""
    return over_steps(entropy_coef * log_prob - q, mask, rho)


def moved(value_range: Tensor, q: Tensor, decay: float) -> Tensor:
    """The running range () after q (B,): at least 1 where q differ little."""
    low, high = q.quantile(torch.tensor([0.05, 0.95], device=q.device))
    return torch.lerp((high - low).clamp(min=1.0), value_range, decay)


class TDMPC2:
    """The agent from random weights; of `policy` only the dimensions and the normaliser are used."""

    def __init__(self, policy: DiffusionPolicy, cell: Cell, demos: Replay, *, seed: int) -> None:
        config, run = cell.tdmpc2, cell.modip
        device = demos.table.device
        self.config = config
        self.reward_offset = cell.critics.reward_offset
        self.demos = demos.ended() if cell.critics.demos_end_well else demos
        self.demonstrated = config.data == "demonstrations"
        self.offline_updates = config.offline_updates if self.demonstrated else 0
        self.seed_steps = 0 if self.demonstrated else config.seed_steps
        self.updates_due, self.env_steps = float(self.offline_updates), 0
        self.budget = run.env_steps
        total = self.offline_updates + int(config.updates * run.env_steps)
        action_dim = policy.shape[1]
        model = LatentModel(demos.obs_dim, action_dim, config.latent, policy.normalizer).to(device)
        self.model = self._learner(model, total, (model.encoder, config.encoder_rate))
        self.prior = self._learner(GaussianPrior(action_dim, config.latent).to(device), total)
        self.planner = LatentPlanner(model, self.prior.module, config.search, config.discount)
        self.alone = LatentPolicy(model.encoder, self.prior.module, config.latent)
        self.value_range = torch.ones((), device=device)
        steps = -(-run.env_steps // run.num_envs)  # every decision is one step of each environment
        self.replay = Replay(
            run.num_envs, steps, demos.obs_dim, demos.action_dim, device, demos.mirror
        )
        # Of each environment, where its next search begins.
        self.mean = self.planner.cold(run.num_envs, device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def _learner(
        self, module: M, num_updates: int, slow: tuple[torch.nn.Module, float] | None = None
    ) -> Learner[M]:
        config = self.config
        return Learner(
            module, lr=config.lr, weight_decay=0.0, grad_clip=config.grad_clip, ema_decay=config.ema_decay,
            num_updates=num_updates, slow=slow,
        )  # fmt: skip

    @property
    def offline_left(self) -> int:
        return max(0, self.offline_updates - self.model.grad_steps)

    @property
    def final(self) -> dict[str, ChunkPolicy]:
        """What it leaves behind: what plans, and the prior alone."""
        return {"planner": self.planner, "policy": self.alone}

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The first action of a plan that begins from nothing, (B, Do) -> (B, 1, Da)."""
        return self.planner.sample(obs, generator)[:, :1]

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """(B, Do) -> (B, 1, Da); to explore, with noise of the plan's deviation, or first at random."""
        if not explore:
            return self.policy(obs, generator)
        size, action_dim = len(obs), self.planner.shape[1]
        if self.env_steps < self.seed_steps:
            return 2.0 * torch.rand(size, 1, action_dim, generator=generator, device=obs.device) - 1
        known = size == len(self.mean)  # the training's environments, in their order
        plan = self.planner.plan(
            obs, generator, self.mean if known else self.planner.cold(size, obs.device)
        )
        if known:
            self.mean = following(plan.mean)
        noise = torch.randn(size, 1, action_dim, generator=generator, device=obs.device)
        return (plan.chunk[:, :1] + plan.std[:, :1] * noise).clamp(-1.0, 1.0)

    def observe(self, step: ChunkStep) -> None:
        self.replay.append(step._replace(reward=step.reward + self.reward_offset))
        self.env_steps += step.env_steps
        self.updates_due += self.config.updates * step.env_steps
        ended = (step.terminated | step.truncated).any(1).to(self.mean.device)
        self.mean = self.mean.masked_fill(ended[:, None, None], 0.0)

    def update(self) -> Metrics:
        """One step of the model with its Q functions, then of the prior."""
        if self.updates_due < 1.0 or (not self.offline_left and self.env_steps < self.seed_steps):
            return {}
        self.updates_due -= 1.0
        window = self._batch()
        loss, metrics, latents = self._model_loss(window)
        self.model.step(loss)
        q = self.model.module.q.requires_grad_(False)
        loss, entropy = self._prior_loss(latents, window)
        self.prior.step(loss)
        q.requires_grad_(True)
        return metrics | {
            "prior_loss": loss.detach(), "prior_entropy": entropy, "prior_range": self.value_range,
        }  # fmt: skip

    def _batch(self) -> Window:
        """Windows of h + 1 rows."""
        size, length = self.config.batch_size, self.config.search.horizon + 1
        if self.demonstrated:
            share = self.config.offline_share
            return mixed(self.demos, self.replay, size, length, share, self.generator)
        rows = self.replay.sample_rows(size, self.generator)
        return self.replay.window(rows, length, self.generator)

    def _model_loss(self, window: Window) -> tuple[Tensor, Metrics, Tensor]:
        """The loss, its parts, and the imagined latents (h + 1, B, Dz), without gradient."""
        config, model = self.config, self.model.module
        b, h = len(window.obs), window.obs.shape[1] - 1
        here, there = window.mask[:, :h], window.mask[:, 1:]
        reward, terminated = window.reward[:, :h], window.terminated[:, :h]
        with torch.no_grad():
            goal = model.encoder(window.obs[:, 1:])
            target = self._targets(goal, reward, terminated)
        z, latents, ends = model.encoder(window.obs[:, 0]), [], []
        latents.append(z)
        for i in range(h):
            z, end = model.step(z, window.action[:, i])
            latents.append(z)
            ends.append(end)
        path = torch.stack(latents, 1)
        start, action = path[:, :h].flatten(0, 1), window.action[:, :h].flatten(0, 1)
        consistency = over_steps((path[:, 1:] - goal).square().mean(-1), there, config.rho)
        logits = model.reward_logits(start, action).view(b, h, -1)
        reward_error = over_steps(two_hot_loss(logits, reward), here, config.rho)
        logits = model.q_logits(start, action).view(-1, b, h, config.latent.bins)
        missed = two_hot_loss(logits, target.expand(len(logits), b, h)).mean(0)
        # After an end the target needs no successor.
        value = over_steps(missed, torch.maximum(there, here * terminated), config.rho)
        missed = F.binary_cross_entropy_with_logits(
            torch.stack(ends, 1), terminated, reduction="none"
        )
        end_error = (missed * here).sum() / here.sum()
        total = (
            config.consistency_coef * consistency
            + config.reward_coef * reward_error
            + config.value_coef * value
            + config.end_coef * end_error
        )
        metrics = {
            "model_consistency": consistency.detach(), "model_reward": reward_error.detach(),
            "model_end": end_error.detach(), "critic_loss": value.detach(), "critic_value": target.mean(),
        }  # fmt: skip
        return total, metrics, path.detach().transpose(0, 1)

    def _targets(self, next_latent: Tensor, reward: Tensor, terminated: Tensor) -> Tensor:
        """What Q learns, (B, h), for the latents (B, h, Dz) after those steps."""
        flat = next_latent.flatten(0, 1)
        action, _ = self.prior.module.sample(flat, self.generator)
        logits = self.model.ema.q_logits(flat, action, self.model.ema.two(self.generator))
        next_q = two_hot_value(logits).view(2, *reward.shape)
        return td_target(reward, terminated, next_q, self.config.discount)

    def _prior_loss(self, latents: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The prior's loss on latents (h + 1, B, Dz) of a window, and its mean entropy; moves the range of values."""
        model, config, mask = self.model.module, self.config, window.mask
        flat = latents.transpose(0, 1).flatten(0, 1)
        mean, log_std = self.prior.module(flat)
        action, log_prob = squashed(mean, log_std, self.generator)
        q = two_hot_value(model.q_logits(flat, action, model.two(self.generator))).mean(0)
        q, log_prob = q.view(mask.shape), log_prob.view(mask.shape)
        self.value_range = moved(self.value_range, q[:, 0].detach(), config.range_decay)
        loss = prior_loss(q / self.value_range, log_prob, mask, config.entropy_coef, config.rho)
        if self.demonstrated:
            shown = self._demonstrated(len(mask))
            miss = (torch.tanh(mean).view(window.action.shape) - window.action).square().mean(-1)
            loss = loss + config.bc_coef * over_steps(miss[:shown], mask[:shown], config.rho)
        return loss, -log_prob.detach().mean()

    def _demonstrated(self, size: int) -> int:
        """Rows of a batch that are the data set's: its first, as `mixed` puts them."""
        return round(size * self.config.offline_share) if self.env_steps else size

    def state_dict(self) -> State:
        return {
            "model": self.model.state_dict(), "prior": self.prior.state_dict(), "value_range": self.value_range,
            "replay": self.replay.state_dict(), "mean": self.mean, "updates_due": self.updates_due,
            "env_steps": self.env_steps, "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        self.prior.load_state_dict(state["prior"])
        self.value_range = state["value_range"].to(self.value_range.device)
        self.replay.load_state_dict(state["replay"])
        self.mean = state["mean"].to(self.mean.device)
        self.updates_due, self.env_steps = state["updates_due"], state["env_steps"]
        self.generator.set_state(state["generator"])
