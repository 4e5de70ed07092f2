"""Environments by id: flat observations, actions in [-1, 1], success and score per family.

B rows step together in one process. Seeds decide everything: the same seed and the same actions
give the same episode.
"""

from __future__ import annotations

import difflib
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modip.envs import adroit, calvin, custom, fetch, kitchen, mujoco, pusht, robosuite, toy
from modip.envs.family import Adapter, Bounds, Family, versions
from modip.errors import UserError

# The first family that recognises an id owns it; custom takes what is left.
FAMILIES = (
    toy.FAMILY,
    fetch.FAMILY,
    mujoco.FAMILY,
    pusht.FAMILY,
    pusht.KEYPOINTS_FAMILY,
    calvin.FAMILY,
    robosuite.FAMILY,
    robosuite.DENSE_FAMILY,
    kitchen.FAMILY,
    adroit.FAMILY,
    custom.FAMILY,
)


@dataclass(frozen=True)
class EnvSpec:
    """What there is to know of an environment before its first step."""

    env_id: str
    version: str
    obs_dim: int
    action_dim: int
    max_episode_steps: int
    has_success: bool
    reward_note: str
    bounds: Bounds = field(compare=False)

    @property
    def widths(self) -> tuple[int, int]:
        """(Do, Da)."""
        return self.obs_dim, self.action_dim


class StepResult(NamedTuple):
    """After a step. The flags hold for every row, stepped or not, until its next reset."""

    obs: Tensor  # (B, Do)
    reward: Tensor  # (B,), 0 for rows that did not step
    terminated: Tensor  # (B,) bool
    truncated: Tensor  # (B,) bool
    success: Tensor  # (B,) bool, as the family defines it, of the episode so far


class BatchedEnv:
    """B copies of one environment; episodes begin only in `reset`."""

    def __init__(self, env_id: str, num_envs: int, render: bool = False) -> None:
        if render:
            missing = video_support(env_id)
            if missing is not None:
                raise UserError(missing)
            backend = _gl_backend() if _pictures(env_id).need_gl else None
            if backend is not None:
                os.environ["MUJOCO_GL"] = backend
        mode = "rgb_array" if render else None
        self._envs = [make(env_id, mode) for _ in range(num_envs)]
        self._stepper = family(env_id).stepper(self._envs)
        env = self._envs[0]
        self.spec = _spec(env_id, env)
        shape = (num_envs, env.max_episode_steps, self.spec.action_dim)
        self._actions = np.zeros(shape, np.float32)
        self._steps = np.zeros(num_envs, np.int64)
        self._seeds: list[int | None] = [None] * num_envs
        self._obs = np.zeros((num_envs, self.spec.obs_dim), np.float32)
        self._reward = np.zeros(num_envs, np.float32)
        self._terminated = np.zeros(num_envs, np.bool_)
        self._truncated = np.zeros(num_envs, np.bool_)
        self._success = np.zeros(num_envs, np.bool_)

    @property
    def num_envs(self) -> int:
        """B."""
        return len(self._envs)

    @property
    def obs(self) -> Tensor:
        """The current observation of every row (B, Do); zeros before a row's first reset."""
        return torch.from_numpy(self._obs.copy())

    @property
    def steps(self) -> Tensor:
        """Steps of every row's episode so far (B,)."""
        return torch.from_numpy(self._steps.copy())

    @property
    def running(self) -> Tensor:
        """Rows with an episode in progress (B,) bool."""
        return torch.from_numpy(self._running())

    def _running(self) -> NDArray[np.bool_]:
        begun = np.array([seed is not None for seed in self._seeds])
        return begun & ~self._terminated & ~self._truncated

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Begins new episodes in `rows` with these seeds."""
        for row, seed in zip(rows, seeds, strict=True):
            self._obs[row] = self._envs[row].reset(seed=int(seed))[0]
            self._seeds[row] = int(seed)
            self._steps[row] = 0
        for flags in (self._terminated, self._truncated, self._success):
            flags[list(rows)] = False

    def step(self, action: Tensor, rows: Tensor | None = None) -> StepResult:
        """Steps the rows in progress (of `rows` (n,), if given) with action (B, Da) in [-1, 1].

        Actions outside are clipped. Other rows stay as they are.

        Raises ValueError for a non-finite action of a row that would step.
        """
        running = self._running()
        chosen = running.nonzero()[0] if rows is None else rows.numpy()[running[rows.numpy()]]
        commands = action.detach().cpu().numpy()[chosen]
        if not np.isfinite(commands).all():
            wrong = int(np.argmin(np.isfinite(commands).all(1)))
            raise ValueError(
                f"{self.spec.env_id}: non-finite action {commands[wrong]} in row {chosen[wrong]}"
            )
        self._reward.fill(0.0)
        if len(chosen):
            steps = self._steps[chosen]
            self._actions[chosen, steps] = commands
            self._steps[chosen] = steps = steps + 1
            late = steps >= self.spec.max_episode_steps
            found = self._stepper(chosen, commands)
            self._obs[chosen] = found.obs
            self._reward[chosen] = found.reward
            self._terminated[chosen] = found.terminated
            self._truncated[chosen] = found.truncated | late
            self._success[chosen] = found.success
        return StepResult(
            *(
                torch.from_numpy(buffer.copy())
                for buffer in (
                    self._obs,
                    self._reward,
                    self._terminated,
                    self._truncated,
                    self._success,
                )
            )
        )

    def frame(self, row: int) -> NDArray[np.uint8]:
        """An RGB picture (height, width, 3) of a row; needs render=True."""
        picture: Any = self._envs[row].render()
        return np.asarray(picture, np.uint8)

    def state_dict(self) -> dict[str, Any]:
        """The running episodes as seeds and actions so far: enough to play them again."""
        return {
            "seeds": list(self._seeds),
            "actions": [
                torch.from_numpy(actions[:steps].copy())
                for actions, steps in zip(self._actions, self._steps, strict=True)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Plays the saved episodes again up to where they were. Simulators are deterministic,
        so the result is exact; it costs as many steps as the running episodes have."""
        if len(state["seeds"]) != self.num_envs:
            raise ValueError(f"{len(state['seeds'])} saved rows for {self.num_envs} environments")
        for row, (seed, actions) in enumerate(zip(state["seeds"], state["actions"], strict=True)):
            self._seeds[row] = None
            if seed is None:
                continue
            self.reset([row], [seed])
            played = torch.zeros(self.num_envs, self.spec.action_dim)
            for action in actions:
                played[row] = action
                self.step(played, torch.tensor([row]))

    def close(self) -> None:
        """Frees simulators and pictures."""
        for env in self._envs:
            env.close()


def family(env_id: str) -> Family:
    """The family that owns an id."""
    return next(one for one in FAMILIES if one.matches(env_id))


def make(env_id: str, render_mode: str | None = None) -> Adapter:
    """One environment. Raises UserError for an id that nothing registers."""
    # With MUJOCO_GL set but its library missing, even importing mujoco fails. It is needed for
    # pictures only, and read again when the first is drawn.
    chosen = None if render_mode else os.environ.pop("MUJOCO_GL", None)
    try:
        return family(env_id).make(env_id, render_mode)
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as problem:
        fetch.register()
        known = [
            toy.ENV_ID,
            pusht.ENV_ID,
            pusht.KEYPOINTS_ID,
            *kitchen.ENV_IDS,
            *robosuite.TASKS,
            *gymnasium.registry,
        ]
        close = difflib.get_close_matches(env_id, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"for example {toy.ENV_ID}"
        raise UserError(
            f"env {env_id}: no such environment is registered; {hint} (an environment of your "
            f'own: "module:id", where importing module registers id). {problem}'
        ) from problem
    finally:
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen


@functools.cache
def spec(env_id: str) -> EnvSpec:
    """What there is to know of an environment, without keeping one."""
    own = family(env_id)
    if own.facts is None:
        env = make(env_id)
        try:
            return _spec(env_id, env)
        finally:
            env.close()
    facts = own.facts(env_id)
    one = np.ones(facts.action_dim)
    return EnvSpec(
        env_id=env_id,
        version=versions(own.packages),
        reward_note=own.reward_note,
        bounds=Bounds(-one, one),
        **facts._asdict(),
    )


def _spec(env_id: str, env: Adapter) -> EnvSpec:
    own = family(env_id)
    obs_shape, action_shape = env.observation_space.shape, env.action_space.shape
    assert obs_shape is not None
    assert action_shape is not None
    return EnvSpec(
        env_id=env_id,
        version=versions(own.packages),
        obs_dim=obs_shape[0],
        action_dim=action_shape[0],
        max_episode_steps=env.max_episode_steps,
        has_success=env.has_success,
        reward_note=own.reward_note,
        bounds=env.bounds,
    )


def mirror(env_id: str) -> Tensor | None:
    """Signs (Do + Da,) that turn a step into its mirror image; None where there is no such symmetry."""
    signs = family(env_id).mirror
    return None if signs is None else torch.tensor(signs, dtype=torch.float32)


def score(env_id: str, episode_return: float) -> float | None:
    """The D4RL-normalised score (0 random, 100 expert), where D4RL has a reference.

    The references were measured on D4RL's environments and are applied to today's as they are:
    always to be read beside the raw return.
    """
    reference = family(env_id).reference(env_id)
    if reference is None:
        return None
    low, high = reference
    return 100.0 * (episode_return - low) / (high - low)


def data_note(env_id: str) -> str | None:
    """What differs between this environment and the one that D4RL recorded, for its data and its scores."""
    return mujoco.DATA_NOTES.get(env_id)


def success_at_end(env_id: str, last_reward: float, terminated: bool) -> bool | None:
    """Success of a recorded episode by its last row, or None where that does not show it."""
    rule = family(env_id).success_at_end
    return None if rule is None else rule(last_reward, terminated)


def video_support(env_id: str) -> str | None:
    """None if frames can be had, else one line that says why not, or what would give them."""
    pictures = _pictures(env_id)
    if not pictures.offered:
        return f"no videos of {env_id}: it has no render mode rgb_array"
    if not pictures.need_gl or _gl_backend() is not None:
        return None
    return (
        f"no videos of {env_id}: no OpenGL library could be used; "
        "`apt install libegl1 libgl1-mesa-dri` (or libosmesa6) would give them"
    )


class _Pictures(NamedTuple):
    offered: bool
    need_gl: bool


@functools.cache
def _pictures(env_id: str) -> _Pictures:
    """What an environment draws with; MuJoCo's are the ones that need OpenGL."""
    env = make(env_id)
    try:
        modes = env.metadata["render_modes"]
        model = type(getattr(env.unwrapped, "model", None))
        return _Pictures("rgb_array" in modes, model.__module__.startswith("mujoco"))
    finally:
        env.close()


_GL_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(mujoco.MjData(model))
renderer.render()
"""


@functools.cache
def _gl_backend() -> str | None:
    """The first OpenGL backend that can draw here, tried in a process of its own: where
    libraries are missing, MuJoCo may end the process that tries."""
    chosen = os.environ.get("MUJOCO_GL")
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        surroundings = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _GL_PROBE],
                env=surroundings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=60,
                check=False,
            )
        except subprocess.TimeoutExpired:
            continue
        if probe.returncode == 0:
            return backend
    return None
