"""Is a recording of today's simulator? Recorded actions, replayed one step each from recorded states.

Another version of the environment, another scale of its actions, an action beside the wrong observation: each
shows here, before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modip import envs
from modip.data.episodes import Recording, Rows
from modip.envs.family import Adapter, Array
from modip.errors import UserError

STEPS = 200
"""Steps in a sample, of any kind."""
ENDS = 50
"""Steps beside them that end an episode by termination: few of the others do."""


class Transition(NamedTuple):
    """One recorded step. `restore` puts the simulator into the state before it, as `Adapter.restore` does."""

    restore: Callable[[Adapter], str | None]
    obs: Array  # (Do,)
    action: Array  # (Da,) in [-1, 1]
    reward: float
    terminated: bool
    next_obs: Array | None  # (Do,); an episode's last step has none


def sample(recording: Recording, steps: int, terminated: int) -> list[Transition]:
    """Steps spread over a recording that has `steps`, `terminated` of which end an episode by termination.

    Their states are what their observations show. The same recording gives the same sample.
    """
    rng = np.random.default_rng(0)
    wanted, wanted_ends = _spread(steps, STEPS, rng), _spread(terminated, ENDS, rng)
    found: list[Transition] = []
    row = end = 0  # of the next block's first
    for rows in recording.rows:
        ends = np.flatnonzero(rows.terminated)
        chosen = _within(wanted, row, len(rows.reward)), ends[_within(wanted_ends, end, len(ends))]
        found += [_transition(rows, at) for at in np.union1d(*chosen).tolist() if _whole(rows, at)]
        row, end = row + len(rows.reward), end + len(ends)
    return found


def one_step_error(env_id: str, transitions: Sequence[Transition]) -> dict[str, Any]:
    """How far one step of today's simulator leads from the recorded one, as flat statistics.

    The error of an observation is the largest over its numbers (`Adapter.compared`), each over the standard deviation of that number's
    one-step change in the sample (a number that never changes: as it is); that of a reward is absolute. Figures are
    None where no transition gives them; the note says why some were left out.
    """
    replayed, obs, why = [], [], ""
    rewards, agreed = [], []
    try:
        env = envs.make(env_id)
    except UserError as problem:  # a simulator that is not installed: the recording can be learned from all the same
        return _figures([], [], [], None, str(problem))
    try:
        env.reset(seed=0)
        for one in transitions:
            refused = one.restore(env)
            if refused is not None:
                why = refused
                continue
            after, reward, terminated, _, _ = env.step(one.action)
            rewards.append(abs(reward - one.reward))
            agreed.append(terminated == one.terminated)
            if one.next_obs is not None:
                wanted = one.next_obs.astype(np.float64)
                replayed.append((after - wanted)[env.compared])
                obs.append((wanted - one.obs)[env.compared])
    finally:
        env.close()
    errors = []
    if replayed:
        change = np.std(obs, axis=0)
        scale = np.where(change > 1e-6, change, 1.0)
        errors = (np.abs(replayed) / scale).max(axis=1).tolist()
    left_out = len(transitions) - len(rewards)
    note = f"{left_out} of {len(transitions)} left out: {why}" if left_out else None
    return _figures(errors, rewards, agreed, env.tolerance, note)


def _figures(
    errors: Sequence[float],
    rewards: Sequence[float],
    agreed: Sequence[bool],
    tolerance: float | None,
    note: str | None,
) -> dict[str, Any]:
    return {
        "fidelity_transitions": len(rewards),
        "fidelity_obs_error_median": _percentile(errors, 50),
        "fidelity_obs_error_p95": _percentile(errors, 95),
        "fidelity_reward_error_median": _percentile(rewards, 50),
        "fidelity_reward_error_p95": _percentile(rewards, 95),
        "fidelity_terminated_agree": float(np.mean(agreed)) if agreed else None,
        "fidelity_tolerance": tolerance,
        "fidelity_note": note,
    }


def summary(facts: dict[str, Any]) -> str:
    """The statistics of `one_step_error` in a line."""
    note = facts["fidelity_note"]
    if facts["fidelity_obs_error_median"] is None:
        return f"no recorded steps replayed ({note or 'no step has a successor'})"
    return (
        f"{facts['fidelity_transitions']} recorded steps replayed: one-step error {facts['fidelity_obs_error_median']:.2g} "
        f"of a step's change (95 %: {facts['fidelity_obs_error_p95']:.2g}), of the reward "
        f"{facts['fidelity_reward_error_median']:.2g} (95 %: {facts['fidelity_reward_error_p95']:.2g}), flags of "
        f"termination agree in {facts['fidelity_terminated_agree']:.0%}{f'; {note}' if note else ''}"
    )


def doubt(facts: dict[str, Any]) -> str | None:
    """What the statistics of `one_step_error` say against a recording, or None."""
    median, p95 = facts["fidelity_obs_error_median"], facts["fidelity_obs_error_p95"]
    tolerance = facts["fidelity_tolerance"]
    if median is None or max(median, p95) <= tolerance:
        return None
    if median > tolerance:
        return (
            f"the recorded steps are not this simulator's (median error {median:.2g} of a step's change): another "
            "version of the environment, another scale of its actions, or actions beside the wrong observations; "
            "check before training"
        )
    return (
        f"some recorded steps are not this simulator's (95 % error {p95:.2g} of a step's change): other contacts in "
        "another version of the environment, or noise in it"
    )


def _spread(total: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` of the numbers below `total`, or all, in order: one at random from each of as many equal parts."""
    edges = np.linspace(0, total, min(total, count) + 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:])


def _within(wanted: NDArray[np.int64], start: int, count: int) -> NDArray[np.int64]:
    """The numbers from `start` to below `start + count`, counted from there."""
    return wanted[(wanted >= start) & (wanted < start + count)] - start


def _whole(rows: Rows, row: int) -> bool:
    """Whether all of a step is in its block, and not its successor in the next one."""
    return row + 1 < len(rows.reward) or bool(rows.terminated[row] | rows.truncated[row])


def _transition(rows: Rows, row: int) -> Transition:
    last = bool(rows.terminated[row] | rows.truncated[row])
    obs = rows.observation[row].copy()  # copies, so that the block can go
    return Transition(
        restore=partial(_restore, obs),
        obs=obs,
        action=rows.action[row].copy(),
        reward=float(rows.reward[row]),
        terminated=bool(rows.terminated[row]),
        next_obs=None if last else rows.observation[row + 1].copy(),
    )


def _restore(obs: Array, env: Adapter) -> str | None:
    return env.restore(obs)


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
