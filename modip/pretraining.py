"""Offline training of the world model, then of the critics on its latents, from demonstrations alone."""

from __future__ import annotations

import torch

from modip.config import Cell
from modip.critics import Critics
from modip.diffusion import DiffusionPolicy
from modip.parts import learner, update_critics, update_model
from modip.replay import Replay
from modip.types import Metrics, State
from modip.world_model import WorldModel


class Pretraining:
    """First `world_model.updates`, then `critics.updates`; the averaged weights are the result."""

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
        self.cell, self.demos, self.policy = cell, demos, policy
        self.critic_demos = demos.ended() if cell.critics.demos_end_well else demos
        self.model = learner(
            model, cell.world_model, lr=cell.world_model.lr, num_updates=cell.world_model.updates
        )
        self.critics = learner(
            critics, cell.critics, lr=cell.critics.lr, num_updates=cell.critics.updates
        )
        self.generator = torch.Generator(demos.table.device).manual_seed(seed)

    def update(self) -> Metrics:
        if self.model.grad_steps < self.cell.world_model.updates:
            config = self.cell.world_model
            rows = self.demos.sample_rows(config.batch_size, self.generator)
            return update_model(
                self.model, self.demos.window(rows, config.loss_horizon + 1, self.generator)
            )
        if self.critics.grad_steps < self.cell.critics.updates:
            rows = self.critic_demos.sample_rows(self.cell.critics.batch_size, self.generator)
            window = self.critic_demos.window(rows, self.cell.critics.n_step + 1, self.generator)
            return update_critics(
                self.critics, self.model.ema, window, self.cell.critics, self.policy, self.generator
            )
        return {}

    def state_dict(self) -> State:
        return {
            "model": self.model.state_dict(),
            "critics": self.critics.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        self.critics.load_state_dict(state["critics"])
        self.generator.set_state(state["generator"])
