"""PA-RL (Mark et al., 2024, arXiv 2412.06685): critics improve the policy's chunks, which then are the policy's lesson.

At an observation the policy proposes N chunks. The best `keep` by the critics' mean Q stay; each climbs that mean by a
few steps of gradient ascent, its best iterate counts; one is drawn by the softmax of Q, or the best is taken. This
improved chunk a* (a) acts, (b) is what the policy learns, by its own denoising loss alone, (c) is the next action in
the critics' targets. No gradient passes the chain. Everything learns: first the critics from the demonstrations alone,
then critics and policy, with the demonstrations in every batch.

- `critic: calql` (Nakamoto et al. 2023): an ensemble learns r + discount * min_{e in S} Q'_e(s', a*'), S a random subset;
  beside it weight * (log sum exp Q(s, random and policy's chunks) - Q(s, a)), in which the policy's chunks count no
  less than the Monte-Carlo return that was seen from s, so that Q is not pushed below what the data achieved.
- `critic: iql` (Kostrikov et al. 2022): Q learns r + discount * V'(s'), V an expectile of min_{e in S} Q'_e(s, a).

r and the discount are those of a whole chunk. A truncated episode's last chunk bootstraps from the last observation
that was seen, one step before its end.

The ascent climbs Q in units of the critics' scale, the deviation of the demonstrations' returns. The published step of
3e-4 climbs a Q in [-100, 0], whose returns deviate by some 30, so in these units it is 0.01; a third of it did better.

Deviations from the authors' code, each with its reason:
- improved states go into a pool, which batches are drawn from: each serves the critics a few dozen times, the policy a
  dozen. To improve a whole batch for every update takes a hundred times as long as the update; the authors keep sampled
  actions for large policies;
- scalar critics, not distributions of 128 bins: all critics here are scalar, and the bins' range would be one more value
  to set for each task. The conservative term's Q are in units of the scale;
- the policy's chunks in that term are those of s', one of the two kinds that CQL uses, and they have no densities, so
  none are weighed by them; it is taken on a part of the batch, as an estimate of the same mean;
- the policy stays as it was cloned until the first environment step: it is the same start for all agents;
- `proposers`: what proposes is the clone, then, in turns, what was learned until then; the authors' is what is learned,
  always. In budgets this small that collapses: in 150 updates the spread of the policy's chunks falls to a third, and
  they move away from the demonstrations. Half of the chunks from the clone does not prevent it;
- LayerNorm + SiLU networks, averaged targets, which also rank, and decaying rates are those of all agents here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modip import critics as td
from modip.chunk_critics import ChunkBatch, ChunkCritics, chunk_batch
from modip.config import Cell
from modip.diffusion import DiffusionPolicy
from modip.nets import Learner
from modip.parts import learner
from modip.ranking import RankedPolicy
from modip.replay import Replay, mixture
from modip.types import ChunkStep, Metrics, State

UNBOUNDED = torch.finfo(torch.float32).min
"""The bound where no return was seen: below any value."""


def subsampled_min(q: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The smallest of `size` members, drawn once for all, of q (E, B): (B,)."""
    pick = torch.randperm(len(q), generator=generator, device=q.device)[:size]
    return q[pick].amin(0)


def conservative_loss(
    random_q: Tensor, policy_q: Tensor, data_q: Tensor, bound: Tensor, weight: Tensor
) -> Tensor:
    """Cal-QL's term: log sum exp over random_q (E, B, R) and policy_q (E, B, P) less data_q (E, B), as a mean.

    policy_q counts as no less than bound (B,): below it, it has no gradient. Rows are weighted by weight (B,).
    """
    pushed = torch.cat([random_q, torch.maximum(policy_q, bound.unsqueeze(1))], 2).logsumexp(2)
    return ((pushed - data_q) * weight).sum() / (weight.sum().clamp(min=1.0) * len(data_q))


def value_loss(v: Tensor, q: Tensor, expectile: float, weight: Tensor) -> Tensor:
    """IQL's: v (B,) to an expectile of q (B,), weighted by weight (B,)."""
    return (td.expectile_loss(q - v, expectile) * weight).sum() / weight.sum().clamp(min=1.0)


class Lesson(NamedTuple):
    """Transitions, and what was made of the policy's chunks where they end."""

    batch: ChunkBatch
    bound: Tensor  # (B,) the return seen from obs on, or UNBOUNDED
    proposed: Tensor  # (B, P, Ta*Da) some of the policy's chunks for next_obs
    improved: Tensor  # (B, H, Da) for next_obs


class PARL:
    """Ranking, ascent and distillation over the cloned `policy`; `demos` set the critics' scale, and stay in the batches."""

    def __init__(self, policy: DiffusionPolicy, cell: Cell, demos: Replay, *, seed: int) -> None:
        # The budget is modip's, so that agents are compared at equal steps.
        config, run = cell.parl, cell.modip
        device = demos.table.device
        self.config, self.act_steps = config, policy.act_steps
        self.reward_offset = cell.critics.reward_offset
        self.demos = demos.ended() if cell.critics.demos_end_well else demos
        self.budget, self.env_steps = run.env_steps, 0
        self.due = {"critic": float(config.offline_updates), "policy": 0.0}
        executed, ranking = self.act_steps * policy.shape[1], config.ranking
        updates = config.offline_updates + int(config.critic_updates * run.env_steps)

        def critics(chunk_dim: int, ensemble: int) -> Learner[ChunkCritics]:
            net = ChunkCritics(
                policy.normalizer, chunk_dim, ensemble, ranking.width, ranking.layers
            )
            return Learner(
                net.fit_scale(self.demos, config.discount).to(device), lr=config.critic_lr, weight_decay=0.0,
                grad_clip=config.grad_clip, ema_decay=config.ema_decay, num_updates=updates,
            )  # fmt: skip

        self.critics = critics(executed, ranking.ensemble)
        self.value = critics(0, 1)  # V(s), which iql learns: a critic of no chunk
        self.policy_learner: Learner[DiffusionPolicy] = learner(
            policy, cell.diffusion, lr=config.policy_lr, num_updates=int(config.policy_updates * run.env_steps)
        )  # fmt: skip
        # A copy of the policy, which proposes while the other learns, and the critics' average as it stands.
        self.ranked = RankedPolicy.over(policy, self.critics.ema, ranking)
        self.ranked.critics = self.critics.ema
        # Every chunk takes at least one step of each environment, so this many chunks spend the budget.
        chunks = -(-run.env_steps // run.num_envs)
        self.replay = Replay(
            run.num_envs, chunks * self.act_steps, demos.obs_dim, demos.action_dim, device, demos.mirror,
            ends_well=cell.critics.demos_end_well,
        )  # fmt: skip
        self.demo_bound = td.returns_to_go(demos.table[:, -2], demos.end, config.discount)
        self.bound = torch.full_like(self.replay.episode_return, UNBOUNDED)
        # Lessons, packed: what each column holds is said by `_unpack`.
        columns = 2 * demos.obs_dim + (1 + config.conservative.policy_chunks) * executed + 4
        width = columns + policy.shape[0] * policy.shape[1]
        self.pool = torch.zeros(config.pool, width, device=device)
        self.lessons = 0  # ever written to the pool
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def offline_left(self) -> int:
        """Updates of the critics, from the demonstrations alone."""
        return max(0, self.config.offline_updates - self.critics.grad_steps)

    @property
    def final(self) -> dict[str, DiffusionPolicy]:
        """What it leaves behind: the learned policy alone, and what acts: the last proposer with the critics that improve its chunks."""
        return {"policy": self.policy_learner.ema, "ranked": self.ranked}

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The executed part of the improved chunk, (B, Do) -> (B, Ta, Da)."""
        return self.ranked.sample(obs, generator)[:, : self.act_steps]

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """The same: the policy's own noise is all that explores."""
        return self.policy(obs, generator)

    def observe(self, step: ChunkStep) -> None:
        self.replay.append(step._replace(reward=step.reward + self.reward_offset))
        turn = self._turn
        self.env_steps += step.env_steps
        if self._turn > turn:
            self.ranked.net.load_state_dict(self.policy_learner.ema.net.state_dict())
        self.due["critic"] += self.config.critic_updates * step.env_steps
        self.due["policy"] += self.config.policy_updates * step.env_steps
        if bool((step.terminated | step.truncated).any()):
            self._know_returns()

    @property
    def _turn(self) -> int:
        """Which of the proposers it is."""
        last = self.config.proposers - 1
        return min(self.env_steps * self.config.proposers // self.budget, last)

    def _know_returns(self) -> None:
        """Returns bound Q where an episode is over."""
        replay = self.replay
        returns = td.returns_to_go(replay.table[:, -2], replay.end, self.config.discount)
        self.bound = torch.where(replay.episode_return.isnan(), UNBOUNDED, returns)

    def update(self) -> Metrics:
        """One step of the critics or of the policy."""
        if self.due["critic"] >= 1.0:
            self.due["critic"] -= 1.0
            return (
                self._learn_conservatively()
                if self.config.critic == "calql"
                else self._learn_in_sample()
            )
        if self.due["policy"] >= 1.0:
            self.due["policy"] -= 1.0
            return self._distil()
        return {}

    def _transitions(self, size: int) -> tuple[ChunkBatch, Tensor]:
        """Transitions of the data set and of the online stream, and their bounds (B,)."""
        found = mixture(
            self.demos, self.replay, size, self.act_steps + 1, self.config.offline_share, self.generator
        )  # fmt: skip
        bound = torch.cat([self.demo_bound[found.demo_rows], self.bound[found.rows]])
        return chunk_batch(found.window, self.config.discount), bound

    def _prepare(self) -> None:
        """Improve the policy's chunks where some transitions end; the first time, of a whole batch."""
        count = self.config.improvements if self.lessons else self.config.batch_size
        batch, bound = self._transitions(count)
        proposed = self.ranked.propose(batch.next_obs, self.generator)
        improved = self.ranked.improve(batch.next_obs, proposed, self.generator)
        some = proposed[:, : self.config.conservative.policy_chunks, : batch.chunk.shape[1]]
        parts = [*batch, bound, some, improved]
        slot = (self.lessons + torch.arange(count, device=self.pool.device)) % len(self.pool)
        self.pool[slot] = torch.cat([part.reshape(count, -1) for part in parts], 1)
        self.lessons += count

    def _lessons(self) -> Lesson:
        """A batch of the pool."""
        size, known = self.config.batch_size, min(self.lessons, len(self.pool))
        pick = torch.randint(known, (size,), generator=self.generator, device=self.pool.device)
        return self._unpack(self.pool[pick])

    def _unpack(self, rows: Tensor) -> Lesson:
        chunk, obs = self.ranked.executed, self.demos.obs_dim
        some = self.config.conservative.policy_chunks
        columns = [obs, chunk, 1, 1, obs, 1, 1, some * chunk]
        columns.append(rows.shape[1] - sum(columns))
        obs_, taken, reward, discount, next_obs, weight, bound, proposed, improved = rows.split(
            columns, 1
        )
        batch = ChunkBatch(obs_, taken, reward[:, 0], discount[:, 0], next_obs, weight[:, 0])
        return Lesson(
            batch, bound[:, 0], proposed.unflatten(1, (some, chunk)), improved.unflatten(1, self.ranked.shape)
        )  # fmt: skip

    def _learn_conservatively(self) -> Metrics:
        """Cal-QL: one step of Q."""
        self._prepare()
        lesson = self._lessons()
        batch, critics = lesson.batch, self.critics.module
        with torch.no_grad():
            executed = lesson.improved[:, : self.act_steps].flatten(1)
            q = self.critics.ema(batch.next_obs, executed)
            following = subsampled_min(q, self.config.subsample, self.generator)
            y = td.td_target(batch.reward, batch.discount, following)
        loss = critics.loss(batch.obs, batch.chunk, y, batch.weight)
        low = self._conservative(lesson)
        self.critics.step(loss + self.config.conservative.weight * low)
        return {
            "critic_loss": loss.detach(),
            "critic_conservative": low.detach(),
            "critic_value": y.mean(),
        }

    def _conservative(self, lesson: Lesson) -> Tensor:
        """`conservative_loss` of the first states of a batch, with values in units of the critics' scale."""
        config, critics = self.config.conservative, self.critics.module
        batch, n = lesson.batch, config.states
        obs, taken = batch.obs[:n], batch.chunk[:n]
        shape = (n, config.random_chunks, taken.shape[1])
        uniform = torch.rand(shape, generator=self.generator, device=obs.device) * 2.0 - 1.0
        chunk = torch.cat([taken.unsqueeze(1), uniform, lesson.proposed[:n]], 1)
        each = chunk.shape[1]
        q = critics(obs.repeat_interleave(each, 0), chunk.flatten(0, 1)).view(-1, n, each)
        q = (q - critics.mean) / critics.scale
        data_q, random_q, policy_q = q.split([1, config.random_chunks, config.policy_chunks], 2)
        bound = (lesson.bound[:n] - critics.mean) / critics.scale
        return conservative_loss(random_q, policy_q, data_q[..., 0], bound, batch.weight[:n])

    def _learn_in_sample(self) -> Metrics:
        """IQL: one step of Q and of V."""
        batch, _ = self._transitions(self.config.batch_size)
        none = batch.chunk[:, :0]
        with torch.no_grad():
            y = td.td_target(batch.reward, batch.discount, self.value.ema(batch.next_obs, none))
            q = self.critics.ema(batch.obs, batch.chunk)
            q = subsampled_min(q, self.config.subsample, self.generator)
        loss = self.critics.module.loss(batch.obs, batch.chunk, y, batch.weight)
        self.critics.step(loss)
        v, scale = self.value.module(batch.obs, none)[0], self.value.module.scale
        v_loss = value_loss(v / scale, q / scale, self.config.expectile, batch.weight)
        self.value.step(v_loss)
        return {"critic_loss": loss.detach(), "critic_v": v_loss.detach(), "critic_value": y.mean()}

    def _distil(self) -> Metrics:
        """One step of the policy's denoising loss on improved chunks."""
        if self.config.critic == "iql":
            self._prepare()
        lesson = self._lessons()
        chunk = lesson.improved
        whole = torch.ones_like(chunk[..., 0])
        loss = self.policy_learner.module.loss(lesson.batch.next_obs, chunk, whole, self.generator)
        self.policy_learner.step(loss)
        return {"policy_loss": loss.detach()}

    def state_dict(self) -> State:
        return {
            "policy": self.policy_learner.state_dict(), "proposer": self.ranked.net.state_dict(),
            "critics": self.critics.state_dict(),
            "value": self.value.state_dict(), "replay": self.replay.state_dict(), "pool": self.pool,
            "lessons": self.lessons, "due": dict(self.due), "env_steps": self.env_steps,
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        self.policy_learner.load_state_dict(state["policy"])
        self.ranked.net.load_state_dict(state["proposer"])
        self.critics.load_state_dict(state["critics"])
        self.value.load_state_dict(state["value"])
        self.replay.load_state_dict(state["replay"])
        self._know_returns()
        self.pool.copy_(state["pool"])
        self.lessons, self.due = state["lessons"], dict(state["due"])
        self.env_steps = state["env_steps"]
        self.generator.set_state(state["generator"])
