"""The world model: rolling out is stepping, the loss is the error of what is known, and both encoders learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modip.normalizer import Normalizer
from modip.parts import learner, update_model
from modip.types import Window
from modip.world_model import Scales, WorldModel, simnorm
from tests.helpers import generator, small_cell

ENCODERS = ("identity", "simnorm")


def world_model(encoder: str, **changes: Any) -> WorldModel:
    """Observations of 3 numbers, actions of 2."""
    cell = small_cell({"world_model.encoder": encoder} | {f"world_model.{k}": v for k, v in changes.items()})  # fmt: skip
    torch.manual_seed(0)
    normalizer = Normalizer(torch.tensor([0.5, 0.0, -1.0]), torch.tensor([1.0, 2.0, 0.5]))
    scales = Scales(torch.tensor([0.1, 0.2, 0.3]), torch.tensor(1.0), torch.tensor(2.0))
    return WorldModel(3, 2, cell.world_model, normalizer, scales)


def window(batch: int = 6, length: int = 4) -> Window:
    """Rows of episodes of 1 to `length` known rows, the last row repeated past the end; every other one terminates."""
    noise = generator(5)
    obs = torch.randn(batch, length, 3, generator=noise)
    action = torch.rand(batch, length, 2, generator=noise) * 2 - 1
    reward = torch.randn(batch, length, generator=noise)
    known = 1 + torch.arange(batch) % length
    last = torch.minimum(torch.arange(length), known[:, None] - 1)
    rows = torch.arange(batch)[:, None]
    mask = (torch.arange(length) < known[:, None]).float()
    terminated = torch.zeros(batch, length)
    terminated[torch.arange(0, batch, 2), known[::2] - 1] = 1.0
    parts = (part[rows, last] for part in (obs, action, reward, terminated))
    return Window(*parts, mask)


def test_simnorm_is_a_softmax_of_each_group() -> None:
    """Groups of 8, entry i in group i mod (D / 8)."""
    x = torch.randn(5, 3, 24) * 5
    out = simnorm(x)
    assert out.shape == x.shape
    for group in range(3):
        members = torch.arange(group, 24, 3)
        torch.testing.assert_close(out[..., members], x[..., members].softmax(-1))
    torch.testing.assert_close(out.view(5, 3, 8, 3).sum(-2), torch.ones(5, 3, 3))


def test_identity_latents_are_normalised_observations() -> None:
    model, obs = world_model("identity"), torch.randn(7, 3)
    latent = model.encode(obs)
    expected = (obs - torch.tensor([0.5, 0.0, -1.0])) / torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(latent, expected)
    torch.testing.assert_close(model.decode(latent), obs)
    assert model.encode(torch.full((1, 3), 1e6)).abs().max() == 10  # far outside the data: bounded


def test_simnorm_latents_cannot_be_decoded() -> None:
    model = world_model("simnorm")
    latent = model.encode(torch.randn(7, 3))
    assert latent.shape == (7, model.latent_dim) == (7, 16)
    with pytest.raises(ValueError, match="simnorm"):
        model.decode(latent)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rolling_out_is_stepping_by_hand(encoder: str) -> None:
    model, obs = world_model(encoder, ensemble=2), torch.randn(5, 3)
    action = torch.rand(5, 4, 2) * 2 - 1
    out = model.rollout(model.encode(obs), action)
    assert out.reward.shape == (2, 5, 4)
    assert out.alive.shape == (2, 5, 5)
    z = model.encode(obs).repeat(2, 1, 1)
    alive = torch.ones(2, 5)
    for i in range(4):
        torch.testing.assert_close(out.alive[..., i], alive)
        z, reward, logit = model.step(z, action[:, i].repeat(2, 1, 1))
        torch.testing.assert_close(out.reward[..., i], reward)
        alive = alive * (1 - torch.sigmoid(logit))
    torch.testing.assert_close(out.alive[..., 4], alive)
    torch.testing.assert_close(out.latent, z)
    assert not torch.allclose(out.latent[0], out.latent[1])  # members differ


def _smooth(error: Tensor) -> Tensor:
    """Quadratic up to 3, then linear."""
    return torch.where(error.abs() < 3, error.square() / 6, error.abs() - 1.5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_loss_counts_what_is_known_row_by_row(encoder: str) -> None:
    changes = {"rho": 0.5, "dynamics_coef": 2.0, "reward_coef": 3.0, "end_coef": 5.0}
    model, target = world_model(encoder, **changes), world_model(encoder)
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.5)
    data = window()
    total, parts = model.loss(data, target)
    expected: dict[str, list[Tensor]] = {"dynamics": [], "reward": [], "end": []}
    unit = torch.tensor([0.1, 0.2, 0.3]) if encoder == "identity" else torch.ones(())
    z = model.encode(data.obs[:, 0]).repeat(2, 1, 1)
    for i in range(3):
        z, reward, logit = model.step(z, data.action[:, i].repeat(2, 1, 1))
        errors: dict[str, list[Tensor]] = {name: [] for name in expected}
        for row in range(6):
            for member in range(2):
                if data.mask[row, i + 1]:
                    goal = target.encode(data.obs[row, i + 1][None])[0]
                    errors["dynamics"].append(_smooth((z[member, row] - goal) / unit).mean())
                if data.mask[row, i]:
                    errors["reward"].append(((reward[member, row] - data.reward[row, i]) / 2) ** 2)
                    errors["end"].append(
                        F.softplus(logit[member, row])
                        - logit[member, row] * data.terminated[row, i]
                    )
        for name, found in errors.items():
            expected[name].append(0.5**i * torch.stack(found).mean())
    sums = {name: torch.stack(found).sum() for name, found in expected.items()}
    for name, value in sums.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-4, atol=1e-6)
    wanted = (2 * sums["dynamics"] + 3 * sums["reward"] + 5 * sums["end"]) / 3
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_past_the_end_carry_no_error(encoder: str) -> None:
    model, data = world_model(encoder), window()
    past = data.mask == 0
    junk = Window(
        torch.where(past.unsqueeze(-1), 50.0, data.obs),
        torch.where(past.unsqueeze(-1), -1.0, data.action),
        torch.where(past, 1e4, data.reward),
        torch.where(past, 1.0, data.terminated),
        data.mask,
    )
    gradients = []
    for each in (data, junk):
        model.zero_grad()
        loss, _ = model.loss(each, model)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_goal_of_a_learned_latent_is_not_moved() -> None:
    """The target's encoder gets no gradient: else a constant latent would be the cheapest."""
    model, target = world_model("simnorm"), world_model("simnorm")
    model.loss(window(), target)[0].backward()
    assert all(p.grad is None for p in target.parameters())
    assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters())


def _linear_world(number: int, length: int, noise: torch.Generator) -> Window:
    """A turning, driven point: s' = s + 0.2 (R s + B a), r = s_0; it ends where s_1 < -1.5."""
    turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, -0.5]])
    drive = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    obs = [torch.randn(number, 3, generator=noise)]
    action = torch.rand(number, length, 2, generator=noise) * 2 - 1
    for i in range(length - 1):
        obs.append(obs[-1] + 0.2 * (obs[-1] @ turn.T + action[:, i] @ drive.T))
    states = torch.stack(obs, 1)
    return Window(states, action, states[..., 0], (states[..., 1] < -1.5).float(), torch.ones(number, length))  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS)
def test_both_encoders_learn_a_world(encoder: str) -> None:
    cell = small_cell(
        {
            "world_model.encoder": encoder, "world_model.width": 48, "world_model.layers": 2,
            "world_model.latent_dim": 32, "world_model.ensemble": 2,
        }
    )  # fmt: skip
    noise = generator(0)
    data = _linear_world(4000, 4, noise)
    torch.manual_seed(0)
    states = data.obs.flatten(0, 1)
    change = (data.obs[:, 1:] - data.obs[:, :-1]).flatten(0, 1) / states.std(0)
    scales = Scales(change.std(0), data.reward.mean(), data.reward.std())
    model = WorldModel(3, 2, cell.world_model, Normalizer.fit(states), scales)
    learning = learner(model, cell.world_model, lr=5e-3, num_updates=250)
    metrics = []
    for _ in range(250):
        rows = torch.randint(3500, (128,), generator=noise)
        metrics.append(update_model(learning, Window(*(part[rows] for part in data))))
    for name in ("model_reward", "model_end"):
        assert metrics[-1][name] < 0.5 * metrics[0][name], name
    if encoder == "identity":  # a learned latent moves while it is learned, so its error may grow
        assert metrics[-1]["model_dynamics"] < 0.1 * metrics[0]["model_dynamics"]
    held = Window(*(part[3500:] for part in data))
    out = learning.ema.rollout(learning.ema.encode(held.obs[:, 0]), held.action[:, :3])
    truth = held.reward[:, :3]
    error = (out.reward.mean(0) - truth).square().mean() / truth.var()
    assert error < 0.15  # three steps ahead on episodes it has not seen
