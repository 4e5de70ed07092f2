"""The nouns every part shares, and the letters of their shapes.

B batch, Ta executed actions, H chunk length, K denoising steps, N candidates, E ensemble members,
Do observation, Da action and Dz latent dimensions, L rows of a window. The policy sees one observation,
so a history axis does not appear. Actions are normalised to [-1, 1] everywhere in modip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]
"""Detached scalars; read as numbers only when they are logged, so that no update waits for the device."""
State = dict[str, Any]
"""A nested dict or list of tensors, numbers, strings and None: what `modip.checkpoint` writes."""


@dataclass(frozen=True)
class Spec:
    """What a policy or model was made for; a checkpoint refuses to load into another."""

    dataset: str
    env_id: str
    obs_dim: int
    action_dim: int


class Window(NamedTuple):
    """L consecutive rows of B episodes. Rows past an episode's end repeat its last row, with mask 0."""

    obs: Tensor  # (B, L, Do)
    action: Tensor  # (B, L, Da)
    reward: Tensor  # (B, L)
    terminated: Tensor  # (B, L) 1.0 where the episode terminated at that row
    mask: Tensor  # (B, L) 1.0 where the row belongs to the episode


class ChunkStep(NamedTuple):
    """What the environments answered to one executed chunk, for the rows that were in progress.

    Row i of a stream stands for one environment; `mask` is 0 after its episode ended inside the chunk.
    """

    obs: Tensor  # (B, Ta, Do) the observation before each action
    action: Tensor  # (B, Ta, Da)
    reward: Tensor  # (B, Ta)
    terminated: Tensor  # (B, Ta) bool
    truncated: Tensor  # (B, Ta) bool
    mask: Tensor  # (B, Ta) bool

    @property
    def env_steps(self) -> int:
        return int(self.mask.sum())


class Plan(NamedTuple):
    """The planner's answer for B observations."""

    chunk: Tensor  # (B, h, Da) the chunk to execute
    value: Tensor  # (B,) its planned return, with the penalty
    prior_value: Tensor  # (B,) mean planned return of the prior's own candidates
    mean: Tensor  # (B, h, Da) centre of the last search distribution: the next warm start
    std: Tensor  # (B, h, Da) its spread


class ChunkPolicy(Protocol):
    """A policy that can be saved, rebuilt and judged, whatever it is made of; an nn.Module has the rest."""

    shape: tuple[int, int]
    """(H, Da) of what it samples."""
    act_steps: int
    """Actions executed of it before the next decision."""

    @property
    def settings(self) -> dict[str, Any]:
        """Values that rebuild it."""
        ...

    def sample(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """(B, Do) -> (B, H, Da) in [-1, 1]."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def to(self, device: torch.device | str) -> Self: ...
    def eval(self) -> Self: ...


class Learns(Protocol):
    """Whatever learns one unit at a time and can be resumed exactly."""

    def update(self) -> Metrics:
        """One unit of learning; {} when it is not time to learn."""
        ...

    def state_dict(self) -> State:
        """Everything an exact resume needs."""
        ...

    def load_state_dict(self, state: State) -> None: ...


class Agent(Learns, Protocol):
    """What the loops know of an algorithm."""

    @property
    def offline_left(self) -> int:
        """Updates it has yet to learn offline, before its first environment step."""
        ...

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """Chunk to execute, (B, Do) -> (B, Ta, Da), drawing its noise from `generator`."""
        ...

    def observe(self, step: ChunkStep) -> None:
        """Store what the environments answered."""
        ...
