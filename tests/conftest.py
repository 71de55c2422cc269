"""Fixtures that many tests share. Servers start on first use, once for each pytest worker."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator

import pytest
import servers
import structlog


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A verb sends events to the stderr of its test, which is closed when the next one logs."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def seaweed() -> Iterator[servers.S3Server]:
    """A real S3 server, shared by all tests of this worker."""
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture
def s3_root(seaweed: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store URI that no other test uses; the environment leads boto3 to the server."""
    for key, value in seaweed.environment().items():
        monkeypatch.setenv(key, value)
    return f"s3://{seaweed.bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A verb called in this process listens to signals; what is forked later must not."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
