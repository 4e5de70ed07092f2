"""The loops: `Fit` offline, `Interaction` online, and `evaluate` for every figure. Agents are known by protocol only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from modip.envs import BatchedEnv
from modip.types import Agent, ChunkPolicy, ChunkStep, Learns, Metrics, State

ActFn = Callable[[Tensor, torch.Generator], Tensor]
"""(B, Do) -> (B, Ta, Da), drawing its noise from the generator."""


class Rival(Agent, Protocol):
    """An agent that learns on its own, from a cloned policy or none: it says how long it runs, and what it leaves behind."""

    env_steps: int
    budget: int

    @property
    def final(self) -> Mapping[str, ChunkPolicy]:
        """What to save and to judge, as it stands, by the names that `modip.agents.AGENTS` gives."""
        ...


@torch.no_grad()
def run_chunk(
    env: BatchedEnv, chunk: Tensor, rows: Tensor, on_step: Callable[[Tensor], None] | None = None
) -> tuple[ChunkStep, Tensor]:
    """Execute chunk (R, Ta, Da) in the environments `rows` (R,); an episode that ends inside rests there.

    Returns what they answered, and their success so far, (R,) bool. `on_step(rows)` follows each environment step.
    """
    count, length, _ = chunk.shape
    obs, reward, terminated, truncated, mask = [], [], [], [], []
    running = torch.ones(count, dtype=torch.bool)
    success = torch.zeros(count, dtype=torch.bool)
    for i in range(length):
        mask.append(running)
        obs.append(env.obs[rows].clone())
        action = torch.zeros(len(env.obs), chunk.shape[2])
        action[rows] = chunk[:, i]
        result = env.step(action, rows[running])
        reward.append(torch.where(running, result.reward[rows], 0.0))
        terminated.append(result.terminated[rows] & running)
        truncated.append(result.truncated[rows] & running)
        success = torch.where(running, result.success[rows], success)
        running = running & ~(terminated[-1] | truncated[-1])
        if on_step is not None:
            on_step(rows)
    stacked = [torch.stack(x, 1) for x in (obs, reward, terminated, truncated, mask)]
    return ChunkStep(stacked[0], chunk, *stacked[1:]), success


@dataclass
class Episodes:
    """What an evaluation saw, one entry per episode, in the order of its seeds."""

    returns: list[float]
    success: list[bool]
    lengths: list[int]
    max_reward: list[float]


@torch.no_grad()
def evaluate(
    act: ActFn,
    env: BatchedEnv,
    seeds: Sequence[int],
    generator: torch.Generator,
    *,
    on_step: Callable[[Tensor], None] | None = None,
    on_chunk: Callable[[int, Tensor, ChunkStep], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Episodes:
    """One episode per seed, to its own end.

    `on_step(rows)` follows each environment step (a camera), `on_chunk(first, rows, step)` each chunk of the batch
    that begins with episode `first` (a recorder), and `on_done(n)` counts finished episodes.
    """
    batch = len(env.obs)
    out = Episodes(
        [0.0] * len(seeds), [False] * len(seeds), [0] * len(seeds), [-np.inf] * len(seeds)
    )
    for first in range(0, len(seeds), batch):
        these = list(seeds[first : first + batch])
        env.reset(range(len(these)), these)
        rows = torch.arange(len(these))
        while len(rows):
            obs = env.obs[rows].to(generator.device)
            step, success = run_chunk(env, act(obs, generator).cpu(), rows, on_step)
            if on_chunk is not None:
                on_chunk(first, rows, step)
            total = step.reward.sum(1).tolist()
            peak = step.reward.masked_fill(~step.mask, -torch.inf).amax(1).tolist()
            counts = step.mask.sum(1).tolist()
            ended = (step.terminated | step.truncated).any(1)
            for i, row in enumerate(rows.tolist()):
                episode = first + row
                out.returns[episode] += total[i]
                out.lengths[episode] += counts[i]
                out.max_reward[episode] = max(out.max_reward[episode], peak[i])
                out.success[episode] = bool(success[i])
            rows = rows[~ended]
            if on_done is not None and bool(ended.any()):
                on_done(int(ended.sum()))
    return out


class Fit:
    """Offline learning, one update per `advance`, until there is nothing to learn."""

    def __init__(self, learner: Learns) -> None:
        self.learner = learner
        self.env_steps = 0
        self.grad_steps = 0
        self.offline_left = 0

    def advance(self) -> Metrics | None:
        """One update's metrics; None at the end."""
        metrics = self.learner.update()
        if not metrics:
            return None
        self.grad_steps += 1
        return metrics

    def state_dict(self) -> State:
        return {"learner": self.learner.state_dict(), "grad_steps": self.grad_steps}

    def load_state_dict(self, state: State) -> None:
        self.learner.load_state_dict(state["learner"])
        self.grad_steps = state["grad_steps"]


class Interaction:
    """An agent at work: acts when it has nothing to learn, learns when it has, until the budget is spent.

    Between two calls of `advance` the whole is a state that can be saved and resumed exactly: the running episodes
    are replayed from their seeds.
    """

    def __init__(
        self,
        agent: Agent,
        env: BatchedEnv,
        *,
        env_steps: int,
        episode_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Training episodes start from seeds of their own range, far from the evaluation's.

        They are cut (truncated) after the chunk in which they reach `episode_steps` (0: the environment's own limit).
        The environments' first episodes are cut at different ages, so that starts are spread evenly over time.
        """
        self.agent, self.env, self.budget = agent, env, env_steps
        self.episode_steps = episode_steps
        count = env.num_envs
        self.limits = [episode_steps * (row + 1) // count for row in range(count)]
        self.next_seed = 1_000_000 * (seed + 1)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.env_steps = 0
        self.grad_steps = 0
        self._reset(range(env.num_envs))

    def _reset(self, rows: Sequence[int]) -> None:
        self.env.reset(rows, range(self.next_seed, self.next_seed + len(rows)))
        self.next_seed += len(rows)

    @property
    def offline_left(self) -> int:
        """Updates that the agent has yet to learn offline, before its first environment step."""
        return self.agent.offline_left

    def advance(self) -> Metrics | None:
        """One update, or one chunk in every environment: the update's metrics, {} after a chunk, None at the end."""
        metrics = self.agent.update()
        if metrics:
            self.grad_steps += 1
            return metrics
        if self.env_steps >= self.budget:
            return None
        obs = self.env.obs.to(self.generator.device)
        chunk = self.agent.act(obs, self.generator, explore=True).cpu()
        step, _ = run_chunk(self.env, chunk, torch.arange(self.env.num_envs))
        if self.episode_steps:
            # A chunk that an end cut short is masked there, so the last step of the others is all there is to mark.
            cut = (
                step.mask[:, -1]
                & ~step.terminated[:, -1]
                & (self.env.steps >= torch.tensor(self.limits))
            )
            step.truncated[:, -1] |= cut
        self.env_steps += step.env_steps
        self.agent.observe(step)
        ended = (step.terminated | step.truncated).any(1).nonzero().flatten().tolist()
        if ended:
            self._reset(ended)
            for row in ended:
                self.limits[row] = self.episode_steps
        return {}

    def state_dict(self) -> State:
        return {
            "agent": self.agent.state_dict(),
            "env": self.env.state_dict(),
            "generator": self.generator.get_state(),
            "next_seed": self.next_seed,
            "limits": list(self.limits),
            "env_steps": self.env_steps,
            "grad_steps": self.grad_steps,
        }

    def load_state_dict(self, state: State) -> None:
        self.agent.load_state_dict(state["agent"])
        self.env.load_state_dict(state["env"])
        self.generator.set_state(state["generator"])
        self.next_seed, self.limits = state["next_seed"], list(state["limits"])
        self.env_steps, self.grad_steps = state["env_steps"], state["grad_steps"]
