"""Where a data set comes from: one entry of the `data` section of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    env: str = Field(min_length=1, description="Gymnasium id of the environment")


class _Scripted(_Source):
    episodes: int = Field(ge=1, le=100_000, description="demonstrations to collect")
    noise: float = Field(ge=0.0, le=5.0, description="how badly it demonstrates; 0 is its best")
    seed: int = Field(ge=0, le=2**31 - 1, description="seed of the demonstrator and its starts")


class FetchSource(_Scripted):
    """Demonstrations collected here, by a scripted and noisy waypoint controller."""

    source: Literal["fetch"] = Field(description="scripted pick-and-place demonstrator")
    env: Literal["FetchPickAndPlace-v4"] = Field(description="the one task it can do")


class ToySource(_Scripted):
    """Demonstrations of the toy task, collected here: go to the goal, with noise."""

    source: Literal["toy"] = Field(description="scripted toy demonstrator")
    env: Literal["modip/Toy-v0"] = Field(description="the one task it can do")


class _Recorded(_Source):
    path: str = Field(min_length=1, description="file, folder or URL of the recording")


class PushTSource(_Recorded):
    """Human PushT demonstrations: state observations in pixels, absolute pixel targets."""

    source: Literal["pusht"] = Field(description="human PushT demonstrations")
    env: Literal["gym_pusht/PushT-v0"] = Field(description="their environment")


class ParquetSource(_Recorded):
    """A Parquet file in the episode schema; observations and actions in the env's own units."""

    source: Literal["parquet"] = Field(description="a Parquet file in the episode schema")


class D4RLSource(_Recorded):
    """A D4RL HDF5 file: MuJoCo v2, or kitchen v0 (with the 60-number environments)."""

    source: Literal["d4rl"] = Field(description="a D4RL HDF5 file")


class MinariSource(_Recorded):
    """A Minari data set's folder: data/metadata.json and its HDF5 or Arrow files."""

    source: Literal["minari"] = Field(description="a Minari data set")


class ArraysSource(_Recorded):
    """Arrays of an HDF5 or npz file, by their names; observations and actions in the env's own units.

    With {episode} in the names, every number in its place is an episode: data/demo_{episode}/obs.
    An episode that has no end flag is taken as truncated at its last row.
    """

    source: Literal["arrays"] = Field(description="arrays of an HDF5 or npz file")
    observation: str = Field(min_length=1, description="array of observations (N, Do)")
    action: str = Field(min_length=1, description="array of actions (N, Da)")
    reward: str = Field(min_length=1, description="array of rewards (N,)")
    terminated: str = Field(description="array of flags (N,): the task ended; '' for none")
    truncated: str = Field(description="array of flags (N,): cut off; '' for none")
    episode_ends: str = Field(
        description="array of the row numbers after each episode's last; '' for none"
    )


SourceConfig = Annotated[
    FetchSource
    | ToySource
    | PushTSource
    | ParquetSource
    | D4RLSource
    | MinariSource
    | ArraysSource,
    Field(discriminator="source"),
]
