"""planned_return against a loop that says what a plan is worth, one step of one member of one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modip.imagination import planned_return
from tests.helpers import demonstrations, new_parts, small_cell

B, N, H = 2, 3, 4
GAMMA = 0.9


def first_action(obs: Tensor) -> Tensor:
    """A policy without noise."""
    return torch.tanh(obs[:, :2] - obs[:, 2:])


@torch.no_grad()
@pytest.mark.parametrize("terminal", ["state_value", "policy_action_value"])
@pytest.mark.parametrize(("members", "critics"), [(1, 1), (2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("horizon", [1, H])
def test_a_plan_is_worth_what_the_loop_says(
    terminal: str, members: int, critics: int, horizon: int
) -> None:
    cell = small_cell({"world_model.ensemble": members, "critics.ensemble": critics})
    demos = demonstrations(cell)
    _, model, value = new_parts(cell, demos)
    latent = model.encode(demos.table[5 : 5 + B, :4])
    action = torch.rand(B, N, horizon, 2) * 2 - 1
    ask = first_action if terminal == "policy_action_value" else None
    got = planned_return(model, value, latent, action, GAMMA, ask)
    assert got.shape == (critics, B, N)
    for critic in range(critics):
        member = critic // (critics // members)
        for row in range(B):
            for sequence in range(N):
                z = latent[row].expand(members, 1, -1)
                total, weight = torch.zeros(()), torch.ones(())
                for i in range(horizon):
                    a = action[row, sequence, i].expand(members, 1, -1)
                    z, reward, logit = model.step(z, a)
                    total = total + weight * reward[member, 0]
                    weight = weight * GAMMA * (1 - torch.sigmoid(logit[member, 0]))
                    assert 0.1 < torch.sigmoid(logit[member, 0]) < 0.9  # an untrained model's guess
                end = z[member]
                last = value.q(end, first_action(model.decode(end))) if ask else value.v(end)
                total = total + weight * last[critic, 0]
                assert float(got[critic, row, sequence]) == pytest.approx(float(total), rel=1e-4, abs=1e-4)  # fmt: skip


@torch.no_grad()
def test_sequences_do_not_see_each_other() -> None:
    cell = small_cell()
    demos = demonstrations(cell)
    _, model, value = new_parts(cell, demos)
    latent = model.encode(demos.table[:B, :4])
    action = torch.rand(B, N, H, 2) * 2 - 1
    whole = planned_return(model, value, latent, action, GAMMA)
    alone = planned_return(model, value, latent[1:], action[1:, 2:], GAMMA)
    torch.testing.assert_close(whole[:, 1:, 2:], alone)
