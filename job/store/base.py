"""What every store can do. `folder` and `s3` say how; `runs` and `versions` build the protocol on it.

Conditions guard only small objects: :meth:`Store.create` and :meth:`Store.swap`. Content is
written once under a name that nobody else writes, and read back before anything points to it.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from job.errors import ExitCode, JobError
from job.files import atomic_writer, refusals
from job.retry import TransientError, retry
from job.stop import Stop
from job.store.transfer import ordered

T = TypeVar("T")

MAX_SMALL_BYTES = 64 << 20
"""What :meth:`Store.get` reads at most: heads and manifests are a thousandth of it."""
PART_BYTES = 16 << 20
PARTS_AHEAD = 4
"""Parts of one file in memory: with four files, at most 256 MiB."""
REQUESTS_AT_ONCE = 8

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


class Store(ABC):
    """Keys are relative POSIX names below the store's root. All calls retry, all hear the stop.

    A base class and not a protocol: when a write counts, and how bytes are verified, is written
    once, here. Stores differ in what stands below, in the abstract methods.

    Raises (every call):
        JobError: 66 bucket missing, 71 disk full, 74 unreachable past the deadline,
            77 credentials or permission.
    """

    def __init__(self, uri: str, *, stop: Stop, single_writer: bool = False) -> None:
        self.uri = uri
        self.single_writer = single_writer
        """The store has no conditions: create and swap read, compare, then write."""
        self.stop = stop
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="store")

    def hearing(self, stop: Stop) -> Self:
        """Return the same store, with another stop to hear."""
        other = copy.copy(self)
        other.stop = stop
        return other

    def ask(self, key: str, call: Callable[[], T]) -> T:
        """Return ``call()``, with our retries, and with its refusals in our words."""
        where = f"{self.uri}/{key}"

        def once() -> T:
            with self._explained(where):
                return call()

        return retry(where, once, stop=self.stop)

    def create(self, key: str, body: bytes) -> str:
        """Write ``body`` if ``key`` is absent, and return its tag.

        A lost response to our own success is read back and is success.

        Raises:
            ExistsError: there is another body under this key.
        """
        if self.single_writer:
            tag = self.put(key, body) if self.get(key) is None else None
        else:
            tag = self._create(key, body)
        # A tag is ours for certain, whoever swaps the object next; only a doubt is read back.
        return tag or self._as_ours(key, body, ExistsError)

    def swap(self, key: str, body: bytes, tag: str) -> str:
        """Replace the object whose tag is ``tag``, and return the new tag.

        Raises:
            ConflictError: the object has another tag by now, or is gone.
        """
        if self.single_writer:
            found = self.get(key)
            new = self.put(key, body) if found and found.tag == tag else None
        else:
            new = self._swap(key, body, tag)
        return new or self._as_ours(key, body, ConflictError)

    def _as_ours(self, key: str, body: bytes, refused: type[Exception]) -> str:
        found = self.get(key)
        if found is None or found.body != body:
            raise refused(key)
        return found.tag

    def download(
        self, key: str, path: Path, *, size: int, sha256: str, tick: Tick = no_tick
    ) -> None:
        """Fetch a file, verified, written aside and renamed.

        Raises:
            JobError: 66 if it is not there, 70 if size or hash are not what was promised.
        """
        with refusals(str(path)), atomic_writer(path) as writer:
            found, digest = 0, hashlib.sha256()
            for chunk in self._chunks(key, tick, expected=size):
                digest.update(chunk)
                found += writer.write(chunk)
            require_same(f"{self.uri}/{key}", (size, sha256), (found, digest.hexdigest()))

    def sha256(self, key: str, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Read an object back in whole and return its size and sha256.

        Raises:
            JobError: 66 if it is not there.
        """
        size, digest = 0, hashlib.sha256()
        for chunk in self._chunks(key, tick):
            digest.update(chunk)
            size += len(chunk)
        return size, digest.hexdigest()

    def _chunks(self, key: str, tick: Tick, expected: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes in order; of an object of another size than expected, none."""
        size, tag = self._state(key)
        if expected not in (None, size):
            require_same(f"{self.uri}/{key}", (expected or 0, "?"), (size, "?"))

        def fetch(offset: int) -> bytes:
            wanted = min(PART_BYTES, size - offset)

            def read() -> bytes:
                body = self._range(key, tag, offset, wanted)
                if len(body) != wanted:
                    raise TransientError(f"{len(body)} bytes came in place of {wanted}")
                return body

            body = self.ask(key, read)
            tick(len(body))
            return body

        offsets = range(0, size, PART_BYTES)
        return ordered(self._pool, fetch, offsets, window=PARTS_AHEAD, stop=self.stop)

    @abstractmethod
    def get(self, key: str) -> Small | None:
        """Return a small object, or None if it is not there."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> str:
        """Write a small object without a condition (attempt-owned paths only); return its tag."""

    @abstractmethod
    def upload(self, key: str, path: Path, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Write a file of any size under a key that only this attempt writes.

        Returns:
            Size and sha256 of the bytes that were sent.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every key below ``prefix``."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys; absent ones are no error."""

    @abstractmethod
    def sweep(self, prefix: str, *, older_than_s: float = 0.0) -> None:
        """Throw away what uploads that were killed left below ``prefix``, invisible to lists."""

    @abstractmethod
    def _create(self, key: str, body: bytes) -> str | None:
        """Return the new object's tag; None if the key is taken, perhaps by ourselves."""

    @abstractmethod
    def _swap(self, key: str, body: bytes, tag: str) -> str | None:
        """Return the new tag; None if the object has another one, perhaps by ourselves."""

    @abstractmethod
    def _state(self, key: str) -> tuple[int, str]:
        """Return an object's size and tag, or raise :func:`missing`."""

    @abstractmethod
    def _range(self, key: str, tag: str, offset: int, size: int) -> bytes:
        """Return a part of the object, as long as it has this tag."""

    @abstractmethod
    def _explained(self, where: str) -> AbstractContextManager[None]:
        """Turn what the block raises into a JobError, or into a TransientError if it may pass."""


def missing(uri: str, key: str) -> JobError:
    """Return the error of an object that should be there."""
    do = "see what `lora-job versions` lists"
    return JobError(ExitCode.NOT_FOUND, f"{uri}/{key}", "is not there", do)


def too_large(where: str) -> JobError:
    """Return the error of a head or manifest that nobody of us wrote."""
    what = f"is larger than {MAX_SMALL_BYTES >> 20} MiB, which no manifest is"
    return JobError(ExitCode.NOT_PROVEN, where, what, "do not use it; see who wrote it")


def require_same(where: str, promised: tuple[int, str], found: tuple[int, str]) -> None:
    """Raise 70 if (size, sha256) of what was read are not what a manifest promises."""
    if promised == found:
        return
    has, should = (f"{size:,} bytes with sha256 {sha[:12]}…" for size, sha in (found, promised))
    do = "do not use it; fetch again, and publish again if it stays so"
    what = f"has {has}, where its manifest promises {should}"
    raise JobError(ExitCode.NOT_PROVEN, where, what, do)
