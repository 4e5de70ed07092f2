"""Servers that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An S3 server that runs when a test begins, and its accounts in the environment; `bucket()` gives an url.

    A test may `stop()` and `start()` it, as often as it likes.
    """
    s3_server.start()
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server
