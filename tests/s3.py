"""A real S3 server on loopback, which can be killed and come back with what it held."""

from __future__ import annotations

import logging
import random
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server


class S3:
    """Runs in threads of this process. What it holds outlives `stop`, so a `start` is a server back from a crash."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        self.port = _free_port()
        self._server: Any = None
        self._open: list[socket.socket] = []
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """For every process that speaks to it: accounts, nothing of the user's own, and no long patience."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nowhere",
            "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def bucket(self) -> str:
        """The url of a folder in a new bucket."""
        name = f"b{uuid.uuid4().hex[:12]}"
        requests.put(f"{self.endpoint}/{name}", timeout=30).raise_for_status()
        return f"s3://{name}/store"

    def start(self) -> None:
        """On the same port as before; nothing if it runs."""
        if self._server is not None:
            return
        self._server = make_server(
            "127.0.0.1", self.port, DomainDispatcherApplication(create_backend_app), threaded=True,
            request_handler=MotoRequestHandler,
        )  # fmt: skip
        accept = self._server.get_request

        def get_request() -> Any:
            connection, address = accept()
            self._open.append(connection)
            return connection, address

        self._server.get_request = get_request
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """As if killed: what is under way is cut off, and connections are refused."""
        if self._server is None:
            return
        self._server.shutdown()
        self._thread.join()  # it closes the port
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()
        self._server = None


def _free_port() -> int:
    """Below those that the system gives to outgoing connections: nobody takes it while the server is down."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def use_remote(root: Path, url: str, endpoint: str | None = None, *, more: str = "") -> None:
    """The folder `root` as a DVC repository whose default remote is `url`; no remote if it is empty."""
    (root / ".dvc").mkdir(parents=True, exist_ok=True)
    lines = [
        "[core]",
        "no_scm = true",
        "analytics = false",
        f"site_cache_dir = {root / '.dvc/site'}",
    ]
    if url:
        lines += ["remote = store", "['remote \"store\"']", f"url = {url}", more]
        lines += [f"endpointurl = {endpoint}"] if endpoint else []
    (root / ".dvc" / "config").write_text("\n".join(lines) + "\n")
