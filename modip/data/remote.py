"""Gets a file over HTTP(S), or a folder of a Hugging Face data set, resumed after any interruption and verified.

An unfinished file lies beside its target as NAME.part, and in NAME.version the validator that the server gave its
bytes (RFC 9110: ETag or Last-Modified, sent back as If-Range): a file that has changed upstream starts again from
its first byte. Every file's sha256 is that of a file of checksums, where it is written down the first time. What has
come stays, with its sums, and is given again without a request as long as it has them.
"""

from __future__ import annotations

import contextlib
import email.utils
import fcntl
import hashlib
import itertools
import json
import logging
import os
import random
import re
import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

import requests
import urllib3

from modip.errors import UserError
from modip.files import write_atomically, write_json

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[int, int | None], None]
"""Called with the bytes there are and the bytes there will be (None = not known)."""

ATTEMPTS = 4
"""In a row without a byte further than before; their pauses add up to some 7 seconds."""
PAUSE, GROWTH = 0.5, 3.0  # seconds before the second attempt, and from one pause to the next
LONGEST_WAIT = 60.0  # seconds that a server may ask to wait (Retry-After)
TIMEOUT = (5.0, 30.0)  # seconds to connect, and between two bytes
BLOCK = 1 << 18
EMBEDDED = "fetch-pick-and-place, hopper-surrogate-medium, pusht-human, toy"


class File(NamedTuple):
    """A file to get."""

    url: str  # its name in the checksums; hf:// whichever mirror it comes from
    address: str  # what is asked for, over HTTP(S)
    path: str  # below the folder asked for; empty for a file asked for itself
    size: int | None = None  # bytes, where the host's listing tells
    sha256: str | None = None  # where the host tells (LFS)
    version: str = ""  # what the host's listing says of its content


def local(path: str) -> Path | None:
    """The file or folder on this machine that `path` of params.yaml names, as path or file://; None for a URL."""
    parts = urlsplit(path)
    if "://" not in path:
        return Path(path).expanduser()
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return None


def download(
    url: str,
    into: Path,
    scratch: Path,
    checksums: Path,
    *,
    field: str,
    parts: tuple[str, ...],
    progress: Progress,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Path, str]:
    """Gets `url` as `into`/NAME, its only content: the file, or the folder, of which only the files whose path begins
    with one of `parts` if there are any.

    Gives its path and its sha256; of a folder, that of the sorted lines "sha256  path". It lies in `scratch`, in a
    folder named by the sha256 of what was asked for, and `into` has hard links to it, or copies on another file
    system. What lies there is not asked for again while every file has its sum of `checksums`, or else the one it came
    with; others are. `field` (of params.yaml) names the URL in messages.

    Raises UserError, with what has come kept for the next run, where the URL cannot be had; and where a file is not
    the one of `checksums`.
    """
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    folder = scratch / hashlib.sha256("\n".join((url, *parts)).encode()).hexdigest()
    try:
        with _locked(folder.with_suffix(".lock"), f"another process gets {url}"):
            known = _read(checksums)
            found = _kept(url, folder, name, known)
            if found is None:
                client = Client(field, checksums, sleep)
                found = _get(client, url, folder, name, known, parts, progress)
            else:
                log.info("%s is here already and whole; delete %s to get it again", url, folder)
            root, sums = found
            record(checksums, {_url(url, path): sha256 for path, sha256 in sums.items()}, scratch)
            if into.is_dir():
                shutil.rmtree(into)
            for path in sums:
                _link(root / path, into / name / path)
    except OSError as problem:
        raise UserError(
            f"{url}: {problem.filename or scratch}: {problem.strerror or problem}; free disk space or make it "
            "writable, then run again: what has come is kept"
        ) from problem
    return into / name, sums[""] if "" in sums else folder_sha256(sums)


def _get(
    client: Client,
    url: str,
    folder: Path,
    name: str,
    known: Mapping[str, str],
    parts: tuple[str, ...],
    progress: Progress,
) -> tuple[Path, dict[str, str]]:
    """Gets what is not yet there as `folder`/VERSION/`name`; gives that and the sha256 by path, as in VERSION.json."""
    files = client.files(url, lambda path: not parts or path.startswith(parts))
    # A listing that changed is another version: nothing got before is taken for a part of it.
    version = hashlib.sha256("".join(file.version for file in files).encode()).hexdigest()
    root, single = folder / version / name, files[0].path == ""
    sizes = [file.size or 0 for file in files]
    _check_space(folder.parent, sum(sizes) - _size(root), url)
    sums: dict[str, str] = {}
    for file, before in zip(files, itertools.accumulate(sizes, initial=0), strict=False):

        def advance(done: int, size: int | None, before: int = before) -> None:
            progress(before + done, size if single else sum(sizes))

        sums[file.path] = client.fetch(file, root / file.path, known.get(file.url), advance)
    for other in folder.iterdir():
        if other.is_dir() and other.name != version:
            shutil.rmtree(other)
        elif other.suffix == ".json":
            other.unlink()
    write_json(folder / f"{version}.json", sums)
    return root, sums


def _kept(
    url: str, folder: Path, name: str, known: Mapping[str, str]
) -> tuple[Path, dict[str, str]] | None:
    """What `_get` gave an earlier run, if all of it is there and whole; files that are not are removed."""
    for told in folder.glob("*.json"):
        root = told.with_suffix("") / name
        sums = {path: known.get(_url(url, path), sha256) for path, sha256 in _read(told).items()}
        whole = True
        for path, sha256 in sums.items():
            file = root / path
            if file.is_file() and file_sha256(file) != sha256:
                log.warning("%s: its sha256 is not %s; it is fetched again", file, sha256)
                _remove(file)
            whole = whole and file.is_file()
        if whole:
            return root, sums
    return None


def _url(url: str, path: str) -> str:
    """Of a file at a path below what was asked for, as in the checksums."""
    return f"{url.rstrip('/')}/{path}" if path else url


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _remove(spoilt: Path) -> None:
    """Removes a file that DVC's cache may have under another name (its cache.type hardlink).

    DVC takes what is read-only, or as old as when it looked last, for whole: it shall look again.
    """
    spoilt.chmod(0o644)
    os.utime(spoilt)
    spoilt.unlink()


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(sums: Mapping[str, str]) -> str:
    """The sha256 of a folder whose files, by relative path, have these: that of the sorted lines "sha256  path"."""
    lines = "".join(sorted(f"{sha256}  {path}\n" for path, sha256 in sums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def record(checksums: Path, found: Mapping[str, str], scratch: Path) -> None:
    """Adds {url: sha256} to the file of checksums, however many processes do.

    Raises UserError, and adds nothing, where it has another for one of them.
    """
    with _locked(scratch / "checksums.lock", f"another process writes {checksums}"):
        known = _read(checksums)
        for url, sha256 in found.items():
            if known.get(url, sha256) != sha256:
                raise _changed(url, known[url], sha256, checksums)
        if not found.keys() <= known.keys():
            text = json.dumps({**known, **found}, indent=1, sort_keys=True) + "\n"
            write_atomically(checksums, lambda path: path.write_text(text))


class _AgainError(Exception):
    """A failure that another attempt may cure, after `wait` seconds if the server says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Client:
    """Asks hosts, again where that can help. `field` (of params.yaml) and `checksums` name things in messages."""

    def __init__(self, field: str, checksums: Path, sleep: Callable[[float], None]) -> None:
        self._field, self._checksums, self._sleep = field, checksums, sleep
        self._session = requests.Session()
        # Identity: the bytes as they are stored, for which alone lengths, ranges and sums hold.
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": "modip"})

    def files(self, url: str, wanted: Callable[[str], bool]) -> list[File]:
        """What `url` stands for: one file, or for hf:// those of a folder, sorted. Raises UserError."""
        parts = urlsplit(url)
        if parts.scheme == "hf":
            return self._tree(url, wanted)
        name = PurePosixPath(unquote(parts.path)).name
        if parts.scheme not in ("http", "https") or not parts.netloc or name in ("", ".."):
            raise UserError(
                f"params.yaml: {self._field} (value {url!r}) names no file; give a local file or folder, "
                "file:///PATH, http(s)://HOST/PATH/NAME or hf://OWNER/REPO[/FOLDER]"
            )
        return [File(url, url, "")]

    def _tree(self, url: str, wanted: Callable[[str], bool]) -> list[File]:
        """The Hub's listing of a data set's repository, page by page.

        Source: its API, GET /api/datasets/OWNER/REPO/tree/REVISION/FOLDER?recursive=true.
        """
        owner, _, rest = url.removeprefix("hf://").strip("/").partition("/")
        repo, _, folder = rest.partition("/")
        if not owner or not repo:
            raise UserError(
                f"params.yaml: {self._field} (value {url!r}) is not hf://OWNER/REPO[/FOLDER]"
            )
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        tree = f"{host}/api/datasets/{owner}/{repo}/tree/main/{quote(folder)}".rstrip("/")
        page: str | None = f"{tree}?recursive=true"
        found = []
        while page is not None:
            entries, page = self._page(page)
            for entry in entries:
                try:
                    if entry["type"] != "file":
                        continue
                    whole, size, lfs = str(entry["path"]), int(entry["size"]), entry.get("lfs")
                    sha256, version = lfs and str(lfs["oid"]), f"\n{whole} {entry['oid']}"
                except (KeyError, TypeError, ValueError, AttributeError) as problem:
                    raise UserError(
                        f"{url}: {host} sent an entry that is not one of its listings: {entry!r}"
                    ) from problem
                path = whole.removeprefix(f"{folder}/") if folder else whole
                if whole.startswith("/") or ".." in PurePosixPath(whole).parts:
                    raise UserError(f"{url}: {host} lists {whole!r}, which leads out of the folder")
                if wanted(path):
                    address = f"{host}/datasets/{owner}/{repo}/resolve/main/{quote(whole)}"
                    found.append(File(_url(url, path), address, path, size, sha256, version))
        if not found:
            raise UserError(f"{url}: the listing at {host} has no file for this data set's source")
        return sorted(found, key=lambda file: file.path)

    def _page(self, address: str) -> tuple[list[Any], str | None]:
        """One page of a listing, and the address of the next."""

        def attempt() -> tuple[list[Any], str | None]:
            with self._get(address, {}) as response:
                entries = response.json()
                if not isinstance(entries, list):
                    raise UserError(f"{address}: not a listing: {str(entries)[:80]}")
                return entries, response.links.get("next", {}).get("url")

        return self._insist(address, attempt, lambda: 0)

    def fetch(self, file: File, target: Path, known: str | None, progress: Progress) -> str:
        """Gets one file as `target`, or what of it is not yet there, and gives its sha256.

        Raises UserError where it cannot be had, or its sha256 is not the `known` one or not the host's own.
        """
        part = _Part(target)
        try:
            if not part.complete:
                if known is not None and file.sha256 not in (None, known):
                    raise _changed(file.url, known, str(file.sha256), self._checksums)
                self._insist(
                    file.url, lambda: self._attempt(file, part, progress), lambda: part.size
                )
        finally:
            part.close()
        for wanted in (known, file.sha256):
            if wanted is not None and wanted != part.sha256:
                part.remove()
                raise _changed(file.url, wanted, part.sha256, self._checksums)
        part.finish()
        progress(part.size, part.size)
        return part.sha256

    def _attempt(self, file: File, part: _Part, progress: Progress) -> None:
        """Gets the rest of one file, or all of it where the server or a change upstream wants that."""
        headers = {}
        if part.size and part.validator:
            headers = {"Range": f"bytes={part.size}-", "If-Range": part.validator}
        with self._get(file.address, headers) as response:
            status, version = response.status_code, _validator(response)
            start, total = _extent(response)
            if status in (206, 416) and not (
                version in (None, part.validator) and start == part.size and total is not None
            ):
                part.restart(None)
                raise _AgainError("the part that is here does not fit the file there any more")
            if status == 416:  # nothing after what is here: it is all
                return
            if status != 206:
                if part.size:
                    log.info("%s: starts again from its first byte", file.url)
                part.restart(version)
            _check_space(part.path.parent, (total or 0) - part.size, file.url)
            progress(part.size, total)
            # read1 gives what has come; `read` would lose up to a block when the connection is reset or silent
            while block := response.raw.read1(BLOCK, decode_content=False):
                part.append(block)
                progress(part.size, total)
        if total is not None and part.size != total:
            raise _AgainError(f"{part.size} of {total} bytes came")

    def _insist(self, url: str, attempt: Callable[[], T], reached: Callable[[], int]) -> T:
        """Attempts until one succeeds, or ATTEMPTS in a row fail without having `reached` further."""
        failures, best = 0, reached()
        while True:
            try:
                return attempt()
            except _AgainError as problem:
                if reached() > best:
                    failures, best = 0, reached()
                failures += 1
                if failures == ATTEMPTS:
                    raise self._unreachable(url, str(problem)) from problem
                wait = PAUSE * GROWTH ** (failures - 1) * random.uniform(0.75, 1.25)
                if problem.wait is not None:
                    if problem.wait > LONGEST_WAIT:
                        raise UserError(
                            f"{url}: {problem}, and asks to wait {problem.wait:.0f} s; run again then"
                        ) from problem
                    wait = max(wait, problem.wait)
                log.info("%s: %s; again in %.1f s", url, problem, wait)
                self._sleep(wait)

    @contextlib.contextmanager
    def _get(self, address: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        """One answer, of status 200, 206 or (if a range was asked for) 416.

        Raises _AgainError for what another attempt may cure, also while the answer is read, and UserError for the rest.
        """
        try:
            with self._session.get(
                address, headers=headers, stream=True, timeout=TIMEOUT
            ) as response:
                status = response.status_code
                if status in (408, 425, 429) or status >= 500:
                    raise _AgainError(f"HTTP {status} {response.reason}", _retry_after(response))
                if status not in (200, 206) and not (status == 416 and headers):
                    raise self._unreachable(address, f"HTTP {status} {response.reason}")
                yield response
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            urllib3.exceptions.HTTPError,
        ) as problem:
            if isinstance(_root(problem), ssl.SSLCertVerificationError):
                raise self._unreachable(address, _reason(problem)) from problem
            raise _AgainError(_reason(problem)) from problem
        except requests.RequestException as problem:
            raise self._unreachable(address, _reason(problem)) from problem

    def _unreachable(self, url: str, reason: str) -> UserError:
        return UserError(
            f"{url}: cannot be had ({reason}); correct the URL or run again (it goes on from what has come), or get it "
            f"in another way, put it under data/own/ and set {self._field} in params.yaml to its path; the embedded "
            f"data sets ({EMBEDDED}) need no network"
        )


class _Part:
    """The bytes of a file so far, the version they belong to, and their sha256."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(f"{target.name}.part")
        self._told = target.with_name(f"{target.name}.version")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.complete = target.is_file()
        self.validator: str | None = None
        if not self.complete:
            with contextlib.suppress(FileNotFoundError):
                self.validator = self._told.read_text() or None
        self._file = target.open("rb") if self.complete else self.path.open("ab+")
        self._file.seek(0)
        self._sum = hashlib.file_digest(self._file, "sha256")
        self.size = self._file.tell()

    @property
    def sha256(self) -> str:
        """Of the bytes so far."""
        return self._sum.hexdigest()

    def restart(self, validator: str | None) -> None:
        """Forgets the bytes; those to come are of this version. In this order, so that a kill mixes no two."""
        self._file.truncate(0)
        self._told.write_text(validator or "")
        self.validator, self._sum, self.size = validator, hashlib.sha256(), 0

    def append(self, block: bytes) -> None:
        """The next bytes."""
        self._file.write(block)
        self._sum.update(block)
        self.size += len(block)

    def close(self) -> None:
        """Also after a failure: what has come stays on the disk."""
        self._file.close()

    def remove(self) -> None:
        """Leaves nothing of it."""
        for path in (self._target, self.path, self._told):
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The part becomes the target, read-only, since it gets other names."""
        if not self.complete:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            self.path.chmod(0o444)
            self.path.replace(self._target)
            self._told.unlink(missing_ok=True)


def _validator(response: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, or else the date of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _extent(response: requests.Response) -> tuple[int | None, int | None]:
    """Where in the file the answer's body begins, and the file's length, as far as told.

    Of 416, which has no body, it begins at the file's end.
    """
    if response.status_code == 200:
        # With a transfer coding the length says nothing; with two of them (a smuggler's) neither.
        length = response.headers.get("Content-Length", "")
        chunked = "Transfer-Encoding" in response.headers
        return 0, int(length) if length.isdecimal() and not chunked else None
    told = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", told)
    if match is None:
        return None, None
    return int(match[1] or match[2]), int(match[2])


def _retry_after(response: requests.Response) -> float | None:
    """Seconds to wait, from either form of the header."""
    told = response.headers.get("Retry-After", "").strip()
    if told.isdecimal():
        return float(told)
    try:
        return max(email.utils.parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _root(problem: BaseException) -> BaseException:
    """What the operating system or the parser said, below the layers that wrapped it."""
    while problem.__context__ is not None:
        problem = problem.__context__
    return problem


def _reason(problem: BaseException) -> str:
    root = _root(problem)
    return str(getattr(root, "strerror", None) or root) or type(root).__name__


def _changed(url: str, wanted: str, found: str, checksums: Path) -> UserError:
    return UserError(
        f"{url}: changed upstream, or damaged on the way: its sha256 is {found}, but {wanted} is wanted; run again to "
        f"rule out the latter; to take the new file, delete the URL's line in {checksums}"
    )


def _check_space(folder: Path, needed: int, url: str) -> None:
    """Raises UserError where `needed` more bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{url}: {needed / 1e6:.0f} MB more are needed, {free / 1e6:.0f} MB are free on the disk of {folder}; "
            "free disk space, then run again"
        )


def _size(path: Path) -> int:
    """Bytes of the files in a folder, however deep."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _read(checksums: Path) -> dict[str, str]:
    """The file of checksums; empty if there is none."""
    try:
        known = json.loads(checksums.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise UserError(
            f"{checksums}: not JSON ({problem}); restore it with git if it is there, or delete it"
        ) from problem
    if not isinstance(known, dict):
        raise UserError(f"{checksums}: not an object of {{url: sha256}}; restore it with git")
    return known


@contextlib.contextmanager
def _locked(path: Path, holder: str) -> Iterator[None]:
    """Alone among processes; the lock ends with the process however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting: %s", holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
