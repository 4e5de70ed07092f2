"""chunk_reward_and_discount against loops that say what a return is, one environment step at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modip.returns import chunk_reward_and_discount

LENGTH = 4


@dataclass(frozen=True)
class Ending:
    """Where an episode of unlimited rewards stops, if it does, within a run of LENGTH steps."""

    terminated_after: int | None = None
    truncated_after: int | None = None


ENDINGS = {
    "no end": Ending(),
    "terminated mid": Ending(terminated_after=2),
    "terminated at last": Ending(terminated_after=LENGTH),
    "truncated mid": Ending(truncated_after=2),
    "truncated at last": Ending(truncated_after=LENGTH),
    "one step": Ending(truncated_after=1),
}


def oracle(reward: list[float], ending: Ending, discount: float, next_value: float) -> float:
    """Discounted sum over the steps that happened; then the value of what follows, unless nothing does."""
    total, weight = 0.0, 1.0
    for i, r in enumerate(reward, start=1):
        total += weight * r
        weight *= discount
        if i == ending.terminated_after:
            return total
        if i == ending.truncated_after:
            break
    return total + weight * next_value


@pytest.mark.parametrize("name", ENDINGS)
@given(
    reward=st.lists(st.floats(-10, 10), min_size=LENGTH, max_size=LENGTH),
    discount=st.floats(0.1, 1.0),
    next_value=st.floats(-100, 100),
)
def test_target_is_the_return_counted_step_by_step(
    name: str, reward: list[float], discount: float, next_value: float
) -> None:
    ending = ENDINGS[name]
    steps = ending.terminated_after or ending.truncated_after or LENGTH
    total, bootstrap = chunk_reward_and_discount(
        torch.tensor([reward], dtype=torch.float64),
        torch.tensor([ending.terminated_after is not None]),
        torch.tensor([steps]),
        discount,
    )
    expected = oracle(reward, ending, discount, next_value)
    assert (total + bootstrap * next_value).item() == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_rows_of_a_batch_are_independent() -> None:
    reward = torch.randn(5, 3)
    terminated = torch.tensor([False, True, False, True, False])
    steps = torch.tensor([3, 3, 1, 2, 2])
    total, bootstrap = chunk_reward_and_discount(reward, terminated, steps, 0.9)
    for i in range(5):
        row = slice(i, i + 1)
        alone = chunk_reward_and_discount(reward[row], terminated[row], steps[row], 0.9)
        torch.testing.assert_close((total[row], bootstrap[row]), alone, rtol=0, atol=0)


def test_what_lies_past_the_end_does_not_matter_whatever_it_is() -> None:
    reward = torch.tensor([[1.0, 2.0, torch.nan], [1.0, torch.inf, torch.nan]])
    total, bootstrap = chunk_reward_and_discount(
        reward, torch.tensor([False, True]), torch.tensor([2, 1]), 0.5
    )
    assert total.tolist() == [2.0, 1.0]
    assert bootstrap.tolist() == [0.25, 0.0]


def test_dtypes_and_flags_as_the_buffers_hold_them() -> None:
    flags = torch.tensor([1.0, 0.0])
    total, bootstrap = chunk_reward_and_discount(torch.ones(2, 2), flags, torch.tensor([2, 2]), 0.5)
    assert total.dtype == bootstrap.dtype == torch.float32
    assert bootstrap.tolist() == [0.0, 0.25]
