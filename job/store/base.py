"""What every store can do. `folder` and `s3` do it; `runs` and `versions` build the protocol on it.

Conditions guard only small objects: :meth:`Store.create` and :meth:`Store.swap`. Content is
written once under a name that nobody else writes, and read back before anything points to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


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

    def upload(self, key: str, path: Path) -> None:
        """Write a file of any size under a key that only this attempt writes."""

    def download(self, key: str, path: Path, *, size: int, sha256: str) -> None:
        """Fetch a file, verified, written aside and renamed.

        Raises:
            JobError: 66 if it is not there, 70 if size or hash are not what was promised.
        """

    def sha256(self, key: str) -> tuple[int, str]:
        """Read an object back in whole and return its size and sha256."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every key below ``prefix``."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys; absent ones are no error."""
