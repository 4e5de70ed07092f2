"""robosuite's tasks where robosuite is missing or of another release; tests/robosuite/ has the rest."""

from __future__ import annotations

import pytest

from modip import envs
from modip.envs import BatchedEnv, robosuite
from modip.errors import UserError


@pytest.mark.parametrize(
    ("version", "there"), [(None, "none"), ("1.4.1", r"1\.4\.1"), ("1.5.1", r"1\.5\.1")]
)
@pytest.mark.parametrize("env_id", ["robosuite/Lift", "robosuite/PickPlaceCan-dense"])
def test_what_is_missing_is_said(
    env_id: str, version: str | None, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robosuite, "installed", lambda: version)
    with pytest.raises(
        UserError,
        match=rf"env {env_id}: it needs robosuite 1\.5, from 1\.5\.2 on, and {there} is.*`make robosuite`",
    ):
        BatchedEnv(env_id, 1)


def test_other_tasks_are_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"env robosuite/Stack: no .*robosuite/Lift, .*ToolHang"):
        BatchedEnv("robosuite/Stack", 1)
    with pytest.raises(UserError, match=r"env robosuite/Stack-dense: no .*robosuite/Lift"):
        envs.spec("robosuite/Stack-dense")
    with pytest.raises(UserError, match="did you mean robosuite/ToolHang"):
        BatchedEnv("robosuit/ToolHang", 1)


def test_widths_and_time_limits_are_robomimics() -> None:
    found = {i: (t.obs_dim, t.action_dim, t.max_episode_steps) for i, t in robosuite.TASKS.items()}
    assert found == {
        "robosuite/Lift": (19, 7, 400),
        "robosuite/Lift-dense": (19, 7, 400),
        "robosuite/PickPlaceCan": (23, 7, 400),
        "robosuite/PickPlaceCan-dense": (23, 7, 400),
        "robosuite/NutAssemblySquare": (23, 7, 400),
        "robosuite/TwoArmTransport": (59, 14, 700),
        "robosuite/ToolHang": (53, 7, 700),
    }


def test_a_recorded_episode_shows_success_where_it_ends_there() -> None:
    assert envs.success_at_end("robosuite/Lift", 1.0, True) is True
    assert envs.success_at_end("robosuite/Lift", 0.0, False) is False
    assert envs.success_at_end("robosuite/Lift-dense", 1.0, False) is None
