"""DPPO (Ren et al., ICLR 2025, arXiv 2409.00588): PPO through the sampling chain of a diffusion policy.

A sampling step x_k -> x_{k-1} is a Gaussian action of a Markov decision process inside each decision, so its
probability, and PPO's ratio, are known in closed form. With i = 0 at the noisiest of the last K' steps, which alone are
fine-tuned,

    L = -mean_{s, i} min(r_i A_i, clip(r_i, 1 - e_i, 1 + e_i) A_i),   A_i = g^(K' - 1 - i) * GAE(s)

where r_i is the ratio of step i's probability to that when the chunk was executed, g the denoising discount, GAE(s) the
environment's advantage of the whole chunk, and e_i grows exponentially from clip_base to clip. While exploring, every
step's deviation is at least min_sampling_std. Log-probabilities are bounded, averaged over a chunk's executed numbers.
Frozen: the earlier sampling steps, which run with the clone. Learning: a copy of its network for the last K' steps, and
a value of observations. Judged with the ordinary sampler, without the minimum deviation.

A truncated episode bootstraps from the last observation that was seen, one step before its end.

Deviations from the authors' code, each with its reason:
- a minibatch is a set of decisions with all their K' steps, not of single steps (their first release did so): the
  observation is encoded once for the chain;
- the value is in units of the demonstrations' returns, and advantages are normalised over an iteration: rewards need
  no running scale;
- rollouts and minibatches are as many times smaller as the budget is, of thousands of steps instead of tens of millions;
- the value can start from the demonstrations (value_updates of TD), since a budget this small has no iterations to spare
  for a warm-up of the value;
- what is executed is clamped to [-1, 1], but the chain is remembered as it was drawn: its probability is that of a
  Gaussian. Noise is not cut at three deviations, for the same reason;
- LayerNorm + SiLU networks and decaying rates are those of all agents here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip import critics as td
from modip.chain_ppo import ChainPPO
from modip.config import Cell
from modip.diffusion import DiffusionPolicy
from modip.replay import Replay
from modip.types import ChunkStep, Metrics, State


class DPPO:
    """PPO over the last sampling steps of `policy`; `demos` set the value's scale and start it."""

    def __init__(self, policy: DiffusionPolicy, cell: Cell, demos: Replay, *, seed: int) -> None:
        config, run = cell.dppo, cell.modip
        self.config = config
        self.reward_offset, self.n_step = cell.critics.reward_offset, cell.critics.n_step
        self.demos = demos.ended() if cell.critics.demos_end_well else demos
        self.budget, self.env_steps = round(config.budget * run.env_steps), 0
        # Rounded down: a chunk takes at most act_steps of each environment, so the last rollout is full in time.
        chunks = self.budget // (run.num_envs * policy.act_steps)
        iterations = max(1, round(self.budget / config.rollout_steps))
        decisions = max(1, chunks // iterations)
        self.ppo = ChainPPO(
            policy, config, self.demos, streams=run.num_envs, decisions=decisions, iterations=iterations,
            value_updates=config.value_updates, bc_coef=0.0, seed=seed,
        )  # fmt: skip

    @property
    def offline_left(self) -> int:
        """Updates of the value, from the demonstrations."""
        return max(0, self.config.value_updates - self.ppo.value.grad_steps)

    @property
    def final(self) -> dict[str, DiffusionPolicy]:
        """What it leaves behind: the fine-tuned policy."""
        return {"policy": self.ppo.policy.ema}

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The chunk by the ordinary sampler, (B, Do) -> (B, Ta, Da)."""
        return self.ppo.policy.ema.sample(obs, generator)[:, : self.ppo.act_steps]

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """(B, Do) -> (B, Ta, Da); to explore, with the minimum deviation at every sampling step."""
        return self.ppo.act(obs, generator) if explore else self.policy(obs, generator)

    def observe(self, step: ChunkStep) -> None:
        self.env_steps += step.env_steps
        self.ppo.observe(step._replace(reward=step.reward + self.reward_offset))

    def update(self) -> Metrics:
        """One step of the value on demonstrations, or one minibatch of a full rollout."""
        return self._start_value() if self.offline_left else self.ppo.update()

    def _start_value(self) -> Metrics:
        ppo, config = self.ppo, self.config
        rows = self.demos.sample_rows(config.batch_size, ppo.generator)
        window = self.demos.window(rows, self.n_step + 1, ppo.generator)
        reward, discount, row, weight = td.n_step(window, config.discount)
        obs = window.obs[:, 0]
        with torch.no_grad():
            following = ppo.value_of(window.obs[torch.arange(len(row), device=row.device), row])
            target = reward + discount * following
        return {"critic_loss": ppo.fit_value(obs, target, weight), "critic_value": target.mean()}

    def state_dict(self) -> State:
        return {"ppo": self.ppo.state_dict(), "env_steps": self.env_steps}

    def load_state_dict(self, state: State) -> None:
        self.ppo.load_state_dict(state["ppo"])
        self.env_steps = state["env_steps"]
