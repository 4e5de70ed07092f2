"""DSRL (Wagenmaker et al., CoRL 2025, arXiv 2506.15799): steer a frozen diffusion policy by its initial noise.

The policy is sampled without further noise (DDIM), so a chunk is a function of observation and initial noise w. SAC
(Haarnoja et al. 2018) then treats w as the action: an actor proposes w in [-bound, bound], critics judge it. Frozen:
the diffusion policy, to the bit. Learning: the actor, the critics, SAC's temperature.

- `critic: noise` (DSRL-SAC): Q(s, w) learns r + discount * (min_e Q(s', w') - temperature * log p(w'|s')).
- `critic: aliased` (DSRL-NA): Q(s, a) learns the same on executed actions, with a' the policy's chunk from w'; a second
  critic Q(s, w) learns Q(s, policy(s, w)), so that all noise that leads to one action is judged alike. Actions are in
  the demonstrations too, so they can be in its batches.
- the actor maximises min_e Q(s, w) - temperature * log p(w|s); the temperature holds the entropy at its target.

r and the discount are those of a whole chunk. A truncated episode's last chunk bootstraps from the last observation
that was seen, one step before its end.

Deviations from the authors' code, each with its reason:
- the initial rollouts of the base policy are part of the budget, so that agents are compared at equal steps;
- Q(s, w) is distilled half on the policy's own noise and half on the actor's: in many dimensions the actor's, near
  the bounds, is far from what Gaussian noise ever shows it;
- LayerNorm + SiLU networks, averaged targets and decaying rates are those of all agents here, critics in units of the
  demonstrations' returns: rewards of any size need no other rates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modip.chunk_critics import ChunkCritics, chunk_batch
from modip.config import Cell
from modip.diffusion import DiffusionPolicy
from modip.nets import Learner, M
from modip.replay import Replay, mixed
from modip.steering import SteeredPolicy
from modip.types import ChunkStep, Metrics, State, Window


def soft_target(
    reward: Tensor, discount: Tensor, next_q: Tensor, next_log_prob: Tensor, temperature: Tensor
) -> Tensor:
    """SAC's target (B,): reward and discount (B,), next_q (E, B), next_log_prob (B,)."""
    return reward + discount * (next_q.amin(0) - temperature * next_log_prob)


def actor_loss(q: Tensor, log_prob: Tensor, temperature: Tensor) -> Tensor:
    """Mean of temperature * log_prob (B,) - min_e q (E, B)."""
    return (temperature * log_prob - q.amin(0)).mean()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Falls with the temperature where the entropy, -log_prob (B,), is above its target."""
    return -(log_temperature * (log_prob.detach() + target_entropy)).mean()


class Temperature(nn.Module):
    """SAC's weight of the entropy, learned as a logarithm."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(initial).log())


class DSRL:
    """Noise-space SAC over the frozen `policy`; `demos` set the critics' scale, and enter by `offline_share`."""

    def __init__(self, policy: DiffusionPolicy, cell: Cell, demos: Replay, *, seed: int) -> None:
        config, run = (
            cell.dsrl,
            cell.modip,
        )  # the budget is modip's, so that agents are compared at equal steps
        device = demos.table.device
        self.config, self.act_steps, self.batch_size = (
            config,
            cell.chunk.act_steps,
            config.batch_size,
        )
        self.reward_offset = cell.critics.reward_offset
        self.demos = demos.ended() if cell.critics.demos_end_well else demos
        self.steered = SteeredPolicy.over(policy, config.actor)
        self.updates_due, self.env_steps = 0.0, 0
        self.budget = run.env_steps
        self.initial_steps = config.initial_share * self.budget
        noise_dim = policy.shape[0] * policy.shape[1]

        def critics(chunk_dim: int) -> ChunkCritics:
            net = ChunkCritics(
                self.steered.normalizer, chunk_dim, config.ensemble, config.width, config.layers
            )
            return net.fit_scale(self.demos, config.discount).to(device)

        total = int(config.updates * run.env_steps)
        self.aliased = config.critic == "aliased"
        self.actor = self._learner(self.steered.actor.requires_grad_(True), total)
        self.temperature = self._learner(Temperature(config.initial_temperature).to(device), total)
        # What TD learns: of noise, or of the actions that it leads to. And what the actor climbs.
        self.critics = self._learner(
            critics(self.act_steps * policy.shape[1] if self.aliased else noise_dim), total
        )
        self.noise_critics = (
            self._learner(critics(noise_dim), total * config.distillations)
            if self.aliased
            else self.critics
        )
        # Every chunk takes at least one step of each environment, so this many chunks spend the budget.
        chunks = -(-run.env_steps // run.num_envs)
        self.replay = Replay(
            run.num_envs,
            chunks * self.act_steps,
            demos.obs_dim,
            demos.action_dim,
            device,
            demos.mirror,
        )
        # Of each executed chunk: its first row in the replay, and the noise it began with.
        self.first = torch.zeros(run.num_envs * chunks, dtype=torch.int64, device=device)
        self.noise = torch.zeros(run.num_envs * chunks, noise_dim, device=device)
        self.chunks = 0
        self.acted = self.noise[:0]  # the noise of the chunks that are being executed
        self.generator = torch.Generator(device).manual_seed(seed)

    def _learner(self, module: M, num_updates: int) -> Learner[M]:
        config = self.config
        return Learner(
            module, lr=config.lr, weight_decay=0.0, grad_clip=config.grad_clip, ema_decay=config.ema_decay,
            num_updates=num_updates,
        )  # fmt: skip

    offline_left = 0

    @property
    def final(self) -> dict[str, DiffusionPolicy]:
        """What it leaves behind: the policy with its actor."""
        return {"policy": self.steered}

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The chunk from the actor's mean, (B, Do) -> (B, Ta, Da)."""
        return self.steered.sample(obs, generator)[:, : self.act_steps]

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """(B, Do) -> (B, Ta, Da); to explore, from the actor's sampled noise, or first from the policy's own."""
        if not explore:
            return self.policy(obs, generator)
        if self.env_steps < self.initial_steps:
            self.acted = self._gaussian(len(obs), generator)
        else:
            self.acted, _ = self.steered.actor.sample(self.steered.normalizer(obs), generator)
        return self._steer(obs, self.acted, generator)

    def _gaussian(self, size: int, generator: torch.Generator) -> Tensor:
        """The policy's own noise, as far as the actor can choose it: (size, W)."""
        shape, bound = (size, self.noise.shape[1]), self.config.actor.bound
        noise = torch.randn(shape, generator=generator, device=self.noise.device)
        return noise.clamp(-bound, bound)

    def _steer(self, obs: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        return self.steered.sample(obs, generator, noise)[:, : self.act_steps]

    def observe(self, step: ChunkStep) -> None:
        streams = torch.arange(len(step.mask), device=self.first.device)
        rows = slice(self.chunks, self.chunks + len(streams))
        self.first[rows] = streams * self.replay.capacity + self.replay.filled
        self.noise[rows] = self.acted
        self.chunks += len(streams)
        self.replay.append(step._replace(reward=step.reward + self.reward_offset))
        self.env_steps += step.env_steps
        self.updates_due += self.config.updates * step.env_steps

    def update(self) -> Metrics:
        """One step of the critics, the actor and the temperature."""
        if self.updates_due < 1.0 or self.env_steps < self.initial_steps:
            return {}
        self.updates_due -= 1.0
        window, noise = self._batch()
        obs = window.obs[:, 0]
        loss, value = self._td_loss(window, noise)
        self.critics.step(loss)
        metrics = {"critic_loss": loss.detach(), "critic_value": value}
        if self.aliased:
            for _ in range(self.config.distillations):
                metrics["critic_distillation"] = self._distil(self._batch()[0].obs[:, 0])
        critics = self.noise_critics.module.requires_grad_(False)
        chosen, log_prob = self.actor.module.sample(self.steered.normalizer(obs), self.generator)
        log_temperature = self.temperature.module.log
        loss = actor_loss(critics(obs, chosen), log_prob, log_temperature.detach().exp())
        self.actor.step(loss)
        critics.requires_grad_(True)
        self.temperature.step(
            temperature_loss(log_temperature, log_prob, self.config.target_entropy)
        )
        return metrics | {
            "actor_loss": loss.detach(),
            "actor_entropy": -log_prob.detach().mean(),
            "temperature": log_temperature.detach().exp(),
        }

    def _batch(self) -> tuple[Window, Tensor]:
        """Windows of Ta + 1 rows, and the noise their first chunk began with (of no meaning where it is aliased)."""
        size, length, generator = self.batch_size, self.act_steps + 1, self.generator
        if not self.aliased:
            pick = torch.randint(
                self.chunks, (size,), generator=generator, device=self.first.device
            )
            return self.replay.window(self.first[pick], length), self.noise[pick]
        share = self.config.offline_share
        return mixed(self.demos, self.replay, size, length, share, generator), self.noise[:0]

    def _td_loss(self, window: Window, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The critics' loss, and their mean value: of the executed actions, or of the noise."""
        batch = chunk_batch(window, self.config.discount)
        next_obs = batch.next_obs
        with torch.no_grad():
            actor, normalizer = self.actor.module, self.steered.normalizer
            following, log_prob = actor.sample(normalizer(next_obs), self.generator)
            if self.aliased:
                following = self._steer(next_obs, following, self.generator).flatten(1)
            next_q = self.critics.ema(next_obs, following)
            temperature = self.temperature.module.log.exp()
            y = soft_target(batch.reward, batch.discount, next_q, log_prob, temperature)
        taken = batch.chunk if self.aliased else noise
        return self.critics.module.loss(batch.obs, taken, y, batch.weight), y.mean()

    def _distil(self, obs: Tensor) -> Tensor:
        """One step of Q(s, w) towards Q(s, policy(s, w)) for obs (B, Do)."""
        half = len(obs) // 2
        with torch.no_grad():
            chosen, _ = self.actor.module.sample(
                self.steered.normalizer(obs[half:]), self.generator
            )
            noise = torch.cat([self._gaussian(half, self.generator), chosen])
            chunk = self._steer(obs, noise, self.generator).flatten(1)
            y = self.critics.module(obs, chunk)
        loss = self.noise_critics.module.loss(obs, noise, y, torch.ones_like(y[0]))
        self.noise_critics.step(loss)
        return loss.detach()

    def state_dict(self) -> State:
        return {
            "steered": self.steered.state_dict(), "actor": self.actor.state_dict(),
            "temperature": self.temperature.state_dict(), "critics": self.critics.state_dict(),
            "noise_critics": self.noise_critics.state_dict(), "replay": self.replay.state_dict(),
            "first": self.first, "noise": self.noise, "chunks": self.chunks, "updates_due": self.updates_due,
            "env_steps": self.env_steps, "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        self.steered.load_state_dict(state["steered"])
        self.actor.load_state_dict(state["actor"])
        self.temperature.load_state_dict(state["temperature"])
        self.critics.load_state_dict(state["critics"])
        self.noise_critics.load_state_dict(state["noise_critics"])
        self.replay.load_state_dict(state["replay"])
        self.first.copy_(state["first"])
        self.noise.copy_(state["noise"])
        self.chunks, self.updates_due = state["chunks"], state["updates_due"]
        self.env_steps = state["env_steps"]
        self.generator.set_state(state["generator"])
