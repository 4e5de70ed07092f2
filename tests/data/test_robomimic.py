"""RoboMimic files in their own layout: what becomes of them, and every refusal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from modip.data import episodes, robomimic
from modip.data.episodes import Episodes
from modip.data.sources import RobomimicSource
from modip.envs import robosuite
from modip.errors import UserError

# env_args of the v1.5 files, word for word but for the cameras.
ENV_ARGS: dict[str, Any] = {
    "env_name": "Lift",
    "env_version": "1.5.1",
    "type": 1,
    "env_kwargs": {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": {
            "type": "BASIC",
            "body_parts": {
                "right": {
                    "type": "OSC_POSE",
                    "input_max": 1,
                    "input_min": -1,
                    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
                    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
                    "kp": 150,
                    "damping": 1,
                    "impedance_mode": "fixed",
                    "kp_limits": [0, 300],
                    "damping_limits": [0, 10],
                    "position_limits": None,
                    "orientation_limits": None,
                    "uncouple_pos_ori": True,
                    "control_delta": True,
                    "interpolation": None,
                    "ramp_ratio": 0.2,
                    "input_ref_frame": "world",
                    "gripper": {"type": "GRIP"},
                }
            },
        },
        "robots": ["Panda"],
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "lite_physics": False,
        "reward_shaping": False,
    },
}
OBJECTS = {
    "Lift": (1, 10),
    "PickPlaceCan": (1, 14),
    "NutAssemblySquare": (1, 14),
    "TwoArmTransport": (2, 41),
    "ToolHang": (1, 44),
}
Demos = dict[str, dict[str, NDArray[Any]]]


def demonstrations(rewards: dict[str, list[float]], name: str = "Lift") -> Demos:
    """Arrays of every demonstration, by their keys in the file; random but for the rewards."""
    rng = np.random.default_rng(0)
    arms, objects = OBJECTS[name]
    widths = {"object": objects}
    for arm in range(arms):
        for part, width in (
            ("eef_pos", 3), ("eef_quat", 4), ("eef_quat_site", 4), ("gripper_qpos", 2), ("gripper_qvel", 2),
            ("joint_pos", 7), ("joint_pos_cos", 7), ("joint_pos_sin", 7), ("joint_vel", 7),
        ):  # fmt: skip
            widths[f"robot{arm}_{part}"] = width
    made: Demos = {}
    for demo, reward in rewards.items():
        n = len(reward)
        done = np.array(reward) == 1
        done[-1] = True
        made[demo] = {
            "actions": rng.uniform(-1, 1, (n, 7 * arms)),
            "states": rng.normal(size=(n, 32)),
            "rewards": np.array(reward, np.float64),
            "dones": done.astype(np.int64),
        }
        for key, width in widths.items():
            whole = rng.normal(size=(n + 1, width))
            made[demo][f"obs/{key}"], made[demo][f"next_obs/{key}"] = whole[:-1], whole[1:]
    return made


def write(
    path: Path, made: Demos, env_args: dict[str, Any], masks: dict[str, list[str]] | None = None
) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for demo, arrays in made.items():
            group = data.create_group(demo)
            for key, values in arrays.items():
                group.create_dataset(key, data=values)
            group.attrs["num_samples"] = len(arrays["actions"])
            group.attrs["model_file"] = "<mujoco/>"
        data.attrs["total"] = sum(len(arrays["actions"]) for arrays in made.values())
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        for key, names in (masks or {}).items():
            file[f"mask/{key}"] = np.array(names, dtype="S")
    return path


def env_args(name: str = "Lift", version: str | None = "1.5.1", **kwargs: Any) -> dict[str, Any]:
    told = copy.deepcopy(ENV_ARGS)
    told["env_name"], told["env_version"] = name, version
    if version is None:
        del told["env_version"]
    told["env_kwargs"].update(kwargs)
    return told


def source(env: str = "robosuite/Lift", filter_key: str = "") -> RobomimicSource:
    return RobomimicSource(
        source="robomimic", env=env, path="the/low_dim_v15.hdf5", filter_key=filter_key
    )


def convert(path: Path, config: RobomimicSource) -> Episodes:
    return episodes.collected(robomimic.convert("mine", config, path, "5ha"))


REWARDS = {
    "demo_10": [0.0, 0.0, 0.0],
    "demo_2": [0.0, 0.0, 1.0, 1.0, 0.0, 1.0],
    "demo_0": [1.0],
    "demo_1": [0.0],
}


def test_demonstrations_end_at_their_first_success(tmp_path: Path) -> None:
    made = demonstrations(REWARDS)
    data = convert(write(tmp_path / "f.hdf5", made, env_args()), source())
    assert data.lengths.tolist() == [1, 1, 3, 3]  # demo_0, 1, 2 cut after its success, 10
    ends = data.starts[1:] - 1
    assert data.terminated[ends].tolist() == [True, False, True, False]
    assert data.truncated[ends].tolist() == [False, True, False, True]
    assert (data.terminated | data.truncated).sum() == 4
    assert data.returns.tolist() == [1, 0, 1, 0]
    two = made["demo_2"]
    parts = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    wanted = np.hstack([two[f"obs/{part}"][:3] for part in parts])
    np.testing.assert_array_equal(data.observation[2:5], wanted.astype(np.float32))
    np.testing.assert_array_equal(data.action[2:5], two["actions"][:3].astype(np.float32))
    facts = episodes.statistics(data.recording)
    assert (facts["success_rate"], facts["terminated"], facts["obs_dim"]) == (0.5, 2, 19)
    assert (data.info.dataset, data.info.licence, data.info.sha256) == ("mine", "MIT", "5ha")
    assert "4 demonstrations" in data.info.description


@pytest.mark.parametrize("name", OBJECTS)
def test_every_task_is_read_in_the_order_of_its_environment(name: str, tmp_path: Path) -> None:
    made = demonstrations({"demo_0": [0.0, 0.0]}, name)
    path = write(tmp_path / "f.hdf5", made, env_args(name))
    data = convert(path, source(f"robosuite/{name}"))
    arms, objects = OBJECTS[name]
    assert data.observation.shape == (2, 9 * arms + objects)
    assert data.action.shape == (2, 7 * arms)
    first = made["demo_0"]
    np.testing.assert_allclose(data.observation[:, -objects:], first["obs/object"], rtol=1e-6)
    for arm in range(arms):
        for begin, part in ((0, "eef_pos"), (3, "eef_quat"), (7, "gripper_qpos")):
            values = first[f"obs/robot{arm}_{part}"]
            where = slice(9 * arm + begin, 9 * arm + begin + values.shape[1])
            np.testing.assert_allclose(data.observation[:, where], values, rtol=1e-6)


def test_dense_rewards_have_an_environment_of_their_own(tmp_path: Path) -> None:
    made = demonstrations({"demo_0": [0.1, 0.5, 1.0, 0.2]})
    path = write(tmp_path / "f.hdf5", made, env_args(reward_shaping=True))
    data = convert(path, source("robosuite/Lift-dense"))
    np.testing.assert_array_equal(data.reward, np.array([0.1, 0.5, 1.0, 0.2], np.float32))
    assert data.truncated.tolist() == [False, False, False, True]
    assert not data.terminated.any()
    with pytest.raises(UserError, match="reward_shaping True, but robosuite/Lift has False"):
        convert(path, source())


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_any_width_of_numbers_is_read(kind: Any, tmp_path: Path) -> None:
    made = demonstrations(REWARDS)
    narrow = {d: {k: a.astype(kind) for k, a in arrays.items()} for d, arrays in made.items()}
    data = convert(write(tmp_path / "f.hdf5", narrow, env_args()), source())
    wide = convert(write(tmp_path / "g.hdf5", made, env_args()), source())
    np.testing.assert_allclose(data.observation, wide.observation, atol=4e-3)
    assert data.observation.dtype == data.action.dtype == data.reward.dtype == np.float32
    np.testing.assert_array_equal(data.terminated, wide.terminated)


def test_filter_keys(tmp_path: Path) -> None:
    masks = {"train": ["demo_10", "demo_2"], "valid": ["demo_0"], "20_percent": ["demo_77"]}
    path = write(tmp_path / "f.hdf5", demonstrations(REWARDS), env_args(), masks)
    assert convert(path, source(filter_key="train")).lengths.tolist() == [3, 3]
    assert convert(path, source(filter_key="valid")).lengths.tolist() == [1]
    with pytest.raises(UserError, match=r"no filter key bad; it has 20_percent, train, valid;"):
        convert(path, source(filter_key="bad"))
    with pytest.raises(UserError, match="mask/20_percent names demo_77"):
        convert(path, source(filter_key="20_percent"))
    path = write(path, demonstrations(REWARDS), env_args())
    with pytest.raises(UserError, match="no filter key train; it has none"):
        convert(path, source(filter_key="train"))


def test_the_version_of_robosuite_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = demonstrations(REWARDS)
    path = write(tmp_path / "f.hdf5", made, env_args())
    monkeypatch.setattr(robosuite, "installed", lambda: None)
    assert convert(path, source()).info.env_version == (
        "robosuite 1.5.1 (not checked: it is not installed)"
    )
    monkeypatch.setattr(robosuite, "installed", lambda: "1.5.2")
    assert convert(path, source()).info.env_version == "robosuite 1.5.1 (1.5.2 installed)"
    monkeypatch.setattr(robosuite, "installed", lambda: "1.4.1")
    with pytest.raises(UserError, match=r"robosuite 1\.5\.1, but robosuite 1\.4\.1 is installed"):
        convert(path, source())
    monkeypatch.setattr(robosuite, "installed", lambda: "1.5.2")
    for version, words in (("1.4.1", "1.4.1"), (None, "older than 1.4")):
        write(path, made, env_args(version=version))
        with pytest.raises(UserError, match=f"robosuite {words}, .*1.5.2 installed.*low_dim_v15"):
            convert(path, source())


def controller(**change: Any) -> dict[str, Any]:
    told = env_args()
    told["env_kwargs"]["controller_configs"]["body_parts"]["right"].update(change)
    return told


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (env_args("PickPlaceCan"), r"in PickPlaceCan.*set env to robosuite/PickPlaceCan or"),
        (env_args("Stack"), "no robosuite task that modip has"),
        (env_args(control_freq=10), "control_freq 10, but robosuite/Lift has 20"),
        (controller(control_delta=False), "input_type absolute, but robosuite/Lift has delta"),
        (controller(input_ref_frame="base"), "input_ref_frame base"),
        (controller(kp=300), "kp 300"),
        (env_args(controller_configs=[{"type": "OSC_POSE"}, {"kp": 7}]), "kp 7, but"),
        (env_args(controller_configs={"body_parts": {"right": [1]}}), "does not describe"),
        ({**env_args(), "env_version": 1.4}, "robosuite 1.4, but"),
        ({"env_name": "Lift"}, "env_args .*does not describe"),
        ({"env_name": "Lift", "env_kwargs": {"controller_configs": 3}}, "does not describe"),
    ],
)
def test_another_environment_is_refused(told: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.hdf5", demonstrations(REWARDS), told)
    with pytest.raises(UserError, match=f"^the/low_dim_v15.hdf5: .*{words}"):
        convert(path, source())


def without(key: str) -> Callable[[Demos], None]:
    return lambda made: made["demo_2"].__delitem__(key)


def longer(key: str) -> Callable[[Demos], None]:
    return lambda made: made["demo_2"].update({key: np.repeat(made["demo_2"][key], 2, axis=0)})


def becomes(key: str, values: Any) -> Callable[[Demos], None]:
    return lambda made: made["demo_2"].update({key: np.asarray(values)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("rewards"), "data/demo_2/rewards is missing"),
        (without("obs/object"), "data/demo_2/obs/object is missing.*low_dim file"),
        (longer("rewards"), r"demo_2/rewards has shape \(12,\).*num_samples is 6"),
        (longer("obs/object"), r"demo_2/obs/object has shape \(12, 10\)"),
        (becomes("rewards", [[0.0]] * 6), r"demo_2/rewards has shape \(6, 1\)"),
        (becomes("rewards", [b"1"] * 6), r"demo_2/rewards has shape \(6,\) of \|S1"),
        (becomes("actions", np.zeros((6, 8))), "action has 8 numbers, but robosuite/Lift has 7"),
        (becomes("obs/object", np.zeros((6, 9))), "observation has 18 numbers"),
        (becomes("actions", np.full((6, 7), 1.5)), r"action\[0\] is 1.5 in row 2, outside"),
        (lambda made: made.update({"bad": made["demo_2"]}), "data/bad is no demo_NUMBER"),
        (lambda made: made.clear(), "no demonstrations"),
        (
            lambda made: (
                made.update(demonstrations({"demo_3": [0.0]}))
                or made["demo_3"].update({k: a[:0] for k, a in made["demo_3"].items()})
            ),
            "data/demo_3 has no rows",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    change: Callable[[Demos], Any], words: str, tmp_path: Path
) -> None:
    made = demonstrations(REWARDS)
    change(made)
    path = write(tmp_path / "f.hdf5", made, env_args())
    with pytest.raises(UserError, match=f"^the/low_dim_v15.hdf5: .*{words}"):
        convert(path, source())


def test_other_files_and_broken_ones_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f.hdf5", demonstrations(REWARDS), env_args())
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"not a complete HDF5 file .*; download it again"):
            convert(path, source())
    with pytest.raises(UserError, match="one HDF5 file; give its path"):
        convert(tmp_path, source())
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros(3)
    with pytest.raises(UserError, match="no group data"):
        convert(path, source())
    write(path, demonstrations(REWARDS), env_args())
    with h5py.File(path, "a") as file:
        del file["data/demo_2"].attrs["num_samples"]
    with pytest.raises(UserError, match="demo_2 has no attribute num_samples"):
        convert(path, source())
    with h5py.File(path, "a") as file:
        del file["data"].attrs["env_args"]
    with pytest.raises(UserError, match="env_args"):
        convert(path, source())


def test_values_that_are_not_finite_are_refused_where_they_are_written(tmp_path: Path) -> None:
    made = demonstrations(REWARDS)
    made["demo_10"]["rewards"][1] = np.nan
    recording = robomimic.convert(
        "mine", source(), write(tmp_path / "f.hdf5", made, env_args()), "5ha"
    )
    with pytest.raises(UserError, match=r"reward.*nan"):
        episodes.write(tmp_path / "out.parquet", recording, Path("the/low_dim_v15.hdf5"))
    assert not (tmp_path / "out.parquet").exists()


def test_samples_are_recorded_steps(tmp_path: Path) -> None:
    made = demonstrations({f"demo_{i}": [0.0] * n for i, n in enumerate((30, 1, 2, 3, 30))})
    path = write(tmp_path / "f.hdf5", made, env_args())
    found = list(robomimic.samples(source(), path, 21))
    assert len(found) == 21  # 10 of each long one, 1 of the three rows, none of shorter ones
    assert len({bytes(sample.obs) for sample in found}) == 21
    everything = convert(path, source())
    for sample in found:
        row = int(np.flatnonzero((everything.observation == sample.obs).all(axis=1))[0])
        np.testing.assert_array_equal(everything.action[row], sample.action)
        np.testing.assert_array_equal(everything.observation[row + 1], sample.next_obs)
        assert everything.step[row] > 0
        assert everything.episode_id[row] == everything.episode_id[row + 1]
    again = list(robomimic.samples(source(), path, 21))
    assert [bytes(s.obs) for s in again] == [bytes(s.obs) for s in found]
    assert len(list(robomimic.samples(source(), path, 5))) == 5
    for demo in made.values():
        del demo["states"]
    write(path, made, env_args())
    with pytest.raises(UserError, match="states is missing"):
        list(robomimic.samples(source(), path, 5))
