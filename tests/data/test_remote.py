"""Downloads from a server on loopback that drops, changes, refuses and lies."""

from __future__ import annotations

import email.utils
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modip.data import remote
from modip.errors import UserError
from tests.web import Fault, Host, serving

BODY = random.Random(0).randbytes(700_001)
OTHER = random.Random(1).randbytes(650_003)
EMBEDDED = ("fetch-pick-and-place", "hopper-surrogate-medium", "pusht-human", "toy")


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def host() -> Iterator[Host]:
    with serving(Host({"/sets/hopper.hdf5": BODY})) as made:
        yield made


class Get:
    """`remote.download` into a folder of the test; keeps the pauses and the progress."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.into, self.scratch = folder / "raw" / "d4rl" / "hopper", folder / "scratch"
        self.checksums = folder / "checksums.json"
        self.pauses: list[float] = []
        self.progress: list[tuple[int, int | None]] = []
        self.parts: tuple[str, ...] = ()

    def __call__(self, url: str) -> bytes:
        """The file's content; also checks its place and its sha256."""
        path, sha256 = self.fetch(url)
        content = path.read_bytes()
        assert sha256 == hashlib.sha256(content).hexdigest()
        assert self.sums[url] == sha256
        assert [child.name for child in self.into.iterdir()] == [path.name]
        assert self.unfinished == []
        assert self.kept(path.name).samefile(path)  # on the disk once
        return content

    def fetch(self, url: str) -> tuple[Path, str]:
        return remote.download(
            url, self.into, self.scratch, self.checksums, field="data.mine.path", parts=self.parts,
            progress=lambda *told: self.progress.append(told), sleep=self.pauses.append,
        )  # fmt: skip

    def fails(self, url: str) -> str:
        """The one line; nothing is in place then."""
        with pytest.raises(UserError) as caught:
            self.fetch(url)
        assert not self.into.exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def forget(self) -> None:
        """As in another clone, but for the checksums."""
        shutil.rmtree(self.into)
        shutil.rmtree(self.scratch)

    @property
    def sums(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.checksums.read_text())
        return found

    def kept(self, name: str) -> Path:
        """The file or folder of that name in scratch."""
        (found,) = self.scratch.glob(f"*/*/{name}")
        return found

    @property
    def unfinished(self) -> list[str]:
        """What lies in scratch of files that are not there whole."""
        return sorted(
            path.name for path in self.scratch.rglob("*") if path.suffix in (".part", ".version")
        )


@pytest.fixture
def get(tmp_path: Path) -> Get:
    return Get(tmp_path)


def test_a_file(host: Host, get: Get) -> None:
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert (get.into / "hopper.hdf5").is_file()
    assert get.progress[0] == (0, len(BODY))
    assert get.progress[-1] == (len(BODY), len(BODY))
    assert get.progress == sorted(get.progress)
    assert get.pauses == []


@pytest.mark.parametrize("path", ["/a%20name.bin?raw=true", "/empty.bin", "/one.bin"])
def test_names_and_small_files(host: Host, get: Get, path: str) -> None:
    host.files |= {"/a%20name.bin?raw=true": b"abc", "/empty.bin": b"", "/one.bin": b"1"}
    assert get(host.url + path) == host.files[path]
    assert next(get.into.iterdir()).name == path[1:].replace("%20", " ").split("?")[0]


@pytest.mark.parametrize("seed", range(25))
def test_connections_dropped_at_random_bytes(host: Host, get: Get, seed: int) -> None:
    rng = random.Random(seed)
    host.dated, host.weak, host.etag = seed % 3 == 1, seed % 3 == 1, seed % 3 != 2
    host.dated = host.dated or not host.etag
    host.faults = [
        Fault(after=rng.randrange(1, 120_000), reset=rng.random() < 0.3)
        for _ in range(rng.randrange(1, 9))
    ]
    resets = any(fault.reset for fault in host.faults)
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    if not resets:  # a reset loses what lay in the socket
        assert host.sent == len(BODY)
    assert all(pause < 1.0 for pause in get.pauses)  # there was progress: every pause is a first


def test_drops_without_progress_end_it(host: Host, get: Get) -> None:
    host.faults = [Fault(after=1000), *(Fault(after=0) for _ in range(10))]
    assert "127.0.0.1" in get.fails(f"{host.url}/sets/hopper.hdf5")
    assert len(host.seen) == 1 + remote.ATTEMPTS - 1
    assert get.unfinished == ["hopper.hdf5.part", "hopper.hdf5.version"]
    host.faults = []
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert host.sent == len(BODY)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_server_without_range_starts_again(host: Host, get: Get, chunked: bool) -> None:
    host.ranges, host.chunked = False, chunked
    host.faults = [Fault(after=300_000), Fault(after=200_000), Fault(after=400_000)]
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert [request.status for request in host.seen] == [200] * 4
    assert get.progress[-1] == (len(BODY), len(BODY))
    if chunked:
        assert get.progress[0] == (0, None)


def test_without_a_validator_nothing_is_resumed(host: Host, get: Get) -> None:
    host.etag = False
    host.faults = [Fault(after=300_000)]
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert [request.range for request in host.seen] == [None, None]


@pytest.mark.parametrize(("if_range", "bare"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("other", [OTHER, BODY[:100_000], BODY[:-1] + b"!"])
def test_a_file_that_changes_between_two_runs(
    host: Host, get: Get, if_range: bool, bare: bool, other: bytes
) -> None:
    """Also by a server that ignores If-Range, where the new file is shorter than the part, or as long as the old."""
    url = f"{host.url}/sets/hopper.hdf5"
    host.faults = [Fault(after=300_000), *(Fault(status=503) for _ in range(9))]
    get.fails(url)
    host.if_range, host.bare = if_range, bare
    host.faults, host.files = [], {"/sets/hopper.hdf5": other}
    assert get(url) == other


def test_a_server_that_gives_ranges_in_pieces(host: Host, get: Get) -> None:
    host.faults, host.piece, host.bare = [Fault(after=300_000)], 150_000, True
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert [request.sent for request in host.seen] == [300_000, 150_000, 150_000, 100_001]


def test_a_part_that_is_complete(host: Host, get: Get) -> None:
    """Killed between the last byte and the renaming: 416, nothing is sent again."""
    url = f"{host.url}/sets/hopper.hdf5"
    host.faults = [Fault(after=len(BODY) - 1), *(Fault(status=503) for _ in range(9))]
    get.fails(url)
    part = next(get.scratch.rglob("*.part"))
    assert part.stat().st_size == len(BODY) - 1
    part.write_bytes(BODY)
    host.faults, host.seen = [], []
    assert get(url) == BODY
    assert [request.status for request in host.seen] == [416]


def test_a_part_that_is_longer_than_the_file(host: Host, get: Get) -> None:
    url = f"{host.url}/sets/hopper.hdf5"
    host.faults = [Fault(after=10), *(Fault(status=503) for _ in range(9))]
    get.fails(url)
    next(get.scratch.rglob("*.part")).write_bytes(BODY + b"x")
    host.faults = []
    assert get(url) == BODY


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_what_no_retry_cures(host: Host, get: Get, status: int) -> None:
    host.faults = [Fault(status=status)]
    message = get.fails(f"{host.url}/sets/hopper.hdf5")
    assert f"{host.url}/sets/hopper.hdf5" in message
    assert f"HTTP {status}" in message
    assert "data.mine.path in params.yaml" in message
    assert len(host.seen) == 1
    assert get.pauses == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_a_retry_cures(host: Host, get: Get, status: int) -> None:
    host.faults = [Fault(status=status), Fault(status=status)]
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert len(get.pauses) == 2
    assert 0.3 < get.pauses[0] < 0.7 < get.pauses[1] < 2.0  # longer and longer


def test_a_server_that_stays_down(host: Host, get: Get) -> None:
    host.faults = [Fault(status=503) for _ in range(99)]
    assert "HTTP 503" in get.fails(f"{host.url}/sets/hopper.hdf5")
    assert len(host.seen) == remote.ATTEMPTS
    assert sum(get.pauses) < 9


def test_retry_after(host: Host, get: Get) -> None:
    date = email.utils.formatdate(time.time() + 30.0, usegmt=True)
    host.faults = [
        Fault(status=429, headers={"Retry-After": "17"}),
        Fault(status=503, headers={"Retry-After": date}),
        Fault(status=503, headers={"Retry-After": "soon"}),
    ]
    assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    assert get.pauses[0] == 17.0
    assert 27.0 < get.pauses[1] <= 30.0
    assert get.pauses[2] < 6.0
    get.forget()
    host.faults = [Fault(status=429, headers={"Retry-After": "3600"})]
    assert "3600 s; run again then" in get.fails(f"{host.url}/sets/hopper.hdf5")
    assert len(get.pauses) == 3


def test_no_server_at_all(get: Get) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/sets/hopper.hdf5"
    message = get.fails(url)
    for text in (
        url,
        "Connection refused",
        "data/own/",
        "data.mine.path in params.yaml",
        *EMBEDDED,
    ):
        assert text in message
    assert len(get.pauses) == remote.ATTEMPTS - 1
    assert 3.0 < sum(get.pauses) < 9.0


def test_a_host_without_a_name(get: Get) -> None:
    assert "no-such-host.invalid" in get.fails("https://no-such-host.invalid/x.hdf5")


def test_a_server_that_falls_silent(host: Host, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", (5.0, 0.2))
    silent = [Fault(after=n, hold=threading.Event()) for n in (200_000, 0)]
    host.faults = list(silent)
    try:
        assert get(f"{host.url}/sets/hopper.hdf5") == BODY
    finally:
        for fault in silent:
            assert fault.hold is not None
            fault.hold.set()
    assert [request.range for request in host.seen] == [None, *["bytes=200000-"] * 2]


def test_redirects(host: Host, get: Get) -> None:
    go = Fault(status=302, headers={"Location": "/sets/hopper.hdf5"})
    host.faults = [go, Fault(after=300_000), go]
    assert get(f"{host.url}/latest.hdf5") == BODY
    assert [(r.path, r.status, r.sent) for r in host.seen] == [
        ("/latest.hdf5", 302, 0),
        ("/sets/hopper.hdf5", 200, 300_000),
        ("/latest.hdf5", 302, 0),
        ("/sets/hopper.hdf5", 206, len(BODY) - 300_000),
    ]
    shutil.rmtree(get.into)
    host.faults = [Fault(status=302, headers={"Location": "/again"}) for _ in range(40)]
    assert "redirects" in get.fails(f"{host.url}/again")


def test_a_known_checksum_holds(host: Host, get: Get) -> None:
    url = f"{host.url}/sets/hopper.hdf5"
    get.checksums.write_text(json.dumps({url: hashlib.sha256(BODY).hexdigest(), "z": "1"}))
    before = get.checksums.read_text()
    assert get(url) == BODY
    assert get.checksums.read_text() == before


def test_a_file_that_has_changed_upstream(host: Host, get: Get) -> None:
    url = f"{host.url}/sets/hopper.hdf5"
    assert get(url) == BODY
    get.forget()
    host.files = {"/sets/hopper.hdf5": OTHER}
    message = get.fails(url)
    for body in (BODY, OTHER):
        assert hashlib.sha256(body).hexdigest() in message
    for text in (url, "changed upstream", str(get.checksums)):
        assert text in message
    assert not any(path.is_file() for path in get.scratch.glob("*/*/*"))  # starts from nothing
    assert get.sums == {url: hashlib.sha256(BODY).hexdigest()}
    get.checksums.write_text("{}")  # the remedy
    assert get(url) == OTHER


@pytest.mark.parametrize("checksums", [True, False])
def test_what_came_once_is_not_asked_for(
    host: Host, get: Get, caplog: pytest.LogCaptureFixture, checksums: bool
) -> None:
    """Judged by the checksums, or where they say nothing by the sum it came with."""
    url = f"{host.url}/sets/hopper.hdf5"
    assert get(url) == BODY
    kept = get.kept("hopper.hdf5")
    for spoilt, asked in ((None, 0), (OTHER, 1), (BODY[:-1], 1), (None, 0)):
        shutil.rmtree(get.into)  # as DVC does before the stage runs
        if not checksums:
            get.checksums.unlink()
        if spoilt is not None:
            kept.unlink()
            kept.write_bytes(spoilt)
        host.seen = []
        caplog.clear()
        assert get(url) == BODY
        assert len(host.seen) == asked
        said = [line for line in caplog.messages if "it is fetched again" in line]
        assert len(said) == asked
        assert all(str(kept) in line for line in said)
    shutil.rmtree(kept.parents[1])  # the remedy that is named
    assert get(url) == BODY
    assert len(host.seen) == 1


def test_other_checksums_win(host: Host, get: Get) -> None:
    """Those of a colleague who took the new file."""
    url = f"{host.url}/sets/hopper.hdf5"
    assert get(url) == BODY
    host.files = {"/sets/hopper.hdf5": OTHER}
    get.checksums.write_text(json.dumps({url: hashlib.sha256(OTHER).hexdigest()}))
    assert get(url) == OTHER
    get.checksums.unlink()
    assert get(url) == OTHER
    assert len(host.seen) == 2


def test_a_second_name_is_safe(host: Host, get: Get) -> None:
    """What is done to the file given leaves the next one given whole; another file system gets a copy."""
    url = f"{host.url}/sets/hopper.hdf5"
    assert get(url) == BODY
    path = get.into / "hopper.hdf5"
    assert path.stat().st_mode & 0o222 == 0
    path.unlink()
    path.write_bytes(OTHER)
    assert get(url) == BODY
    assert len(host.seen) == 1
    path.chmod(0o644)
    path.write_bytes(OTHER)  # in spite of being read-only
    assert get(url) == BODY
    assert len(host.seen) == 2


def test_another_file_system_gets_a_copy(
    host: Host, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    for _ in range(2):
        path, _ = get.fetch(f"{host.url}/sets/hopper.hdf5")
        assert path.read_bytes() == BODY
        assert not path.samefile(get.kept("hopper.hdf5"))
    assert len(host.seen) == 1


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_file_of_checksums(host: Host, get: Get, text: str) -> None:
    get.checksums.write_text(text)
    assert str(get.checksums) in get.fails(f"{host.url}/sets/hopper.hdf5")
    assert host.seen == []


def test_too_little_space_is_seen_before(
    host: Host, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{host.url}/sets/hopper.hdf5"
    usage = shutil.disk_usage(get.folder)
    host.faults = [Fault(after=300_000), *(Fault(status=503) for _ in range(9))]
    get.fails(url)
    host.faults, kept = [], 300_000
    for free, fits in ((len(BODY) - kept - 1, False), (len(BODY) - kept, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            assert get(url) == BODY
        else:
            assert "0 MB more are needed, 0 MB are free" in get.fails(url)
            assert host.seen[-1].range == f"bytes={kept}-"


def test_a_disk_that_fills_up_on_the_way(
    host: Host, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{host.url}/sets/hopper.hdf5"
    append, calls = remote._Part.append, []

    def failing(part: remote._Part, block: bytes) -> None:
        calls.append(len(block))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        append(part, block)

    with monkeypatch.context() as patch:
        patch.setattr(remote._Part, "append", failing)
        message = get.fails(url)
    assert "No space left on device; free disk space" in message
    host.seen = []
    assert get(url) == BODY
    assert host.sent == len(BODY) - calls[0]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x.zip",
        "https:///x.zip",
        "http://host",
        "s3://a/b",
        "file://host/x",
        "hf://owner",
    ],
)
def test_not_a_url(get: Get, url: str) -> None:
    assert remote.local(url) is None
    message = get.fails(url)
    assert "data.mine.path" in message
    assert repr(url) in message


def test_local_paths() -> None:
    assert remote.local("data/own/a b.parquet") == Path("data/own/a b.parquet")
    assert remote.local("~/x") == Path.home() / "x"
    assert remote.local("file:///data/a%20b.hdf5") == Path("/data/a b.hdf5")
    assert remote.local("file://localhost/x") == Path("/x")
    assert remote.local("https://host/x") is None


FILES = {
    "meta/info.json": b"{}",
    "data/chunk-000/episode_000000.parquet": BODY[:300_000],
    "data/chunk-000/episode 1.parquet": BODY[300_000:],
    "videos/chunk-000/front.mp4": OTHER,
    "README.md": b"# set",
}


def hub(host: Host, folder: str = "v1.5/lift", page: int = 2) -> list[dict[str, object]]:
    """The Hub's routes: the listing in pages of `page` entries, files redirected to a store for LFS."""
    entries: list[dict[str, object]] = [
        {"type": "directory", "oid": "d", "size": 0, "path": f"{folder}/data".lstrip("/")}
    ]
    for name, body in FILES.items():
        path = f"{folder}/{name}".lstrip("/")
        entry: dict[str, object] = {
            "type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body), "path": path,
        }  # fmt: skip
        if not name.endswith(("json", "md")):
            entry["lfs"] = {
                "oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134,
            }  # fmt: skip
        entries.append(entry)
        host.files[f"/datasets/me/set/resolve/main/{path}".replace(" ", "%20")] = body
    tree = f"/api/datasets/me/set/tree/main/{folder}".rstrip("/") + "?recursive=true"
    for first in range(0, len(entries), page):
        path = tree if first == 0 else f"{tree}&cursor={first}"
        host.files[path] = json.dumps(entries[first : first + page]).encode()
        if first + page < len(entries):
            link = f'<{host.url}{tree}&cursor={first + page}>; rel="next"'
            host.headers[path] = {"Link": link}
    return entries


@pytest.fixture
def hf(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    host.files = {}
    monkeypatch.setenv("HF_ENDPOINT", f"{host.url}/")
    hub(host)
    return host


LEROBOT = ("meta/", "data/")


def check(get: Get, root: Path, sha256: str, names: list[str]) -> None:
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == sorted(names)
    assert all((root / name).read_bytes() == FILES[name] for name in names)
    lines = [f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in names]
    assert sha256 == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert get.unfinished == []


@pytest.mark.parametrize("folder", ["v1.5/lift", ""])
def test_a_folder_of_a_repository(hf: Host, get: Get, folder: str) -> None:
    hub(hf, folder)
    root, sha256 = get.fetch(f"hf://me/set/{folder}".rstrip("/"))
    assert root == get.into / ("lift" if folder else "set")
    check(get, root, sha256, list(FILES))
    prefix = f"hf://me/set/{folder}".rstrip("/")
    assert get.sums == {
        f"{prefix}/{name}": hashlib.sha256(body).hexdigest() for name, body in FILES.items()
    }
    assert list(get.sums) == sorted(get.sums)
    assert len(get.checksums.read_text().splitlines()) == len(FILES) + 2
    whole = sum(map(len, FILES.values()))
    assert get.progress[-1] == (whole, whole)
    assert get.progress == sorted(get.progress)


def test_a_folder_that_came_once_is_not_asked_for(hf: Host, get: Get) -> None:
    first = get.fetch("hf://me/set/v1.5/lift")
    kept = get.kept("lift")
    for spoil, asked in (
        (lambda: None, []),
        ((kept / "README.md").unlink, ["README.md"]),
        ((kept / "new").touch, []),
        (lambda: (kept / "meta" / "info.json").chmod(0o644), []),
        (lambda: (kept / "meta" / "info.json").write_text("{!"), ["meta/info.json"]),
        (get.checksums.unlink, []),
    ):
        spoil()
        hf.seen = []
        shutil.rmtree(get.into)
        assert get.fetch("hf://me/set/v1.5/lift") == first
        check(get, *first, list(FILES))
        assert (hf.seen == []) == (asked == [])
        files = [one.path for one in hf.seen if not one.path.startswith("/api/")]
        assert files == [f"/datasets/me/set/resolve/main/v1.5/lift/{name}" for name in asked]
        assert len(get.sums) == len(FILES)
    get.parts = LEROBOT  # another choice of the same files is asked for
    hf.seen = []
    check(get, *get.fetch("hf://me/set/v1.5/lift"), [n for n in FILES if n.startswith(LEROBOT)])
    assert hf.seen != []


def test_a_choice_of_its_files_resumes(hf: Host, get: Get) -> None:
    get.parts = LEROBOT
    names = [name for name in FILES if name.startswith(LEROBOT)]
    hf.faults = [*[Fault()] * 4, Fault(after=100_000), *[Fault(status=503)] * 9]
    get.fails("hf://me/set/v1.5/lift")  # three pages, the first file, and a part of the second
    hf.faults, hf.seen = [], []
    root, sha256 = get.fetch("hf://me/set/v1.5/lift")
    check(get, root, sha256, names)
    files = [request for request in hf.seen if not request.path.startswith("/api/")]
    second, third = sorted(names)[1:]
    assert [request.sent for request in files] == [len(FILES[second]) - 100_000, len(FILES[third])]


def test_a_repository_that_changes_between_two_runs(
    hf: Host, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was already here, without a sum in the listing, is got again."""
    hf.faults = [*[Fault()] * 4, Fault(after=100_000), *[Fault(status=503)] * 9]
    get.fails("hf://me/set/v1.5/lift")
    assert len(list(get.scratch.rglob("README.md"))) == 1
    hf.faults = []
    monkeypatch.setitem(FILES, "README.md", b"# SET")
    hub(hf)
    check(get, *get.fetch("hf://me/set/v1.5/lift"), list(FILES))
    assert len(list(get.scratch.rglob("README.md"))) == 1  # of the version before nothing is kept


def test_lfs_sums_are_checked(hf: Host, get: Get) -> None:
    path = "/datasets/me/set/resolve/main/v1.5/lift/data/chunk-000/episode_000000.parquet"
    hf.files[path] = OTHER[:300_000]
    message = get.fails("hf://me/set/v1.5/lift")
    assert "hf://me/set/v1.5/lift/data/chunk-000/episode_000000.parquet" in message
    assert hashlib.sha256(OTHER[:300_000]).hexdigest() in message
    assert not get.checksums.exists()
    hub(hf)  # the remedy: run again
    check(get, *get.fetch("hf://me/set/v1.5/lift"), list(FILES))


def test_a_listing_against_the_checksums(hf: Host, get: Get) -> None:
    name = "hf://me/set/v1.5/lift/videos/chunk-000/front.mp4"
    get.checksums.write_text(json.dumps({name: "0" * 64}))
    assert name in get.fails("hf://me/set/v1.5/lift")
    assert not any("front.mp4" in request.path for request in hf.seen)  # known before a byte of it


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "v1.5/lift/../../evil"])
def test_a_listing_cannot_lead_out(hf: Host, get: Get, path: str) -> None:
    tree = "/api/datasets/me/set/tree/main/v1.5/lift?recursive=true"
    hf.files[tree] = json.dumps([{"type": "file", "oid": "1", "size": 1, "path": path}]).encode()
    assert "leads out" in get.fails("hf://me/set/v1.5/lift")


@pytest.mark.parametrize(
    "listing", [b"", b"<html>", b"{}", b"[1]", b'[{"type": "file"}]', b'[{"type": "file", "path": "a", "size": 1, "oid": "1", "lfs": 3}]', b"[]"]
)  # fmt: skip
def test_not_a_listing(hf: Host, get: Get, listing: bytes) -> None:
    hf.files["/api/datasets/me/set/tree/main/v1.5/lift?recursive=true"] = listing
    hf.headers = {}
    assert hf.url in get.fails("hf://me/set/v1.5/lift")


def test_no_such_repository(hf: Host, get: Get) -> None:
    assert "HTTP 404" in get.fails("hf://me/another")


def many(checksums: Path, scratch: Path, first: int) -> None:
    for i in range(first, first + 40):
        remote.record(checksums, {f"http://host/{i}": str(i)}, scratch)


def test_processes_write_checksums_at_once(tmp_path: Path) -> None:
    path = tmp_path / "checksums.json"
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=many, args=(path, tmp_path / "scratch", 40 * i)) for i in range(3)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert json.loads(path.read_text()) == {f"http://host/{i}": str(i) for i in range(120)}
    with pytest.raises(UserError, match="http://host/7: changed"):
        remote.record(path, {"http://host/7": "8", "http://host/new": "1"}, tmp_path / "scratch")
    assert "http://host/new" not in json.loads(path.read_text())
