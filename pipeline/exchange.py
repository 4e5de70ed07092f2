"""What machines hand each other beside DVC's objects: small files, and whole folders, by name.

It lies in DVC's own default remote, below `modip/`, reached by DVC's own file system object: whoever can push results
can exchange, with the same credentials, on S3, over ssh or in a shared folder. Without a remote it lies in a folder of
the clone, for the processes of one machine.

A folder is sent as files below a name used only once (its generation), and then one small file that names them with
their sums: who fetches at any moment gets a whole folder, the old one or the new one, and never half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

from dvc.exceptions import DvcException
from dvc.fs import FileSystem, LocalFileSystem, RemoteMissingDepsError, get_cloud_fs
from dvc.repo import Repo
from dvc_objects.fs.base import ObjectFileSystem
from dvc_objects.fs.utils import as_atomic

from modip.errors import UserError
from pipeline.workspace import HOME, CurableError, StageError

log = logging.getLogger(__name__)

NEWEST = "newest.json"
"""In a sent folder: which generation is whole, and the size and sha256 of each of its files."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LASTING = re.compile(
    r"credential|access ?denied|permission ?denied|forbidden|unauthorized|host ?key|signature ?does ?not ?match"
    r"|invalid ?access ?key|\b40[13]\b",
    re.IGNORECASE,
)
"""What remotes say when another attempt would fail as well. Anything else they say may be over in a minute."""


class Exchange:
    """Small files and folders by name, as in "claims/a"; a name does not end in .tmp.

    Any method raises CurableError where the remote does not answer, UserError where it refuses; each one line.
    """

    def __init__(self, fs: FileSystem, base: str, title: str, *, shared: bool) -> None:
        """`base` is where names start on `fs`, `title` what messages call it; see `open`."""
        self._fs, self._base, self._title = fs, base, title
        self.shared = shared
        """Whether other machines see it: it is in a remote, not in a folder of this clone."""

    @classmethod
    def open(cls, root: Path) -> Self:
        """That of the default remote of the DVC repository `root`, .dvc/config.local included; or of a folder in it."""
        title = "DVC"
        try:
            with Repo(str(root)) as repo:
                name = repo.config["core"].get("remote")
                if not name:
                    folder = root.absolute() / HOME / "exchange"
                    return cls(LocalFileSystem(), str(folder), str(folder), shared=False)
                title = f"DVC remote {name!r}"
                kind, config, path = get_cloud_fs(repo.config, name=name)
                fs = kind(**config)
        except (ImportError, RemoteMissingDepsError) as error:
            raise UserError(f"{title}: {_line(error)}; pip install it, on every machine") from None
        except DvcException as error:
            raise UserError(f"{title}: {_line(error)}; correct .dvc/config") from None
        if kind.protocol in ("http", "https") or config.get("worktree") or fs.version_aware:
            what = "is read by HTTP" if kind.protocol in ("http", "https") else "keeps versions"
            raise UserError(
                f"{title} {what}: several machines need one that they can list and write, as s3://BUCKET/PATH, "
                "ssh://HOST/PATH or a shared folder, without version_aware or worktree; "
                "dvc remote add --local -d NAME URL sets it"
            )
        path = path.rstrip("/")
        found = cls(
            fs, fs.join(path, "modip"), f"{title} ({fs.unstrip_protocol(path)})", shared=True
        )
        with found._asking():
            fs.fs.dircache.use_listings_cache = False  # others write here too
        return found

    # Files.

    def write(self, name: str, data: bytes) -> None:
        """Replace the file at once: nobody reads half of it."""
        path = self._path(name)
        with self._asking():
            if isinstance(self._fs, ObjectFileSystem):
                self._fs.pipe_file(path, data)
            else:
                with as_atomic(self._fs, path, create_parents=True) as temporary:
                    self._fs.pipe_file(temporary, data)

    def read(self, name: str) -> bytes | None:
        """None if it is not there."""
        with self._asking(), suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(self._path(name)))
        return None

    def names(self, folder: str) -> list[str]:
        """Of all files below the folder, sorted."""
        base = self._path(folder).strip("/")
        found: list[str] = []
        with self._asking(), suppress(FileNotFoundError):
            found = [path.strip("/") for path in self._fs.find(self._path(folder))]
        below = (path.removeprefix(f"{base}/") for path in found if path.startswith(f"{base}/"))
        return sorted(f"{folder}/{unquote(name)}" for name in below if not name.endswith(".tmp"))

    def remove(self, name: str) -> None:
        """A file, or all below a folder; neither need be there."""
        path = self._path(name)
        with self._asking(), suppress(FileNotFoundError):
            if isinstance(self._fs, ObjectFileSystem):
                for one in list(self._fs.find(path)):
                    self._fs.rm_file(one)
            elif self._fs.isdir(path):
                self._fs.rm(path, recursive=True)
            else:
                self._fs.rm_file(path)

    # Folders.

    def send(self, folder: Path, name: str, about: Mapping[str, Any]) -> None:
        """Replace what was sent by that name, at once for those who fetch. `about` goes with it, as JSON.

        One sender per name; nothing may write in `folder` meanwhile.
        """
        before = self._newest(name)
        generation, files = uuid.uuid4().hex, {}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = file.relative_to(folder).as_posix()
            files[relative] = {"size": file.stat().st_size, "sha256": _sha256(file)}
            self._put(file, f"{name}/{generation}/{relative}")
        newest = {"generation": generation, "files": files, "about": dict(about)}
        self.write(f"{name}/{NEWEST}", json.dumps(newest).encode())
        if before is not None:
            self.remove(f"{name}/{before['generation']}")

    def sent(self, folder: str) -> list[str]:
        """Names of the folders sent, below `folder`."""
        return [
            name.removesuffix(f"/{NEWEST}")
            for name in self.names(folder)
            if name.endswith(f"/{NEWEST}")
        ]

    def about(self, name: str) -> dict[str, Any] | None:
        """What was sent with the folder; None if there is none."""
        newest = self._newest(name)
        return None if newest is None else newest["about"]

    def fetch(self, name: str, folder: Path) -> bool:
        """Put what was sent by that name in the place of `folder`; False, and nothing changed, if none is whole."""
        new = folder.with_name(f".{folder.name}.fetched")
        tried = None
        try:
            # Once more if another one was sent meanwhile, and the files of this one are gone.
            while (newest := self._newest(name)) is not None and newest != tried:
                if self._get(name, newest, new):
                    _put_in_place(new, folder)
                    return True
                tried = newest
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if tried is not None:
            log.warning("%s: %s is damaged there, and not used", self._title, name)
        return False

    def _newest(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.read(f"{name}/{NEWEST}") or b"null")
        except ValueError:  # half of one, by a server that cannot replace a file at once
            return None

    def _put(self, file: Path, name: str) -> None:
        path = self._path(name)
        with self._asking():
            self._fs.makedirs(self._fs.parent(path))
            self._fs.put_file(str(file), path)

    def _get(self, name: str, newest: Mapping[str, Any], folder: Path) -> bool:
        """Whether all files have come whole into `folder`, which starts empty."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for relative, expected in newest["files"].items():
            file = folder / relative
            if not Path(os.path.normpath(file)).is_relative_to(folder):
                return False
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._asking(), suppress(FileNotFoundError):
                source = self._path(f"{name}/{newest['generation']}/{relative}")
                self._fs.get_file(source, str(file))
            if not file.is_file() or file.stat().st_size != expected["size"]:
                return False
            if _sha256(file) != expected["sha256"]:
                return False
        return True

    def _path(self, name: str) -> str:
        return self._fs.join(self._base, quote(name, safe="/@"))  # none of what globs or URLs mean

    def _asking(self) -> AbstractContextManager[None]:
        return faults(self._title)


@contextmanager
def faults(title: str) -> Iterator[None]:
    """Around calls of the library of the remote `title`, whatever that is: its errors as ours."""
    try:
        yield
    except (UserError, StageError):
        raise
    except FileNotFoundError as error:  # where something is written
        raise UserError(
            f"{title}: {_line(error)}; make the bucket or folder, or correct the remote's url"
        ) from error
    except Exception as error:
        said = _line(error)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise UserError(f"{title}: {said}; free disk space") from error
        if isinstance(error, PermissionError) or LASTING.search(f"{type(error).__name__} {said}"):
            raise UserError(
                f"{title}: {said}; several machines need to list, read and write there: correct its rights, or the "
                "credentials in .dvc/config.local or the environment"
            ) from error
        raise CurableError(f"{title} does not answer: {said}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put_in_place(new: Path, folder: Path) -> None:
    """`new` becomes `folder`; a kill between the two renames leaves none, which can be fetched again."""
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
