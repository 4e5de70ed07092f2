"""The usual way to do what modip does differently: what the benchmarks compare with, checked equal in the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modip.diffusion import DiffusionPolicy
from modip.replay import Replay
from modip.types import Window


class SchedulerOutput(NamedTuple):
    """What a step of a scheduler answers."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Scheduler:
    """DDPM with the schedule in tensors, looked up and recomputed at every step, as in the common libraries."""

    def __init__(self, alpha_bar: Tensor) -> None:
        self.alphas_cumprod = alpha_bar
        self.one = torch.tensor(1.0)
        self.timesteps = torch.arange(len(alpha_bar) - 1, -1, -1)

    def variance(self, t: Tensor) -> Tensor:
        alpha_prod = self.alphas_cumprod[t]
        alpha_prod_prev = self.alphas_cumprod[t - 1] if t > 0 else self.one
        beta = 1 - alpha_prod / alpha_prod_prev
        return torch.clamp((1 - alpha_prod_prev) / (1 - alpha_prod) * beta, min=1e-20)

    def step(
        self, output: Tensor, t: Tensor, sample: Tensor, generator: torch.Generator
    ) -> SchedulerOutput:
        alpha_prod = self.alphas_cumprod[t]
        alpha_prod_prev = self.alphas_cumprod[t - 1] if t > 0 else self.one
        beta_prod = 1 - alpha_prod
        beta_prod_prev = 1 - alpha_prod_prev
        alpha = alpha_prod / alpha_prod_prev
        beta = 1 - alpha
        original = output.clamp(-1.0, 1.0)
        original_coefficient = alpha_prod_prev**0.5 * beta / beta_prod
        sample_coefficient = alpha**0.5 * beta_prod_prev / beta_prod
        previous = original_coefficient * original + sample_coefficient * sample
        if t > 0:
            noise = torch.randn(sample.shape, generator=generator, device=sample.device)
            previous = previous + self.variance(t) ** 0.5 * noise
        return SchedulerOutput(previous, original)


@torch.no_grad()
def sample(policy: DiffusionPolicy, obs: Tensor, generator: torch.Generator) -> Tensor:
    """`policy.sample` with a scheduler object: the network told the step as a tensor, the observation each time."""
    scheduler = Scheduler(policy.alpha_bar)
    net = policy.net
    x = torch.randn((len(obs), policy.shape[0] * policy.shape[1]), generator=generator)
    for t in scheduler.timesteps:
        step = t.expand(len(obs))
        condition = net.obs(policy.normalizer(obs)) + net.time(step)
        h = net.inp(x) + condition
        for norm, up, down in zip(net.norms, net.ups, net.downs, strict=True):
            h = h + down(torch.nn.functional.silu(up(torch.nn.functional.silu(norm(h)))))
        output = net.out(torch.nn.functional.silu(h))
        x = scheduler.step(output, t, x, generator).prev_sample
    return x.view(len(obs), *policy.shape)


def window(replay: Replay, rows: Tensor, length: int) -> Window:
    """`replay.window` item by item, as a Dataset gives them and a loader stacks them."""
    items = []
    for row in rows.tolist():
        end = int(replay.end[row])
        got = replay.table[row : min(row + length, end)]
        missing = length - len(got)
        got = torch.cat([got, got[-1:].expand(missing, -1)]) if missing else got
        mask = torch.ones(length)
        mask[length - missing :] = 0.0
        do = replay.obs_dim
        items.append((got[:, :do], got[:, do:-2], got[:, -2], got[:, -1], mask))
    return Window(*(torch.stack(column) for column in zip(*items, strict=True)))
