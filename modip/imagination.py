"""What an action sequence is worth in the model: rewards on the way, the critics at the end."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from modip.critics import Critics
from modip.world_model import WorldModel

ActionFn = Callable[[Tensor], Tensor]
"""The policy's action at observations, (B, Do) -> (B, Da)."""


def planned_return(
    model: WorldModel,
    critics: Critics,
    latent: Tensor,
    action: Tensor,
    discount: float,
    terminal_action: ActionFn | None = None,
) -> Tensor:
    """Discounted return of each critic member: latent (B, Dz), action (B, N, h, Da) -> (E, B, N).

    sum_i discount^i alive_i r_i + discount^h alive_h V(z_h), where alive is the model's probability of no
    termination. Critic member j judges the latents of model member j // (critics / model members), so the spread over
    members covers both. With `terminal_action` the end is Q(z_h, a) instead (the paper's ablation): it costs one
    denoising of every sequence and model member.
    """
    b, n, h, da = action.shape
    members, copies = model.config.ensemble, critics.ensemble // model.config.ensemble

    def judged(x: Tensor) -> Tensor:
        """(model members, ...) as each critic member reads it, (E, ...)."""
        return x.unsqueeze(1).expand(-1, copies, *x.shape[1:]).flatten(0, 1)

    start = latent.unsqueeze(1).expand(b, n, -1).flatten(0, 1)
    out = model.rollout(start, action.reshape(b * n, h, da))
    end = judged(out.latent)
    if terminal_action is None:
        value = critics.v(end)
    else:
        chosen = terminal_action(model.decode(out.latent.flatten(0, 1)))
        value = critics.q(end, judged(chosen.view(members, b * n, da)))
    weights = out.reward.new_tensor([discount**i for i in range(h)])
    reward = (out.reward * out.alive[..., :-1]) @ weights
    total = judged(reward) + judged(discount**h * out.alive[..., -1]) * value
    return total.view(-1, b, n)
