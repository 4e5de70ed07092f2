"""The loops with environments and agents that are known: who is stepped, what is counted, where a run goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modip.envs import BatchedEnv, StepResult, toy
from modip.loops import Episodes, Fit, Interaction, evaluate, run_chunk
from modip.types import ChunkStep, Metrics, State
from tests.helpers import CPU, generator


class Countdown:
    """Observation (seed, step); an episode of seed s has `length` or 1 + s % 5 steps worth s + step, and ends or is cut.

    Even seeds terminate, odd ones are truncated; success at seeds that 3 divides, from the second step on.
    """

    def __init__(self, num_envs: int, length: int | None = None) -> None:
        self.num_envs, self.length = num_envs, length
        self.seeds = torch.zeros(num_envs, dtype=torch.long)
        self.steps = torch.zeros(num_envs, dtype=torch.long)
        self.begun: list[int] = []
        self.actions: list[list[float]] = []

    @property
    def obs(self) -> Tensor:
        return torch.stack([self.seeds, self.steps], 1).float()

    @property
    def ended(self) -> Tensor:
        return self.steps >= (self.length or 1 + self.seeds % 5)

    def reset(self, rows: Any, seeds: Any) -> None:
        for row, seed in zip(rows, seeds, strict=True):
            self.seeds[row], self.steps[row] = seed, 0
            self.begun.append(seed)

    def step(self, action: Tensor, rows: Tensor) -> StepResult:
        reward = torch.zeros(self.num_envs)
        for row in rows.tolist():
            assert not self.ended[row], "a finished episode was stepped"
            reward[row] = float(self.seeds[row] + self.steps[row])
            self.steps[row] += 1
            self.actions.append(action[row].tolist())
        even = self.seeds % 2 == 0
        success = (self.seeds % 3 == 0) & (self.steps >= 2)
        return StepResult(self.obs, reward, self.ended & even, self.ended & ~even, success)

    def state_dict(self) -> State:
        return {"seeds": self.seeds.clone(), "steps": self.steps.clone()}

    def load_state_dict(self, state: State) -> None:
        self.seeds, self.steps = state["seeds"].clone(), state["steps"].clone()


def three(obs: Tensor, noise: torch.Generator) -> Tensor:
    """Chunks of 3 actions that say the seed and their place."""
    return torch.stack([torch.stack([obs[:, 0], torch.full((len(obs),), i)], 1) for i in range(3)], 1)  # fmt: skip


def test_a_chunk_stops_at_the_end_of_its_episode() -> None:
    env: Any = Countdown(4)
    env.reset(range(4), [0, 1, 7, 5])  # 1, 2, 3 and 1 steps
    rows = torch.tensor([0, 2, 1])
    step, success = run_chunk(env, three(env.obs[rows], generator()), rows)
    assert step.mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert step.env_steps == 6
    assert step.reward.tolist() == [[0, 0, 0], [7, 8, 9], [1, 2, 0]]
    assert step.terminated.nonzero().tolist() == [[0, 0]]
    assert step.truncated.nonzero().tolist() == [[1, 2], [2, 1]]
    assert step.obs[1].tolist() == [[7, 0], [7, 1], [7, 2]]
    assert success.tolist() == [False, False, False]
    assert env.steps.tolist() == [1, 2, 3, 0]  # row 3 was not asked for
    assert env.actions == [[0, 0], [7, 0], [1, 0], [7, 1], [1, 1], [7, 2]]


@pytest.mark.parametrize("batch", [1, 3, 4, 20])
def test_an_evaluation_is_each_episode_to_its_own_end(batch: int) -> None:
    seeds = [3, 0, 9, 4, 12, 7, 1, 5, 8, 6]
    env: Any = Countdown(batch)
    watched: list[tuple[int, int]] = []
    done: list[int] = []
    found = evaluate(
        three,
        env,
        seeds,
        generator(),
        on_chunk=lambda first, rows, step: watched.append((first, step.env_steps)),
        on_done=done.append,
    )
    lengths = [1 + s % 5 for s in seeds]
    assert found.lengths == lengths
    pairs = list(zip(seeds, lengths, strict=True))
    assert found.returns == [float(sum(s + i for i in range(n))) for s, n in pairs]
    assert found.max_reward == [float(s + n - 1) for s, n in pairs]
    assert found.success == [s % 3 == 0 and n >= 2 for s, n in pairs]
    assert sum(done) == len(seeds)
    assert sum(steps for _, steps in watched) == sum(lengths)
    assert {first for first, _ in watched} == set(range(0, 10, batch))


def test_a_camera_follows_every_step() -> None:
    env: Any = Countdown(2)
    seen: list[list[int]] = []
    evaluate(three, env, [4, 0], generator(), on_step=lambda rows: seen.append(rows.tolist()))
    # Chunks of three while both run, then of the long one alone.
    assert seen == [[0, 1]] * 3 + [[0]] * 3


def test_the_optimum_is_evaluated_as_the_optimum() -> None:
    def straight(obs: Tensor, noise: torch.Generator) -> Tensor:
        way = obs[:, 2:] - obs[:, :2]
        moved = torch.stack([way.sign() * 0.1 * i for i in range(3)], 1)
        left = way.unsqueeze(1) - torch.where(moved.abs() < way.abs().unsqueeze(1), moved, way.unsqueeze(1))  # fmt: skip
        return (left / 0.1).clamp(-1, 1)

    seeds = list(range(7))
    found = evaluate(straight, BatchedEnv(toy.ENV_ID, 3), seeds, generator())
    starts = BatchedEnv(toy.ENV_ID, 7)
    starts.reset(range(7), seeds)
    best = [toy.optimal_return(o[:2], o[2:]) for o in starts.obs.numpy()]
    assert found.returns == pytest.approx(best, abs=1e-4)
    assert found.lengths == [20] * 7  # 20 is no multiple of the chunk
    assert isinstance(found, Episodes)


class Learner:
    """Learns `units` times."""

    def __init__(self, units: int) -> None:
        self.left = units

    def update(self) -> Metrics:
        if not self.left:
            return {}
        self.left -= 1
        return {"loss": torch.tensor(float(self.left))}

    def state_dict(self) -> State:
        return {"left": self.left}

    def load_state_dict(self, state: State) -> None:
        self.left = state["left"]


def test_fit_learns_to_the_end_and_goes_on_where_it_was() -> None:
    job = Fit(Learner(5))
    losses = [float(m["loss"]) for _ in range(3) if (m := job.advance()) is not None]
    other = Fit(Learner(5))
    other.load_state_dict(job.state_dict())
    while (metrics := other.advance()) is not None:
        losses.append(float(metrics["loss"]))
    assert losses == [4, 3, 2, 1, 0]
    assert other.grad_steps == 5
    assert other.advance() is None


class Watcher(Learner):
    """An agent that acts by `three` and learns once a chunk."""

    def __init__(self) -> None:
        super().__init__(0)
        self.seen: list[ChunkStep] = []

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        assert explore
        return three(obs, generator) + torch.rand((len(obs), 3, 2), generator=generator)

    def observe(self, step: ChunkStep) -> None:
        self.seen.append(step)
        self.left += 1


def interact(
    budget: int, num_envs: int = 4, seed: int = 0, episode_steps: int = 0, length: int | None = None
) -> tuple[Interaction, Watcher, Any]:
    agent, env = Watcher(), Countdown(num_envs, length)
    job = Interaction(
        agent, env, env_steps=budget, episode_steps=episode_steps, seed=seed, device=CPU  # type: ignore[arg-type]
    )  # fmt: skip
    return job, agent, env


def test_long_episodes_are_cut_and_start_evenly_over_time() -> None:
    """Of 24 steps, with chunks of 3: the first ones after 6, 12, 18 and 24, all others after 24."""
    job, agent, env = interact(400, episode_steps=24, length=1000)
    while job.advance() is not None:
        pass
    cuts = [
        (i, int(row))
        for i, step in enumerate(agent.seen)
        for row in step.truncated[:, -1].nonzero()
    ]
    assert cuts[:6] == [(1, 0), (3, 1), (5, 2), (7, 3), (9, 0), (11, 1)]
    assert not any(step.terminated.any() for step in agent.seen)
    assert not any(step.truncated[:, :-1].any() for step in agent.seen)
    assert len(env.begun) == 4 + len(cuts)


def test_a_short_episode_is_not_cut() -> None:
    """Its own end stands, a termination above all, and the next one has the whole age to live."""
    plain, first, _ = interact(200)
    cut, second, _ = interact(200, episode_steps=20)
    for job in (plain, cut):
        while job.advance() is not None:
            pass
    for a, b in zip(first.seen, second.seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_cut_is_no_end() -> None:
    job, agent, _ = interact(30, num_envs=1, episode_steps=4)
    while job.advance() is not None:
        pass
    for step in agent.seen:
        assert not (step.terminated & step.truncated).any()


@pytest.mark.parametrize("budget", [1, 10, 11, 50])
def test_the_budget_is_met_to_within_a_chunk(budget: int) -> None:
    job, agent, env = interact(budget)
    kinds = []
    while (metrics := job.advance()) is not None:
        kinds.append(bool(metrics))
    assert budget <= job.env_steps < budget + 4 * 3
    assert job.env_steps == sum(step.env_steps for step in agent.seen) == len(env.actions)
    assert job.grad_steps == len(agent.seen) == kinds.count(True)
    assert kinds[:4] == [False, True, False, True][: len(kinds)]  # it learns before it acts again
    assert job.advance() is None


def test_training_episodes_have_seeds_of_their_own() -> None:
    begun = []
    for seed in (0, 1):
        job, _, env = interact(60, seed=seed)
        while job.advance() is not None:
            pass
        assert env.begun == list(range(env.begun[0], env.begun[0] + len(env.begun)))
        begun.append(set(env.begun))
    assert not begun[0] & begun[1]
    assert min(begun[0] | begun[1]) >= 1_000_000  # evaluation's seeds are small


@pytest.mark.parametrize("kind", [{}, {"episode_steps": 7, "length": 50}])
def test_an_interaction_goes_on_where_it_was(kind: dict[str, int]) -> None:
    whole, agent, _ = interact(60, **kind)
    while whole.advance() is not None:
        pass
    half, first, _ = interact(60, **kind)
    for _ in range(7):
        half.advance()
    rest, second, _ = interact(60, seed=5, **kind)
    rest.load_state_dict(half.state_dict())
    while rest.advance() is not None:
        pass
    seen = first.seen + second.seen
    assert len(seen) == len(agent.seen)
    for a, b in zip(seen, agent.seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert (rest.env_steps, rest.grad_steps) == (whole.env_steps, whole.grad_steps)
