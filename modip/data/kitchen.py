"""Kitchen recordings as the environment would have played them: its rewards, its ends.

In D4RL's and Minari's files the reward of a row is how many of the four sub-tasks are done now, step after step
(REMOVE_TASKS_WHEN_COMPLETE = False in scripts/generation/generate_kitchen_datasets.py of D4RL,
remove_task_when_completed=False in scripts/D4RL/kitchen/create_franka_dataset.py of minari-dataset-generation-scripts);
D4RL counts in the row's own observation, before its action. Their episodes go on after the last sub-task, to the end of
the demonstration, which D4RL marks as terminal whether all is done or not. Evaluated, on the other hand, is an
environment in which each sub-task counts once and that ends with the fourth.

So rewards and ends are told here from the object positions, which both files hold: a row's reward is the number of
sub-tasks that its action does for the first time; the row that completes all four is terminated and the rest of its
demonstration left out; the end of any other demonstration is a truncation. The recorded rewards are not used, and the
return of an episode is its number of sub-tasks, 4 at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from modip import envs
from modip.data.episodes import Flags, Float, Rows
from modip.data.units import check_widths
from modip.envs import kitchen
from modip.errors import UserError

GOAL_TOLERANCE = 1e-3


class Transitions(NamedTuple):
    """N consecutive rows and what was observed after each (N, Do)."""

    rows: Rows
    after: Float


def with_successors(blocks: Iterable[Rows]) -> Iterator[Transitions]:
    """What follows a row is the next one; for an episode's last row, whose outcome was not recorded, itself."""
    held: Rows | None = None
    for block in blocks:
        rows = block
        if held is not None:
            rows = Rows(*(np.concatenate(pair) for pair in zip(held, block, strict=True)))
        ended = rows.terminated | rows.truncated
        after = np.concatenate((rows.observation[1:], rows.observation[-1:]))
        after[ended] = rows.observation[ended]
        whole = len(ended) if ended[-1] else len(ended) - 1
        held = None if ended[-1] else _some(rows, slice(-1, None))
        if whole:
            yield Transitions(_some(rows, slice(whole)), after[:whole])


def as_played(
    transitions: Iterable[Transitions], env_id: str, origin: str, field: str
) -> Iterator[Rows]:
    """The rows that an environment of modip.envs.kitchen would have given.

    Raises UserError where the observations are the other kitchen's, or D4RL's with other goals.
    """
    tasks = len(kitchen.ENV_IDS[env_id])
    done = np.zeros(tasks, np.bool_)  # so far, in the episode that the last row belongs to
    begins = True
    for rows, after in transitions:
        check_widths(rows, envs.spec(env_id).widths, env_id, origin, field)
        _check_goal(rows, env_id, origin, field)
        seen, now = kitchen.done(env_id, rows.observation), kitchen.done(env_id, after)
        reward = np.zeros(len(now), np.float32)
        finished = np.zeros(len(now), np.bool_)  # all were done before the row's action
        complete = np.zeros(len(now), np.bool_)  # the row's action did the last
        ended = rows.terminated | rows.truncated
        for part in np.split(np.arange(len(now)), np.flatnonzero(ended) + 1):
            if not len(part):
                continue
            if begins:
                done = seen[
                    part[0]
                ]  # a part of a longer demonstration may begin with something done
            so_far = np.logical_or.accumulate(np.concatenate((done[None], now[part])))
            reward[part] = np.diff(so_far.sum(1))
            finished[part] = so_far[:-1].all(1)
            complete[part] = so_far[1:].all(1)
            done, begins = so_far[-1], bool(ended[part[-1]])
        changed = rows._replace(reward=reward, terminated=complete, truncated=ended & ~complete)
        yield _some(changed, ~finished)


def _some(rows: Rows, which: slice | Flags) -> Rows:
    observation, action, reward, terminated, truncated = rows
    return Rows(
        observation[which], action[which], reward[which], terminated[which], truncated[which]
    )


def _check_goal(rows: Rows, env_id: str, origin: str, field: str) -> None:
    if env_id not in kitchen.D4RL_IDS:
        return
    goal = rows.observation[:, 30:]
    wrong = np.flatnonzero(np.abs(goal - kitchen.goal(env_id)).max(1) > GOAL_TOLERANCE)
    if len(wrong):
        fitting = [
            other
            for other in kitchen.D4RL_IDS
            if np.abs(goal[wrong[0]] - kitchen.goal(other)).max() <= GOAL_TOLERANCE
        ]
        raise UserError(
            f"{origin}: the goal in the last 30 numbers of an observation is not that of {env_id}; "
            f"set params.yaml, {field} to {fitting[0] if fitting else 'the environment of its sub-tasks'}"
        )


def check_source(env_id: str, ids: Iterable[str], origin: str, field: str) -> None:
    """Raises UserError where `env_id` is a kitchen, but not of those that fit a source."""
    fitting = list(ids)
    if env_id in kitchen.ENV_IDS and env_id not in fitting:
        raise UserError(
            f"{origin}: params.yaml, {field} is {env_id}, whose observations this file does not have: "
            f"{envs.family(env_id).obs_note}; set it to {' or '.join(fitting)}"
        )
