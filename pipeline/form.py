"""What a user fills in: the parameters of the flows, as Prefect's form shows and checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler

from modip import agents
from modip.config import Params, load, unknown
from pipeline.workspace import PARAMS


@dataclass(frozen=True)
class OneOf:
    """Known names: a choice in Prefect's form, asked for when the form is made, checked when a run starts."""

    what: str
    known: Callable[[], Sequence[str]]

    def check(self, value: str) -> str:
        known = tuple(self.known())
        if value not in known:
            raise ValueError(unknown(self.what, value, known))
        return value

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(core), "enum": list(self.known())}


def _params() -> Params:
    """params.yaml as it stands, read anew only where it has changed: the forms ask for it twenty times."""
    status = PARAMS.stat() if PARAMS.exists() else None
    return _read(Path.cwd(), status and (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)
def _read(_folder: Path, _version: tuple[int, int, int] | None) -> Params:
    return load(PARAMS)


DATASET = OneOf("data set", lambda: tuple(_params().data))
AGENT = OneOf("agent", lambda: agents.names(_params()))
Dataset = Annotated[str, AfterValidator(DATASET.check), DATASET]
Agent = Annotated[str, AfterValidator(AGENT.check), AGENT]
Seed = Annotated[int, Field(ge=0, le=2_000)]
Value = bool | int | float | str | list[Any] | dict[str, Any]
Overrides = dict[str, Value]


class Form(BaseModel):
    """A part of the form; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Where nothing is said, params.yaml as it stands when a run starts; the form shows it as it stood when it was made.


def _all(name: str) -> Callable[[], Any]:
    return lambda: list(getattr(_params(), name))


def _first(name: str) -> Callable[[], Any]:
    return lambda: getattr(_params(), name)[0]


def _show(default: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda schema: schema.update(default=default())


class Matrix(Form):
    """The cells: every data set with every agent and every seed."""

    dataset: list[Dataset] = Field(
        default_factory=_all("dataset"),
        json_schema_extra=_show(_all("dataset")),
        min_length=1,
        description="data sets, ids of params.yaml",
    )
    agent: list[Agent] = Field(
        default_factory=_all("agent"),
        json_schema_extra=_show(_all("agent")),
        min_length=1,
        description="agents; bc is the control",
    )
    seed: list[Seed] = Field(
        default_factory=_all("seed"),
        json_schema_extra=_show(_all("seed")),
        min_length=1,
        description="seeds",
    )


class Cell(Form):
    """One cell."""

    dataset: Dataset = Field(
        default_factory=_first("dataset"),
        json_schema_extra=_show(_first("dataset")),
        description="data set, an id of params.yaml",
    )
    agent: Agent = Field(
        default_factory=_first("agent"),
        json_schema_extra=_show(_first("agent")),
        description="agent; bc is the control",
    )
    seed: Seed = Field(
        default_factory=_first("seed"),
        json_schema_extra=_show(_first("seed")),
        description="seed of everything random",
    )


class Limits(Form):
    """How long a stage may take, how often a fault is met again, and how much a lost machine costs."""

    minutes: float = Field(default=1440.0, gt=0, description="timeout of a stage, in minutes")
    minutes_by_stage: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description='other timeouts, by stage: {"finetune": 600}'
    )
    retries: int = Field(
        default=4, ge=0, description="of a stage that was killed or whose remote did not answer"
    )
    retry_seconds: float = Field(
        default=10.0, gt=0, description="before the first retry; twice as long before each next"
    )
    mirror_seconds: float = Field(
        default=60.0,
        gt=0,
        description="between two copies of a running stage's checkpoint to DVC's remote",
    )
