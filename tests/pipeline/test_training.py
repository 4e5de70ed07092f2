"""When a run is judged along the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modip.types import Metrics, State
from pipeline import training
from tests.helpers import SPEC, demonstrations, small_cell


class Job:
    """Learns three updates offline, then takes two environment steps and an update, over and over."""

    def __init__(self) -> None:
        self.env_steps = self.grad_steps = self.calls = 0

    @property
    def offline_left(self) -> int:
        return max(0, 3 - self.calls)

    def advance(self) -> Metrics | None:
        if self.env_steps >= 8:
            return None
        step = not self.offline_left and self.calls % 2
        self.calls += 1
        self.env_steps += 2 * bool(step)
        self.grad_steps += not step
        return {} if step else {"loss": torch.zeros(())}

    def state_dict(self) -> State:
        return {"counts": [self.env_steps, self.grad_steps, self.calls]}

    def load_state_dict(self, state: State) -> None:
        self.env_steps, self.grad_steps, self.calls = state["counts"]


def test_offline_updates_are_done_before_an_agent_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So that the curve's first point, at no environment step, is what offline learning made of the clone.

    They have a bar of their own: some take longer than the steps, and would make the time left of these absurd.
    """
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    cell = small_cell()
    task = training.Task(cell, SPEC, demonstrations(cell), "1", "0", 0, "bc")
    job: Any = Job()
    seen: list[tuple[int, int]] = []

    def at_point() -> list[dict[str, Any]]:
        seen.append((job.env_steps, job.grad_steps))
        return []

    training.run(
        job, task, tmp_path / "scratch", title="t", unit="steps", total=8, done=lambda: job.env_steps,
        points=[0, 4, 8], at_point=at_point,
    )  # fmt: skip
    assert [steps for steps, _ in seen] == [0, 4, 8]
    assert seen[0][1] == 3
    assert [line.split(",")[0] for line in caplog.messages] == [
        "t (offline first) 3/3 updates",
        "t 8/8 steps",
    ]
