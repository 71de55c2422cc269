"""What every store can do. `folder` and `s3` do it; `runs` and `versions` build the protocol on it.

Conditions guard only small objects: :meth:`Store.create` and :meth:`Store.swap`. Content is
written once under a name that nobody else writes, and read back before anything points to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from job.errors import ExitCode, JobError
from job.retry import DEADLINE_S
from job.stop import Stop

MAX_SMALL_BYTES = 64 << 20
"""What :meth:`Store.get` reads at most: heads and manifests are a thousandth of it."""

Tick = Callable[[int], None]
"""Called with the number of bytes that were just moved."""


def no_tick(count: int) -> None:
    """Count nothing."""


class ExistsError(Exception):
    """The key that should be created is there already (and its body is not ours)."""


class ConflictError(Exception):
    """The object that should be swapped has changed since it was read."""


@dataclass(frozen=True, slots=True)
class Small:
    """A small object and the tag that names this state of it."""

    body: bytes
    tag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One key in a listing. ``modified_s``: seconds since 1970, by the store's clock."""

    key: str
    size: int
    modified_s: float


class Store(Protocol):
    """Keys are relative POSIX names below the store's root. All calls retry, all hear the stop.

    Raises (every call):
        JobError: 66 bucket missing, 71 disk full, 74 unreachable past the deadline,
            77 credentials or permission.
    """

    uri: str
    single_writer: bool
    """The store has no conditions: :meth:`create` and :meth:`swap` read, compare, then write."""

    def hearing(self, stop: Stop, *, deadline_s: float = DEADLINE_S) -> Self:
        """Return the same store, with another stop to hear and another deadline to retry to."""

    def get(self, key: str) -> Small | None:
        """Return a small object, or None if it is not there."""

    def create(self, key: str, body: bytes) -> str:
        """Write ``body`` if ``key`` is absent, and return its tag.

        A lost response to our own success is read back and is success.

        Raises:
            ExistsError: there is another body under this key.
        """

    def swap(self, key: str, body: bytes, tag: str) -> str:
        """Replace the object whose tag is ``tag``, and return the new tag.

        Raises:
            ConflictError: the object has another tag by now, or is gone.
        """

    def put(self, key: str, body: bytes) -> None:
        """Write a small object without a condition (attempt-owned paths only)."""

    def upload(self, key: str, path: Path, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Write a file of any size under a key that only this attempt writes.

        Returns:
            Size and sha256 of the bytes that were sent.
        """

    def download(
        self, key: str, path: Path, *, size: int, sha256: str, tick: Tick = no_tick
    ) -> None:
        """Fetch a file, verified, written aside and renamed.

        Raises:
            JobError: 66 if it is not there, 70 if size or hash are not what was promised.
        """

    def sha256(self, key: str, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Read an object back in whole and return its size and sha256.

        Raises:
            JobError: 66 if it is not there.
        """

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every key below ``prefix``."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys; absent ones are no error."""

    def sweep(self, prefix: str, *, older_than_s: float = 0.0) -> None:
        """Throw away what uploads that were killed left below ``prefix``, invisible to lists."""


def missing(uri: str, key: str) -> JobError:
    """Return the error of an object that should be there."""
    return JobError(
        ExitCode.NOT_FOUND, f"{uri}/{key}", "is not there", "see what `lora-job versions` lists"
    )


def require_same(where: str, promised: tuple[int, str], found: tuple[int, str]) -> None:
    """Raise 70 if (size, sha256) of what was read are not what a manifest promises."""
    if promised == found:
        return
    what = f"has {found[0]:,} bytes with sha256 {found[1][:12]}…"
    promise = f"{promised[0]:,} bytes with sha256 {promised[1][:12]}…"
    raise JobError(
        ExitCode.NOT_PROVEN,
        where,
        f"{what}, where its manifest promises {promise}",
        "do not use it; fetch again, and publish again if it stays so",
    )
