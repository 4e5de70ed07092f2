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
    """Human PushT demonstrations: the official zip, or states and pixel targets as Parquet."""

    source: Literal["pusht"] = Field(description="human PushT demonstrations")
    env: Literal["gym_pusht/PushT-v0"] = Field(description="their environment")


class ParquetSource(_Recorded):
    """A Parquet file in the episode schema; observations and actions in the env's own units."""

    source: Literal["parquet"] = Field(description="a Parquet file in the episode schema")


class LeRobotSource(_Recorded):
    """A LeRobot data set of layout v2.0, v2.1 or v3.0; actions in the environment's own units."""

    source: Literal["lerobot"] = Field(description="a LeRobot data set")
    observation: list[str] = Field(
        min_length=1, description="features that make up the observation, in this order"
    )
    reward: Literal["recorded", "last_frame"] = Field(
        description="recorded: the column next.reward; last_frame: 1 on the last frame of every success"
    )


class CalvinSource(_Recorded):
    """CALVIN play data: robot and scene state, relative actions."""

    source: Literal["calvin"] = Field(description="CALVIN play data, one .npz per time step")
    env: str = Field(
        pattern=r"^calvin/[A-D]-[a-z_]+$", description="scene and task, as calvin/D-open_drawer"
    )
    split: Literal["training", "validation"] = Field(description="folder of the data set")
    take: Literal["play", "task"] = Field(
        description="play: whole recordings; task: only the stretches annotated with the task"
    )


class RobomimicSource(_Recorded):
    """A low-dimensional RoboMimic file (HDF5) of the v1.5 release."""

    source: Literal["robomimic"] = Field(description="a RoboMimic low_dim file")
    filter_key: str = Field(description='only the demonstrations in mask/<filter key>; "" for all')


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
    | LeRobotSource
    | CalvinSource
    | RobomimicSource
    | D4RLSource
    | MinariSource
    | ArraysSource,
    Field(discriminator="source"),
]
