"""Behaviour cloning: the diffusion policy trained on demonstrations by its denoising loss, and nothing else.

As an agent it is the control: it takes no environment step and trains on for as many updates as another agent gives
its policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip.config import Cell
from modip.diffusion import DiffusionPolicy
from modip.parts import learner, update_policy
from modip.replay import Replay
from modip.types import ChunkStep, Metrics, State


class BC:
    """`num_updates` of BC on `demos`, with the rate decaying from `lr`."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        cell: Cell,
        demos: Replay,
        *,
        num_updates: int,
        lr: float,
        seed: int,
    ) -> None:
        self.learner = learner(policy, cell.diffusion, lr=lr, num_updates=num_updates)
        self.demos, self.batch_size, self.num_updates = (
            demos,
            cell.diffusion.batch_size,
            num_updates,
        )
        self.generator = torch.Generator(demos.table.device).manual_seed(seed)

    offline_left = 0

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        policy = self.learner.ema
        return policy.sample(obs, generator)[:, : policy.act_steps]

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        return self.policy(obs, generator)

    def observe(self, step: ChunkStep) -> None:
        raise RuntimeError("bc learns from demonstrations alone")

    def update(self) -> Metrics:
        if self.learner.grad_steps >= self.num_updates:
            return {}
        rows = self.demos.sample_rows(self.batch_size, self.generator)
        window = self.demos.window(rows, self.learner.module.shape[0], self.generator)
        return update_policy(self.learner, window, self.generator)

    def state_dict(self) -> State:
        return {"learner": self.learner.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self.learner.load_state_dict(state["learner"])
        self.generator.set_state(state["generator"])
