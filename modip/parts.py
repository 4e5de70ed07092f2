"""The learned parts every agent is made of: how each is built from demonstrations, and one update of each."""

from __future__ import annotations

from typing import TypeVar

import torch

from modip import critics as td
from modip.config import Cell, CriticsConfig, DiffusionConfig, WorldModelConfig
from modip.critics import Critics
from modip.diffusion import DiffusionPolicy
from modip.errors import UserError
from modip.nets import Learner
from modip.normalizer import Normalizer
from modip.replay import Replay
from modip.types import Metrics, Spec, Window
from modip.world_model import Scales, WorldModel

M = TypeVar("M", DiffusionPolicy, WorldModel, Critics)


def new_policy(cell: Cell, spec: Spec, demos: Replay) -> DiffusionPolicy:
    """An untrained policy with the demonstrations' normaliser. Raises UserError for a hidden dimension that is not there."""
    for index in cell.diffusion.hidden:
        if index >= spec.obs_dim:
            raise UserError(
                f"params.yaml: [{cell.dataset}].diffusion.hidden (value {index}): observations have dimensions "
                f"0 to {spec.obs_dim - 1}; correct or remove it"
            )
    normalizer = Normalizer.fit(demos.table[:, : spec.obs_dim])
    return DiffusionPolicy(spec.obs_dim, spec.action_dim, cell.chunk, cell.diffusion, normalizer)


def new_model(cell: Cell, spec: Spec, demos: Replay) -> WorldModel:
    """An untrained world model whose outputs are scaled by the demonstrations' statistics."""
    normalizer = Normalizer.fit(demos.table[:, : spec.obs_dim])
    obs = normalizer(demos.table[:, : spec.obs_dim])
    following = torch.arange(len(obs), device=obs.device) + 1 < demos.end
    change = (obs.roll(-1, 0) - obs)[following]
    reward = demos.table[:, -2]
    scales = Scales(change.std(0), reward.mean(), reward.std())
    return WorldModel(spec.obs_dim, spec.action_dim, cell.world_model, normalizer, scales)


def new_critics(cell: Cell, spec: Spec, demos: Replay, latent_dim: int) -> Critics:
    """Untrained critics in units of the demonstrations' returns to go."""
    returns = td.returns_to_go(demos.table[:, -2], demos.end, cell.critics.discount)
    return Critics(latent_dim, spec.action_dim, cell.critics, returns.mean(), returns.std())


def learner(
    module: M,
    config: DiffusionConfig | WorldModelConfig | CriticsConfig,
    *,
    lr: float,
    num_updates: int,
) -> Learner[M]:
    """A module with its section's optimiser; the rate decays over `num_updates`."""
    return Learner(
        module, lr=lr, weight_decay=config.weight_decay, grad_clip=config.grad_clip,
        ema_decay=config.ema_decay, num_updates=num_updates,
    )  # fmt: skip


def update_policy(
    policy: Learner[DiffusionPolicy], window: Window, generator: torch.Generator
) -> Metrics:
    """One step of the denoising loss on the window's actions."""
    loss = policy.module.loss(window.obs[:, 0], window.action, window.mask, generator)
    policy.step(loss)
    return {"policy_loss": loss.detach()}


def update_model(model: Learner[WorldModel], window: Window) -> Metrics:
    """One step of the model's multi-step loss; window has loss_horizon + 1 rows."""
    loss, parts = model.module.loss(window, model.ema)
    model.step(loss)
    return {f"model_{name}": value for name, value in parts.items()}


def update_critics(
    critics: Learner[Critics],
    model: WorldModel,
    window: Window,
    config: CriticsConfig,
    policy: DiffusionPolicy,
    generator: torch.Generator,
) -> Metrics:
    """One step of Q and V on n-step targets; window has n_step + 1 rows, `model` encodes."""
    reward, discount, row, weight = td.n_step(window, config.discount)
    batch = torch.arange(len(row), device=row.device)
    next_obs = window.obs[batch, row]
    with torch.no_grad():
        both = model.encode(torch.cat([window.obs[:, 0], next_obs]))
        latent, next_latent = both.chunk(2)
        if config.td_target == "state_value":
            next_value = critics.ema.v(next_latent)
        else:
            next_value = critics.ema.q(next_latent, policy.sample(next_obs, generator)[:, 0])
        y = td.td_target(reward, discount, next_value)
    loss, parts = td.loss(
        critics.module, critics.ema, latent, window.action[:, 0], y, weight, config.expectile
    )
    critics.step(loss)
    return {f"critic_{name}": value for name, value in parts.items()}
