"""DQL, Diffusion-QL (Wang, Hunt, Zhou, ICLR 2023, arXiv 2208.06193): a Q-term through the whole denoising chain.

The policy learns its denoising loss on the data's chunks, plus eta times a Q-term on the chunks it samples itself:

    loss = E[denoising loss(s, a)] - eta * mean Q_i(s, a_pi) / mean |Q_j(s, a_pi)|

a_pi is sampled through all steps of the chain, with its gradient. Q_i and Q_j are the two critics, swapped with
probability one half; no gradient passes the mean magnitude. The critics learn r + discount * min_e Q'_e(s', a') with
a' from the averaged policy, and of several a' (`backup_samples`) the largest Q'_e each. It acts by drawing one of N
chunks by the softmax of the averaged critics' smallest Q. Nothing is frozen. First it learns from the demonstrations
alone, then it acts, with the demonstrations in every batch.

r and the discount are those of a whole executed chunk, and Q judges what is executed of a chunk.

DPPO's re-implementation applies the denoising loss to a_pi, which ties the policy to itself instead of to the data.
This is the published algorithm: the data's action.

Deviations from the authors' code, each with its reason:
- it starts from the clone, and goes on online: the comparison is one of improvements of the same policy;
- the critics learn alone first (`warmup_updates`). Theirs begin with the policy, which has nothing to lose then; here
  a Q-term in units of values that still are near 0 undoes the clone within a hundred updates;
- the clone's own network, schedule and clean-chunk prediction, sampled in `sampling_steps` (theirs trains with as
  many): the same policy for all agents. As in theirs, the predicted chunk is clipped in every step of the chain, so an
  entry that leaves [-1, 1] is brought back by the denoising loss alone;
- LayerNorm + SiLU critics, rates that decay to a tenth, critics in units of the demonstrations' returns, as all here;
- the averaged policy follows every update from the first on, not each fifth after a thousand: the budget is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip.chunk_critics import ChunkCritics, chunk_batch
from modip.config import Cell, ChunkConfig
from modip.diffusion import DiffusionPolicy
from modip.nets import Learner, M
from modip.ranking import RankedPolicy
from modip.replay import Replay, mixed
from modip.types import ChunkStep, Metrics, State, Window


def q_term(q: Tensor) -> Tensor:
    """- mean of the first critic's q (E, B), in units of the last one's mean magnitude, which has no gradient."""
    return -q[0].mean() / q[-1].detach().abs().mean()


def q_target(reward: Tensor, discount: Tensor, next_q: Tensor) -> Tensor:
    """Target (B,) of reward and discount (B,) and of S samples' next_q (E, B, S): each critic's best, the smallest."""
    return reward + discount * next_q.amax(2).amin(0)


def resampled(policy: DiffusionPolicy, sampling_steps: int) -> DiffusionPolicy:
    """The same weights, sampled in so many steps."""
    chunk = ChunkConfig(horizon=policy.shape[0], act_steps=policy.act_steps)
    config = policy.config.model_copy(update={"sampling_steps": sampling_steps})
    other = DiffusionPolicy(len(policy.seen), policy.shape[1], chunk, config, policy.normalizer)
    other.load_state_dict(policy.state_dict())
    return other.to(policy.seen.device)


class DQL:
    """Diffusion-QL from `policy` on; `demos` stays in every batch by its share, and sets the critics' scale."""

    def __init__(self, policy: DiffusionPolicy, cell: Cell, demos: Replay, *, seed: int) -> None:
        # The budget is modip's, so that agents are compared at equal steps.
        config, run, device = cell.dql, cell.modip, demos.table.device
        self.config, self.act_steps = config, cell.chunk.act_steps
        self.reward_offset = cell.critics.reward_offset
        self.demos = demos.ended() if cell.critics.demos_end_well else demos
        self.budget, self.env_steps = run.env_steps, 0
        self.updates_due = float(config.offline_updates)
        total = config.offline_updates + int(config.updates * run.env_steps)
        ranking = config.ranking
        critics = ChunkCritics(
            policy.normalizer, self.act_steps * policy.shape[1], ranking.ensemble, ranking.width, ranking.layers
        )  # fmt: skip
        critics = critics.fit_scale(self.demos, config.discount).to(device)
        self.policy_learner = self._learner(
            resampled(policy, config.sampling_steps),
            config.policy_lr,
            total - config.warmup_updates,
        )
        self.critics = self._learner(critics, config.critic_lr, total)
        self.ranked = RankedPolicy.over(self.policy_learner.ema, self.critics.ema, ranking)
        # Not copies, but the averages themselves: what acts follows every update.
        self.ranked.net, self.ranked.critics = self.policy_learner.ema.net, self.critics.ema
        # Every chunk takes at least one step of each environment, so this many chunks spend the budget.
        capacity = -(-run.env_steps // run.num_envs) * self.act_steps
        self.replay = Replay(
            run.num_envs, capacity, demos.obs_dim, demos.action_dim, device, demos.mirror
        )
        self.generator = torch.Generator(device).manual_seed(seed)

    def _learner(self, module: M, lr: float, num_updates: int) -> Learner[M]:
        config = self.config
        return Learner(
            module, lr=lr, weight_decay=0.0, grad_clip=config.grad_clip, ema_decay=config.ema_decay,
            num_updates=num_updates,
        )  # fmt: skip

    @property
    def offline_left(self) -> int:
        return max(0, self.config.offline_updates - self.critics.grad_steps)

    @property
    def final(self) -> dict[str, DiffusionPolicy]:
        """What it leaves behind: the averaged policy, and the same with the critics that choose."""
        return {"policy": self.policy_learner.ema, "ranked": self.ranked}

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The averaged policy alone, (B, Do) -> (B, Ta, Da)."""
        return self.policy_learner.ema.sample(obs, generator)[:, : self.act_steps]

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """(B, Do) -> (B, Ta, Da), one of N by the softmax of their values; it explores by no other means."""
        return self.ranked.sample(obs, generator)[:, : self.act_steps]

    def observe(self, step: ChunkStep) -> None:
        self.replay.append(step._replace(reward=step.reward + self.reward_offset))
        self.env_steps += step.env_steps
        self.updates_due += self.config.updates * step.env_steps

    def update(self) -> Metrics:
        """One step of the critics and, after the warm-up, one of the policy on the same batch."""
        if self.updates_due < 1.0:
            return {}
        self.updates_due -= 1.0
        config = self.config
        length = max(self.policy_learner.module.shape[0], self.act_steps + 1)
        window = mixed(
            self.demos, self.replay, config.batch_size, length, config.offline_share, self.generator
        )
        loss, value = self._td_loss(window)
        self.critics.step(loss)
        metrics = {"critic_loss": loss.detach(), "critic_value": value}
        if self.critics.grad_steps <= config.warmup_updates:
            return metrics
        denoising, term = self._policy_losses(window)
        self.policy_learner.step(denoising + config.eta * term)
        return metrics | {"policy_loss": denoising.detach(), "policy_q": -term.detach()}

    def _td_loss(self, window: Window) -> tuple[Tensor, Tensor]:
        """The critics' loss, and the mean of their targets."""
        config, rows = self.config, self.act_steps + 1
        batch = chunk_batch(Window(*(part[:, :rows] for part in window)), config.discount)
        with torch.no_grad():
            obs = batch.next_obs.repeat_interleave(config.backup_samples, 0)
            chunk = self.policy_learner.ema.sample(obs, self.generator)
            next_q = self.critics.ema(obs, self._executed(chunk))
            next_q = next_q.view(len(next_q), -1, config.backup_samples)
            y = q_target(batch.reward, batch.discount, next_q)
        return self.critics.module.loss(batch.obs, batch.chunk, y, batch.weight), y.mean()

    def _policy_losses(self, window: Window) -> tuple[Tensor, Tensor]:
        """The denoising loss on the window's own chunks, and the Q-term on the policy's."""
        policy, critics = self.policy_learner.module, self.critics.module
        obs, horizon = window.obs[:, 0], policy.shape[0]
        denoising = policy.loss(
            obs, window.action[:, :horizon], window.mask[:, :horizon], self.generator
        )
        chunk = self._executed(policy.sample_with_gradient(obs, self.generator))
        order = torch.randperm(critics.ensemble, generator=self.generator, device=obs.device)
        critics.requires_grad_(False)
        q = critics(obs, chunk)[order]
        critics.requires_grad_(True)
        return denoising, q_term(q)

    def _executed(self, chunk: Tensor) -> Tensor:
        """(B, H, Da) -> (B, Ta*Da)."""
        return chunk[:, : self.act_steps].flatten(1)

    def state_dict(self) -> State:
        return {
            "policy": self.policy_learner.state_dict(), "critics": self.critics.state_dict(),
            "replay": self.replay.state_dict(), "updates_due": self.updates_due, "env_steps": self.env_steps,
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        self.policy_learner.load_state_dict(state["policy"])
        self.critics.load_state_dict(state["critics"])
        self.replay.load_state_dict(state["replay"])
        self.updates_due, self.env_steps = state["updates_due"], state["env_steps"]
        self.generator.set_state(state["generator"])
