"""The exchange on a real S3 server, in a folder and without a remote: whole or not at all, and faults as one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modip.errors import UserError
from pipeline.exchange import NEWEST, Exchange
from pipeline.workspace import HOME, CurableError
from tests.helpers import ROOT
from tests.s3 import S3, use_remote

NAME = "states/finetune@d4rl/hopper*-v2 [a]?#%"  # what globs and URLs would read something else in


def opened(root: Path, url: str, s3: S3) -> Exchange:
    use_remote(root, url, s3.endpoint if url.startswith("s3:") else None)
    return Exchange.open(root)


@pytest.fixture(params=["s3", "folder", "none"])
def url(request: pytest.FixtureRequest, s3: S3) -> str:
    """Of a remote that nobody has used; the relative one starts from the repository's configuration."""
    return {"s3": s3.bucket, "folder": lambda: "../../store [x]", "none": lambda: ""}[
        request.param
    ]()


def folder(path: Path, number: int, size: int = 100_000) -> Path:
    """Three files, all of whose bytes are `number`."""
    for name in ("state/a", "state/b", "c.jsonl"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes([number]) * size)
    return path


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_files_come_back_and_go(url: str, s3: S3, tmp_path: Path) -> None:
    mine = opened(tmp_path / "repo", url, s3)
    assert mine.shared == bool(url)
    yours = Exchange.open(tmp_path / "repo")
    assert yours.read(NAME) is None
    assert yours.names("claims") == []
    mine.remove(NAME)
    mine.remove("claims")
    mine.write(NAME, b"")
    mine.write("claims/b", b"one")
    assert yours.names("claims") == ["claims/b"]
    mine.write("claims/a/deep", b"two")
    mine.write("claims/c", b"new")  # after yours had looked into the folder
    assert yours.read("claims/c") == b"new"
    yours.remove("claims/c")
    mine.write("claimsnot", b"three")
    mine.write("claims/b", b"four")
    assert (yours.read(NAME), yours.read("claims/b")) == (b"", b"four")
    assert yours.names("claims") == ["claims/a/deep", "claims/b"]
    assert yours.names("states") == [NAME]
    yours.remove("claims")
    yours.remove(NAME)
    assert (mine.read("claims/a/deep"), mine.names("claims"), mine.read(NAME)) == (None, [], None)
    assert mine.read("claimsnot") == b"three"


def test_where_it_lies(s3: S3, tmp_path: Path) -> None:
    opened(tmp_path / "one" / "repo", "../../store", s3).write("x", b"1")
    assert (tmp_path / "one" / "store" / "modip" / "x").read_bytes() == b"1"
    opened(tmp_path / "two", "", s3).write("x", b"1")
    assert (tmp_path / "two" / HOME / "exchange" / "x").read_bytes() == b"1"
    local = tmp_path / "two" / ".dvc" / "config.local"
    local.write_text(f"[core]\nremote = mine\n['remote \"mine\"']\nurl = {tmp_path}/three\n")
    assert Exchange.open(tmp_path / "two").shared


def test_a_folder_is_replaced_as_a_whole(url: str, s3: S3, tmp_path: Path) -> None:
    exchange, target = opened(tmp_path / "repo", url, s3), tmp_path / "there" / "job"
    assert not exchange.fetch(NAME, target)
    assert exchange.about(NAME) is None
    first = folder(tmp_path / "first", 1)
    exchange.send(first, NAME, {"progress": [1, 0.5]})
    assert exchange.about(NAME) == {"progress": [1, 0.5]}
    assert exchange.sent("states") == [NAME]
    assert exchange.fetch(NAME, target)
    assert content(target) == content(first)
    (target / "state" / "left").write_text("over")
    second = folder(tmp_path / "second", 2)
    (second / "c.jsonl").unlink()
    (second / "empty").touch()
    exchange.send(second, NAME, {})
    assert len(exchange.names(NAME)) == 1 + 3  # nothing is left of the first
    assert exchange.fetch(NAME, target)
    assert content(target) == content(second)
    assert [p.name for p in target.parent.iterdir()] == ["job"]
    exchange.remove(NAME)
    assert not exchange.fetch(NAME, target)
    assert content(target) == content(second)


@pytest.mark.parametrize("fault", ["missing", "short", "other bytes", "half a pointer", "out of the folder"])  # fmt: skip
def test_what_is_damaged_is_never_put_in_place(
    fault: str, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exchange, target = opened(tmp_path / "repo", s3.bucket(), s3), tmp_path / "job"
    exchange.send(folder(tmp_path / "first", 1), "x", {})
    one = next(name for name in exchange.names("x") if name.endswith("state/b"))
    newest = exchange.read(f"x/{NEWEST}") or b""
    if fault == "missing":
        exchange.remove(one)
    elif fault == "short":
        exchange.write(one, (exchange.read(one) or b"")[:-1])
    elif fault == "other bytes":
        exchange.write(one, bytes(100_000))
    elif fault == "half a pointer":
        exchange.write(f"x/{NEWEST}", newest[: len(newest) // 2])
    else:
        exchange.write(one.replace("state/b", "../job2"), exchange.read(one) or b"")
        exchange.write(f"x/{NEWEST}", newest.replace(b"state/b", b"../job2"))
    target.mkdir()
    assert not exchange.fetch("x", target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "job", "repo"]
    assert content(target) == {}
    assert ("is damaged" in caplog.text) == (fault != "half a pointer")
    exchange.send(folder(tmp_path / "first", 3), "x", {})
    assert exchange.fetch("x", target)


SENDER = """
import sys, time
from pathlib import Path
from pipeline.exchange import Exchange
exchange = Exchange.open(Path(sys.argv[1]))
for number in range(1, 10_000):
    exchange.send(Path(sys.argv[2 + number % 2]), "x", {"number": number})
    time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3", "folder"], indirect=True)
def test_a_reader_among_sends_and_a_sender_killed_in_one(url: str, s3: S3, tmp_path: Path) -> None:
    exchange, target = opened(tmp_path / "repo", url, s3), tmp_path / "job"
    sources = [folder(tmp_path / str(i), i) for i in (1, 2)]
    whole = [content(source) for source in sources]
    command = [sys.executable, "-c", SENDER, str(tmp_path / "repo"), *map(str, sources)]
    running = subprocess.Popen(command, cwd=ROOT)
    try:
        until(lambda: exchange.about("x") is not None)
        end, fetched = time.monotonic() + 1.0, 0
        while time.monotonic() < end or fetched < 3:
            assert exchange.fetch("x", target)
            assert content(target) in whole
            fetched += 1
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    about = exchange.about("x")
    assert about is not None
    assert about["number"] >= 3
    assert exchange.fetch("x", target)
    assert content(target) == whole[about["number"] % 2]
    exchange.remove("x")
    assert exchange.names("x") == []


def test_a_folder_that_is_replaced_while_it_is_fetched(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, target = opened(tmp_path / "repo", s3.bucket(), s3), tmp_path / "job"
    exchange.send(folder(tmp_path / "first", 1), "x", {})
    get, calls = Exchange._get, 0

    def late(*given: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            exchange.send(folder(tmp_path / "second", 2), "x", {})
        return get(*given)

    monkeypatch.setattr(Exchange, "_get", late)
    assert exchange.fetch("x", target)
    assert calls == 2
    assert content(target) == content(tmp_path / "second")


def test_a_send_that_ends_half_way_changes_nothing(
    url: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, target = opened(tmp_path / "repo", url, s3), tmp_path / "job"
    first = folder(tmp_path / "first", 1)
    exchange.send(first, "x", {})
    put, count = Exchange._put, 0

    def second_fails(self: Exchange, file: Path, name: str) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise CurableError("gone")
        put(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "_put", second_fails)
        with pytest.raises(CurableError):
            exchange.send(folder(tmp_path / "second", 2), "x", {})
    assert exchange.fetch("x", target)
    assert content(target) == content(first)
    exchange.remove("x")
    assert exchange.names("x") == []


def test_a_server_that_is_killed_is_curable_and_nothing_is_lost(s3: S3, tmp_path: Path) -> None:
    exchange, target = opened(tmp_path / "repo", s3.bucket(), s3), tmp_path / "job"
    first, big = folder(tmp_path / "first", 1), folder(tmp_path / "big", 2, 30_000_000)
    exchange.send(first, "x", {})
    threading.Timer(0.15, s3.stop).start()
    with pytest.raises(CurableError, match=r"DVC remote 'store' \(s3://.*/store\) does not answer: ."):  # fmt: skip
        exchange.send(big, "x", {})
    calls: list[Callable[[], object]] = [
        lambda: exchange.read("a"),
        lambda: exchange.write("a", b"1"),
        lambda: exchange.names("a"),
        lambda: exchange.fetch("x", target),
    ]
    for call in calls:
        with pytest.raises(CurableError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not target.exists()
    s3.start()
    assert exchange.fetch("x", target)
    assert content(target) == content(first)
    exchange.send(folder(tmp_path / "second", 2), "x", {})
    assert exchange.fetch("x", target)
    assert content(target) == content(tmp_path / "second")


@pytest.mark.parametrize(
    ("url", "more", "said"),
    [
        ("https://example.invalid/x", "", "is read by HTTP: .* dvc remote add --local -d NAME URL"),
        ("s3://bucket/x", "version_aware = true", "keeps versions: .* without version_aware or worktree"),
        ("s3://bucket/x", "worktree = true", "keeps versions"),
        ("gs://bucket/x", "", "requires 'dvc-gs' to be installed; pip install it"),
        ("s3://bucket/x", "regoin = a", "regoin.*correct .dvc/config"),
    ],
)  # fmt: skip
def test_a_remote_that_cannot_serve_is_refused(
    url: str, more: str, said: str, tmp_path: Path
) -> None:
    use_remote(tmp_path, url, more=more)
    with pytest.raises(UserError) as caught:
        Exchange.open(tmp_path)
    assert re.search(said, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_and_a_folder_that_cannot_be_written(
    s3: S3, tmp_path: Path
) -> None:
    exchange = opened(tmp_path / "repo", "s3://nobodys/x", s3)
    assert exchange.read("a") is None
    with pytest.raises(UserError, match=r"s3://nobodys/x.*bucket does not exist; make the bucket"):
        exchange.write("a", b"1")
    (tmp_path / "file").touch()
    exchange = opened(tmp_path / "other", str(tmp_path / "file"), s3)
    with pytest.raises((UserError, CurableError), match=str(tmp_path / "file")):
        exchange.write("a", b"1")


def test_missing_credentials_are_no_fault_that_a_retry_cures(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path, s3.bucket(), s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    exchange = Exchange.open(tmp_path)
    with pytest.raises(
        UserError, match=r"credentials; several machines need .*\.dvc/config\.local"
    ):
        exchange.write("a", b"1")


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
