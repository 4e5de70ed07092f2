"""Critics: pairs of Q(z, a) and V(z), trained in-sample on policy-independent n-step targets.

Member i of V bootstraps member i of Q, and learns an expectile of it (IQL, Kostrikov et al. 2022). No action of
the diffusion policy enters, so no denoising happens in a critic update. The ablation `td_target: policy_action`
replaces V(s') by Q(s', a') with a' sampled from the policy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modip.config import CriticsConfig
from modip.nets import EnsembleMLP
from modip.returns import chunk_reward_and_discount
from modip.types import Window


class Critics(nn.Module):
    """E pairs of Q and V over latents; values in units of reward, networks in units of the data's returns."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self, latent_dim: int, action_dim: int, config: CriticsConfig, mean: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.ensemble = config.ensemble
        self.q_net = EnsembleMLP(
            config.ensemble, latent_dim + action_dim, 1, config.width, config.layers
        )
        self.v_net = EnsembleMLP(config.ensemble, latent_dim, 1, config.width, config.layers)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clamp(min=1e-3))

    def q(self, latent: Tensor, action: Tensor) -> Tensor:
        """(E, B, Dz) or (B, Dz), action likewise -> (E, B)."""
        x = torch.cat([latent, action], -1)
        return self.mean + self.scale * self.q_net(x.expand(self.ensemble, *x.shape[-2:])).squeeze(
            -1
        )

    def v(self, latent: Tensor) -> Tensor:
        """(E, B, Dz) or (B, Dz) -> (E, B)."""
        return self.mean + self.scale * self.v_net(
            latent.expand(self.ensemble, *latent.shape[-2:])
        ).squeeze(-1)


def returns_to_go(reward: Tensor, end: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards from each row to the end of its episode, (N,): what sets the critics' scale."""
    out = reward.double().clone()
    following = torch.arange(len(reward), device=reward.device) + 1 < end
    total = 0.0
    values, inside = out.tolist(), following.tolist()
    for i in range(len(values) - 1, -1, -1):
        total = values[i] + (discount * total if inside[i] else 0.0)
        values[i] = total
    return torch.tensor(values, dtype=torch.float32, device=reward.device)


def n_step(window: Window, discount: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In-sample n-step targets of window (L = n + 1 rows).

    Returns the reward sum (B,), the bootstrap's discount (B,), the bootstrap's row (B,), and the weight (B,): 0 for
    the last row of a truncated episode, which has neither successor nor end and so no target.
    """
    n = window.reward.shape[1] - 1
    rows = window.mask.sum(1).long()
    ended = (window.terminated[:, :n] * window.mask[:, :n]).amax(1)
    # A terminated episode uses its last reward; otherwise the last row is where the bootstrap stands.
    steps = torch.where(ended > 0, rows.clamp(max=n), (rows - 1).clamp(max=n))
    reward, bootstrap = chunk_reward_and_discount(window.reward[:, :n], ended > 0, steps, discount)
    return reward, bootstrap, (rows - 1).clamp(max=n), (steps > 0).float()


def td_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """reward (B,) + discount (B,) * next_value (E, B) -> (E, B)."""
    return reward + discount * next_value


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(error < 0)| error^2, elementwise."""
    return torch.where(error > 0, expectile, 1.0 - expectile) * error.square()


def loss(
    critics: Critics,
    target: Critics,
    latent: Tensor,
    action: Tensor,
    y: Tensor,
    weight: Tensor,
    expectile: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Q to the targets, V to an expectile of the averaged Q.

    latent (B, Dz), action (B, Da), y (E, B), weight (B,) -> scalar. `target` is the averaged copy.
    """
    with torch.no_grad():
        q_target = target.q(latent, action)
    q = critics.q(latent, action)
    v = critics.v(latent)
    count = weight.sum().clamp(min=1.0) * critics.ensemble
    q_loss = (((q - y) / critics.scale).square() * weight).sum() / count
    v_loss = (expectile_loss((q_target - v) / critics.scale, expectile) * weight).sum() / count
    return q_loss + v_loss, {"q": q_loss.detach(), "v": v_loss.detach(), "value": v.detach().mean()}
