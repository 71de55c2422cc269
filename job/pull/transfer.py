"""The transfer under every remote source: concurrent, resumable, hash-checked, and visible."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import structlog

from job.errors import ExitCode, JobError
from job.files import CHUNK_BYTES, safe_relative
from job.progress import Progress
from job.pull.pin import Pin, PinnedFile, not_proven
from job.retry import TransientError, retry
from job.stop import Stop, preempted

log = structlog.get_logger()

# Takes a file's name, what is pinned of it and an offset; streams the bytes from there. A server
# that can't resume raises RestartError. What may pass is raised as TransientError.
Opener = Callable[[str, PinnedFile, int], AbstractContextManager[Iterator[bytes]]]

NUM_STREAMS = 8
LOG_EVERY_S = 10.0
END_S = 2.0
NUM_TRIES_OF_BAD_BYTES = 2


class RestartError(Exception):
    """The server sends the file from its beginning only."""


@dataclass(slots=True)
class Meter:
    """Bytes pulled so far, told to people and to the watchdog."""

    what: str
    total_bytes: int
    progress: Progress
    done_bytes: int = 0
    _began: float = field(default_factory=time.monotonic)
    _logged: float = field(default_factory=time.monotonic)
    _resumed_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, num_bytes: int, *, resumed: bool = False) -> None:
        """Count bytes; those ``resumed`` from disk don't count for the rate."""
        with self._lock:
            self.done_bytes += num_bytes
            self._resumed_bytes += num_bytes if resumed else 0

    def report(self) -> None:
        """Update the progress, and log a line every ten seconds."""
        now = time.monotonic()
        rate = (self.done_bytes - self._resumed_bytes) / max(now - self._began, 1e-3)
        eta_s = round((self.total_bytes - self.done_bytes) / rate) if rate > 0 else None
        figures = {"done_bytes": self.done_bytes, "size_bytes": self.total_bytes, "eta_s": eta_s}
        self.progress.update(**figures)
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("pull_progress", what=self.what, mb_per_s=round(rate / 1e6, 1), **figures)


def download(
    pin: Pin, open_at: Opener, folder: Path, *, stop: Stop, progress: Progress
) -> dict[str, str]:
    """Pull every pinned file into ``folder`` and return name → sha256.

    Whole files that lie there already are hashed and kept; begun ones go on where they ended.

    Raises:
        JobError: 70 wrong bytes, 71 disk full, 74 past the deadline, and the source's own.
    """
    paths = {name: folder / safe_relative(name, where=pin.uri) for name in pin.files}
    _require_space(pin, paths, folder)
    meter = Meter(pin.uri, pin.size_bytes, progress)
    log.info("pull_started", what=pin.uri, num_files=len(paths), size_bytes=pin.size_bytes)
    streams = _Streams(pin, paths, _Task(pin.uri, open_at, meter))
    try:
        while not streams.over.wait(0.5):
            stop.check()
            meter.report()
    finally:
        streams.end()
    meter.report()
    return streams.result()


class _Streams:
    """The threads that pull. They are daemons: a read that hangs must not outlive a SIGTERM."""

    def __init__(self, pin: Pin, paths: dict[str, Path], task: _Task) -> None:
        # The largest first: the others fill the streams beside it.
        self._names = sorted(paths, key=lambda name: pin.files[name].size)
        self._pin, self._paths, self._task = pin, paths, task
        self._found: dict[str, str] = {}
        self._error: BaseException | None = None
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"pull-{i}")
            for i in range(min(NUM_STREAMS, len(paths)))
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (name := self._next()) is not None:
            try:
                sha256 = self._task.pull(name, self._pin.files[name], self._paths[name])
            except BaseException as error:  # noqa: BLE001 - raised by result()
                with self._lock:
                    self._error = self._error or error
                self.over.set()
                return
            with self._lock:
                self._found[name] = sha256
                if len(self._found) == len(self._paths):
                    self.over.set()

    def _next(self) -> str | None:
        with self._lock:
            return self._names.pop() if self._names and self._error is None else None

    def end(self) -> None:
        """Ask what still runs to end, and give it a moment."""
        self._task.stop.request(preempted("another file's end"))
        until = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def result(self) -> dict[str, str]:
        """Return name → sha256, or raise what a thread raised."""
        if self._error is not None:
            raise self._error
        return dict(sorted(self._found.items()))


def _require_space(pin: Pin, paths: dict[str, Path], folder: Path) -> None:
    there = [p for path in paths.values() for p in (path, _begun(path)) if p.is_file()]
    needed = pin.size_bytes - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _disk_full(
            folder, f"{pin.uri} needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free"
        )


def _disk_full(folder: Path, what: str) -> JobError:
    return JobError(ExitCode.OUT_OF_RESOURCES, str(folder), what, "free some space, or use --work")


def _begun(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


@dataclass(slots=True)
class _Task:
    uri: str
    open_at: Opener
    meter: Meter
    stop: Stop = field(default_factory=Stop)

    def pull(self, name: str, pinned: PinnedFile, path: Path) -> str:
        """Bring one file to ``path`` and return its sha256."""
        where = f"{self.uri}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(_begun(path))
        for _ in range(NUM_TRIES_OF_BAD_BYTES):
            digests = retry(where, lambda: self._bring(name, pinned, path), stop=self.stop)
            wrong = digests.differs_from(pinned)
            if wrong is None:
                _begun(path).replace(path)
                return digests.sha256.hexdigest()
            log.warning("pull_refused", what=where, reason=wrong)
            self.meter.add(-_begun(path).stat().st_size)
            _begun(path).unlink()
        raise not_proven(where, wrong or "", "pull again later, or pin a revision that is whole")

    def _bring(self, name: str, pinned: PinnedFile, path: Path) -> Digests:
        """Go on with a begun file; a broken stream that brought something is taken up at once."""
        begun = _begun(path)
        with open(begun, "ab+") as handle:
            digests = self._digest_begun(handle, pinned)
            while digests.num_bytes < pinned.size:
                before = digests.num_bytes
                try:
                    self._stream(name, pinned, handle, digests)
                except RestartError:
                    handle.truncate(0)
                    self.meter.add(-digests.num_bytes)
                    digests = Digests(pinned)
                except TransientError as error:
                    if digests.num_bytes == before:
                        self.meter.add(-digests.num_bytes)
                        raise
                    log.warning(
                        "pull_resumed",
                        what=name,
                        at_byte=digests.num_bytes,
                        reason=str(error)[:200],
                    )
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    what = f"is full at byte {digests.num_bytes} of {name}, of {pinned.size}"
                    raise _disk_full(path.parent, what) from error
        return digests

    def _digest_begun(self, handle: BinaryIO, pinned: PinnedFile) -> Digests:
        digests = Digests(pinned)
        handle.seek(0)
        while digests.num_bytes <= pinned.size and (chunk := handle.read(CHUNK_BYTES)):
            self.stop.check()
            digests.update(chunk)
        self.meter.add(digests.num_bytes, resumed=True)
        if digests.num_bytes > pinned.size:
            handle.truncate(0)
            self.meter.add(-digests.num_bytes, resumed=True)
            return Digests(pinned)
        return digests

    def _stream(self, name: str, pinned: PinnedFile, handle: BinaryIO, digests: Digests) -> None:
        with self.open_at(name, pinned, digests.num_bytes) as chunks:
            for chunk in chunks:
                self.stop.check()
                handle.write(chunk)
                handle.flush()
                digests.update(chunk)
                self.meter.add(len(chunk))
                if digests.num_bytes > pinned.size:
                    return
        if digests.num_bytes < pinned.size:
            raise TransientError(f"the stream ended at byte {digests.num_bytes} of {pinned.size}")


class Digests:
    """The running digests of a file: sha256 always, and those that its pin can be held against."""

    def __init__(self, pinned: PinnedFile) -> None:
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % pinned.size, usedforsecurity=False)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._use_git = pinned.git_sha1 is not None
        self._use_md5 = pinned.md5 is not None

    def update(self, chunk: bytes) -> None:
        """Take in the next bytes."""
        self.num_bytes += len(chunk)
        self.sha256.update(chunk)
        if self._use_git:
            self._git.update(chunk)
        if self._use_md5:
            self._md5.update(chunk)

    def differs_from(self, pinned: PinnedFile) -> str | None:
        """Return what is wrong with the bytes, or None."""
        if self.num_bytes != pinned.size:
            return f"has {self.num_bytes} bytes, not {pinned.size}"
        found = (("sha256", self.sha256), ("git_sha1", self._git), ("md5", self._md5))
        for name, digest in found:
            promised = getattr(pinned, name)
            if promised is not None and digest.hexdigest() != promised:
                return (
                    f"its {name} is {digest.hexdigest()[:12]}…, not the promised {promised[:12]}…"
                )
        return None
