"""Checkpoints come back exactly, refuse what they are not, and survive a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modip import checkpoint
from modip.errors import UserError

META: dict[str, Any] = {"counts": {"env_steps": 3}, "spec": {"obs_dim": 28}, "parent": None}


def same(a: Any, b: Any) -> bool:
    """Equal in value, type and, for floats and tensors, in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (a, b) if t.numel()]
        return a.dtype == b.dtype and a.shape == b.shape and (not bits or torch.equal(*bits))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else bool(a == b)


def state() -> dict[str, Any]:
    return {
        "dtypes": [
            torch.tensor([True, False]),
            torch.arange(3),
            torch.randn(2, 3),
            torch.randn(2).double(),
            torch.randn(2).bfloat16(),
            torch.randn(2).half(),
            torch.tensor([1, 2], dtype=torch.int32),
            torch.get_rng_state(),
            torch.tensor(1.5),
            torch.empty(0, 4),
            torch.tensor([torch.nan, -0.0, torch.inf]),
        ],
        "numbers": [
            True,
            1,
            2**127 - 1,
            -0.0,
            0.1,
            1e-320,
            float("nan"),
            float("inf"),
            -float("inf"),
        ],
        "empty": {"list": [], "dict": {}, "tuple": (), "none": None, "text": "ä$"},
        "keys": {0: {"exp_avg": torch.ones(2)}, "0": {"exp_avg": torch.zeros(2)}, -1: (1, [2.0])},
        "looks like ours": {"$tensor": "state/x", "$float": "nan"},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "final"


def test_everything_comes_back_as_it_was(path: Path) -> None:
    before = state()
    checkpoint.save(path, "test", before, META)
    after, meta = checkpoint.load(path, "test")
    assert same(before, after)
    assert same(META, meta)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(
    leaves,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text() | st.integers(), t, max_size=3),
    max_leaves=10,
)


@given(tree=trees)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "final"
    checkpoint.save(path, "test", {"tree": tree}, {})
    assert same({"tree": tree}, checkpoint.load(path, "test")[0])


def test_a_resumed_optimizer_goes_on_exactly(path: Path) -> None:
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            net(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()

    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = nn.Sequential(nn.Linear(4, 33), nn.Mish(), nn.Linear(33, 3))
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99))

    torch.manual_seed(0)
    net, optimizer = new()
    steps(net, optimizer, 3)
    parts = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    checkpoint.save(path, "test", parts, {})
    steps(net, optimizer, 5)

    other, other_optimizer = new()
    loaded, _ = checkpoint.load(path, "test")
    other.load_state_dict(loaded["net"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    steps(other, other_optimizer, 5)
    assert same(dict(net.state_dict()), dict(other.state_dict()))


def test_shared_and_strided_tensors_are_stored_apart(path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    before = {"x": x, "again": x, "row": x[1], "column": x[:, 1], "wide": x[:1].expand(3, 4)}
    checkpoint.save(path, "test", before, {})
    after, _ = checkpoint.load(path, "test")
    assert all(torch.equal(before[k], after[k]) for k in before)
    after["x"].zero_()
    assert after["again"].any()
    assert after["row"].any()


def test_gradients_and_parameters_are_detached(path: Path) -> None:
    checkpoint.save(path, "test", {"w": nn.Parameter(torch.ones(2))}, {})
    loaded = checkpoint.load(path, "test")[0]["w"]
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad


def test_loaded_tensors_do_not_reach_into_the_file(path: Path) -> None:
    checkpoint.save(path, "test", {"x": torch.ones(1000)}, {})
    checkpoint.load(path, "test")[0]["x"].zero_()
    assert checkpoint.load(path, "test")[0]["x"].all()


def test_equal_contents_give_equal_files_and_fingerprints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    content = state()
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, "test", content, META)
    for file in (checkpoint.MANIFEST, checkpoint.TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert checkpoint.fingerprint(tmp_path / "a") == checkpoint.fingerprint(tmp_path / "b")
    content["dtypes"][2][0, 0] += 1
    checkpoint.save(tmp_path / "b", "test", content, META)
    assert checkpoint.fingerprint(tmp_path / "a") != checkpoint.fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": {"b": object()}}, "state/a/b"),
        ({"a": {1.5: 0}}, "state/a"),
        ({"a": {True: 0}}, "state/a"),
    ],
)
def test_what_a_manifest_cannot_hold_is_named(path: Path, value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=f"^{where}: "):
        checkpoint.save(path, "test", value, {})
    with pytest.raises(TypeError, match="meta/x"):
        checkpoint.save(path, "test", {}, {"x": torch.ones(1)})
    assert not path.exists()


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / checkpoint.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_wrong_kind_is_refused(path: Path) -> None:
    checkpoint.save(path, "policy", {}, {})
    with pytest.raises(UserError, match=r"final: holds a 'policy' .* 'model' one is needed"):
        checkpoint.load(path, "model")


def test_an_unknown_version_is_refused(path: Path) -> None:
    checkpoint.save(path, "policy", {}, {})
    edit_manifest(path, schema_version=99)
    with pytest.raises(UserError, match=r"final: schema version 99, .* reads version 1; run"):
        checkpoint.load(path, "policy")


def test_damage_is_found(path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            checkpoint.load(path, "policy")

    refused(r"final: manifest.json is missing.* run the stage")
    checkpoint.save(path, "policy", {"x": torch.ones(100)}, {})
    tensors = path / checkpoint.TENSORS
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    refused(r"tensors.safetensors: damaged \(sha256 .* manifest.json says .*\); delete .* again")
    tensors.write_bytes(data[:-4])
    refused("damaged")
    tensors.unlink()
    refused("tensors.safetensors is missing")
    checkpoint.save(path, "policy", {"x": torch.ones(100)}, {})
    edit_manifest(path, state={"$tensor": "no such"})
    refused(r"damaged \(KeyError")
    (path / checkpoint.MANIFEST).write_text("{")
    refused(r"manifest.json: damaged \(JSONDecodeError")
    (path / checkpoint.MANIFEST).write_text("[]")
    refused(r"manifest.json: damaged \(TypeError")


def test_between_the_two_renames_the_old_one_is_found_and_kept(path: Path) -> None:
    assert not checkpoint.exists(path)
    checkpoint.save(path, "test", {"n": 1}, {})
    aside = path.with_name(".final.old")
    path.rename(aside)
    assert checkpoint.exists(path)
    assert checkpoint.load(path, "test")[0] == {"n": 1}
    with pytest.raises(TypeError):
        checkpoint.save(path, "test", {"n": object()}, {})
    assert checkpoint.load(path, "test")[0] == {"n": 1}
    checkpoint.save(path, "test", {"n": 2}, {})
    assert checkpoint.load(path, "test")[0] == {"n": 2}
    assert os.listdir(path.parent) == ["final"]


WRITER = """
import sys, torch
from pathlib import Path
from modip import checkpoint
for n in range(10**6):
    checkpoint.save(Path(sys.argv[1]), "test", {"n": n, "x": torch.full((1000,), float(n))}, {})
    print(n, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_or_the_next(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for i in range(8):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.05 + 0.0037 * i)
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
        last = int(rest[-1]) if rest else 0
        loaded, _ = checkpoint.load(path, "test")
        assert loaded["n"] in (last, last + 1)
        assert loaded["x"].tolist() == [float(loaded["n"])] * 1000
