"""Collecting demonstrations: a scripted demonstrator acts in the environment, episode by episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from modip.data.episodes import DatasetInfo, Episodes
from modip.data.sources import FetchSource, ToySource
from modip.envs import BatchedEnv
from modip.envs.family import Array


class Demonstrator(Protocol):
    """Acts through one episode."""

    def act(self, obs: Array) -> Array:
        """The next action (Da,) in [-1, 1] for an observation (Do,)."""
        ...


def collect(
    dataset: str,
    config: FetchSource | ToySource,
    demonstrator: Callable[[float, np.random.Generator], Demonstrator],
    description: str,
    advance: Callable[[], None],
) -> Episodes:
    """`config.episodes` episodes; `advance` is called after each.

    Every episode has its own start and its own demonstrator, drawn from (seed, episode): the
    first n of more episodes are the same.
    """
    env = BatchedEnv(config.env, 1)
    observation, action, reward, terminated, truncated, length = [], [], [], [], [], []
    for episode in range(config.episodes):
        sequence = np.random.SeedSequence((config.seed, episode))
        start = int(sequence.generate_state(1)[0] >> 1)
        who = demonstrator(config.noise, np.random.default_rng(sequence))
        env.reset([0], [start])
        obs = env.obs
        steps = 0
        while bool(env.running[0]):
            move = who.act(obs[0].numpy())
            observation.append(obs[0].numpy())
            action.append(move)
            result = env.step(torch.from_numpy(move)[None])
            obs = result.obs
            reward.append(float(result.reward[0]))
            terminated.append(bool(result.terminated[0]))
            truncated.append(bool(result.truncated[0]))
            steps += 1
        length.append(steps)
        advance()
    env.close()
    return Episodes(
        info=DatasetInfo(
            dataset=dataset,
            env_id=config.env,
            env_version=env.spec.version,
            source=f"scripted here: noise {config.noise}, seed {config.seed}",
            licence="the project's own",
            sha256="",
            description=description,
        ),
        observation=np.stack(observation),
        action=np.stack(action),
        reward=np.array(reward, np.float32),
        terminated=np.array(terminated),
        truncated=np.array(truncated),
        episode_id=np.repeat(np.arange(config.episodes), length).astype(np.int32),
        step=np.concatenate([np.arange(steps) for steps in length]).astype(np.int32),
    )
