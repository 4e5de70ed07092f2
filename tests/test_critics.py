"""Critics: n-step targets counted row by row, the expectile's definition, and the values of worlds that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from modip.critics import (
    Critics,
    expectile_loss,
    loss,
    n_step,
    returns_to_go,
    td_target,
)
from modip.data.episodes import DatasetInfo, Episodes
from modip.parts import learner, update_critics
from modip.replay import Replay
from modip.types import Window
from tests.helpers import CPU, generator, small_cell

N = 4
GAMMA = 0.9
ENDINGS = {
    "no end": (9, False),
    "terminated mid": (2, True),
    "truncated mid": (2, False),
    "terminated at first": (1, True),
    "truncated at first": (1, False),
    "terminated at last": (N, True),
    "truncated at last": (N, False),
    "terminated at the bootstrap": (N + 1, True),
    "truncated at the bootstrap": (N + 1, False),
}
"""Rows known from the first on, and whether the last of them is terminal."""


def oracle(reward: list[float], known: int, terminal: bool, value: list[float]) -> float | None:
    """Rewards one by one; then the value of the state reached, unless the episode has ended there.

    A truncated episode's last row has an observation but no successor: it is where the bootstrap stands at the latest.
    """
    total = 0.0
    for i in range(N):
        if i == known - 1:
            if terminal:
                return total + GAMMA**i * reward[i]
            return total + GAMMA**i * value[i] if i else None
        total += GAMMA**i * reward[i]
    return total + GAMMA**N * value[N]


@pytest.mark.parametrize("name", ENDINGS)
def test_targets_are_counted_row_by_row(name: str) -> None:
    known, terminal = ENDINGS[name]
    reward, value = torch.randn(N + 1), torch.randn(N + 1)
    inside = torch.arange(N + 1) < known
    # Past the end a window repeats the last row, its end flag included.
    last = torch.arange(N + 1).clamp(max=known - 1)
    ends = ((last == known - 1) & terminal).float()
    zeros = torch.zeros(1, N + 1, 1)
    window = Window(zeros, zeros, reward[last][None], ends[None], inside.float()[None])
    total, discount, row, weight = n_step(window, GAMMA)
    expected = oracle(reward.tolist(), known, terminal, value.tolist())
    assert bool(weight[0]) == (expected is not None)
    if expected is not None:
        got = td_target(total, discount, value[row][None])
        assert float(got) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def _episodes(lengths: list[int], terminal: list[bool]) -> Episodes:
    """One-number observations that say the row."""
    rows, rng = sum(lengths), np.random.default_rng(0)
    ends = np.cumsum(lengths) - 1
    terminated, truncated = np.zeros(rows, bool), np.zeros(rows, bool)
    terminated[ends], truncated[ends] = terminal, ~np.array(terminal)
    return Episodes(
        DatasetInfo(*["x"] * 7),
        np.arange(rows, dtype=np.float32)[:, None],
        rng.uniform(-1, 1, (rows, 1)).astype(np.float32),
        rng.normal(size=rows).astype(np.float32),
        terminated,
        truncated,
        np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
    )


def test_targets_of_stored_episodes() -> None:
    """From the replay's windows on: every row of episodes of every length and end."""
    lengths = [1, 2, 3, 4, 5, 6, 9] * 2
    data = _episodes(lengths, [True] * 7 + [False] * 7)
    replay = Replay.from_episodes(data, 0.0, CPU)
    value = torch.randn(len(data.step))
    window = replay.window(torch.arange(len(data.step)), N + 1)
    reward, discount, row, weight = n_step(window, GAMMA)
    stands = window.obs[torch.arange(len(row)), row, 0].long()
    got = td_target(reward, discount, value[stands])
    for first in range(len(data.step)):
        end = int(data.starts[data.episode_id[first] + 1])
        pad = [0.0] * N
        expected = oracle(
            data.reward[first:].tolist() + pad,
            end - first,
            bool(data.terminated[end - 1]),
            value[first:].tolist() + pad,
        )
        assert bool(weight[first]) == (expected is not None)
        if expected is not None:
            assert float(got[first]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_expectile_is_where_the_weighted_errors_balance(expectile: float) -> None:
    samples = torch.randn(101, dtype=torch.float64)
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None]
    best = grid[expectile_loss(samples - grid, expectile).mean(1).argmin()]
    over, under = (samples - best).clamp(min=0).sum(), (best - samples).clamp(min=0).sum()
    assert float(expectile * over) == pytest.approx(float((1 - expectile) * under), rel=0.02)
    error = torch.tensor([2.0, -3.0])
    assert expectile_loss(error, expectile).tolist() == pytest.approx(
        [expectile * 4, (1 - expectile) * 9]
    )


def test_returns_to_go_stop_at_the_end_of_their_episode() -> None:
    data = _episodes([3, 1, 4], [True, False, False])
    replay = Replay.from_episodes(data, 0.5, CPU)
    got = returns_to_go(replay.table[:, -2], replay.end, GAMMA)
    for row in range(8):
        end = int(data.starts[data.episode_id[row] + 1])
        expected = sum(GAMMA ** (i - row) * (float(data.reward[i]) + 0.5) for i in range(row, end))
        assert float(got[row]) == pytest.approx(expected, rel=1e-5)


def critics(ensemble: int = 3) -> Critics:
    cell = small_cell({"critics.ensemble": ensemble, "world_model.ensemble": 1})
    torch.manual_seed(0)
    return Critics(5, 2, cell.critics, torch.tensor(3.0), torch.tensor(2.0))


def test_a_shared_latent_is_every_members() -> None:
    it, z, a = critics(), torch.randn(7, 5), torch.randn(7, 2)
    assert it.q(z, a).shape == it.v(z).shape == (3, 7)
    torch.testing.assert_close(it.q(z, a), it.q(z.expand(3, 7, 5), a.expand(3, 7, 2)))
    torch.testing.assert_close(it.v(z), it.v(z.expand(3, 7, 5)))
    apart = torch.randn(3, 7, 5)
    for member in range(3):
        torch.testing.assert_close(it.v(apart)[member], it.v(apart[member])[member])


def test_the_loss_is_q_to_its_target_and_v_to_an_expectile_of_q() -> None:
    it, target = critics(), critics()
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.3)
    z, a, y = torch.randn(7, 5), torch.randn(7, 2), torch.randn(3, 7)
    weight = torch.tensor([1.0, 1, 0, 1, 1, 0, 1])
    total, _ = loss(it, target, z, a, y, weight, 0.8)
    q, v, high = it.q(z, a), it.v(z), target.q(z, a)
    expected = torch.zeros(())
    for member in range(3):
        for row in weight.nonzero().flatten().tolist():
            gap = (high - v)[member, row] / 2
            expected = expected + ((q - y)[member, row] / 2) ** 2 / 15
            expected = expected + (0.8 if gap > 0 else 0.2) * gap**2 / 15
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(p.grad is None for p in target.parameters())
    _, parts = loss(it, target, z, a, y, torch.zeros(7), 0.8)
    assert parts["q"] == parts["v"] == 0  # no row has a target: no error, and no division by 0


def _chain(terminal: bool, states: int) -> Replay:
    """Episodes of 3 rows, each worth 1, through one-hot states 0, 1, ...; then the end, or a cut."""
    data = _episodes([3] * 200, [terminal] * 200)
    seen = np.eye(states, dtype=np.float32)[data.step % states]
    return Replay.from_episodes(
        replace(data, observation=seen, reward=np.ones_like(data.reward)), 0.0, CPU
    )


class _Plain:
    """An encoder that leaves observations as they are."""

    def encode(self, obs: Tensor) -> Tensor:
        return obs


def _learned(replay: Replay, steps: int, discount: float) -> list[float]:
    """V of every state after learning, mean over members."""
    cell = small_cell(
        {
            "critics.n_step": steps, "critics.discount": discount, "critics.expectile": 0.5,
            "critics.width": 32, "critics.ema_decay": 0.95,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    it = Critics(replay.obs_dim, 1, cell.critics, torch.tensor(2.0), torch.tensor(1.0))
    learning, noise = learner(it, cell.critics, lr=5e-3, num_updates=600), generator(0)
    for _ in range(600):
        window = replay.window(replay.sample_rows(64, noise), steps + 1)
        # Neither the model's dynamics nor the policy is asked for.
        update_critics(learning, _Plain(), window, cell.critics, None, noise)  # type: ignore[arg-type]
    value: list[float] = learning.ema.v(torch.eye(replay.obs_dim)).mean(0).tolist()
    return value


@pytest.mark.parametrize("steps", [1, 3])
def test_values_up_to_an_end_are_learned(steps: int) -> None:
    value = _learned(_chain(terminal=True, states=3), steps, discount=0.9)
    assert value == pytest.approx([2.71, 1.9, 1.0], abs=0.25)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_cut_is_no_end(steps: int) -> None:
    """One state for ever, seen in pieces of 3 rows: 1 + 1/2 + 1/4 + ..."""
    value = _learned(_chain(terminal=False, states=1), steps, discount=0.5)
    assert value == pytest.approx([2.0], abs=0.1)
