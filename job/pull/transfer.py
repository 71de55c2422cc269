"""The transfer under every remote source: concurrent, resumable, hash-checked, and visible."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from job.files import CHUNK_BYTES, refusals, require_space, safe_relative
from job.progress import Progress
from job.pull.pin import Pin, PinnedFile, not_proven
from job.retry import TransientError, retry
from job.stop import Stop
from job.store.transfer import Meter, each

log = structlog.get_logger()

# Takes a file's name, what is pinned of it and an offset; streams the bytes from there. A server
# that can't resume raises RestartError. What may pass is raised as TransientError.
Opener = Callable[[str, PinnedFile, int], AbstractContextManager[Iterator[bytes]]]

NUM_STREAMS = 8
NUM_TRIES_OF_BAD_BYTES = 2


class RestartError(Exception):
    """The server sends the file from its beginning only."""


def download(
    pin: Pin, open_at: Opener, folder: Path, *, stop: Stop, progress: Progress
) -> dict[str, str]:
    """Pull every pinned file into ``folder`` and return name → sha256.

    Whole files that lie there already are hashed and kept; begun ones go on where they ended.

    Raises:
        JobError: 70 wrong bytes, 71 disk full, 74 past the deadline, and the source's own.
    """
    paths = {name: folder / safe_relative(name, where=pin.uri) for name in pin.files}
    lacking = pin.size_bytes - sum(_begin(path).stat().st_size for path in paths.values())
    require_space(folder, lacking)
    log.info("pull_started", what=pin.uri, num_files=len(paths), size_bytes=pin.size_bytes)
    meter = Meter(pin.uri, lacking, progress)

    def pull_file(name: str, inner: Stop) -> str:
        with refusals(str(paths[name])):
            return _File(pin, name, paths[name], open_at, meter, inner).pull()

    # The largest first: the others fill the streams beside it.
    names = sorted(paths, key=lambda name: -pin.files[name].size)
    found = each(pull_file, names, stop=stop, workers=NUM_STREAMS, daemon=True)
    return dict(sorted(zip(names, found, strict=True)))


def _begin(path: Path) -> Path:
    """Make the file that the bytes of ``path`` go to; what lies at ``path`` is its beginning."""
    begun = path.with_name(f"{path.name}.incomplete")
    begun.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(begun)
    begun.touch()
    return begun


@dataclass(frozen=True, slots=True)
class _File:
    pin: Pin
    name: str
    path: Path
    open_at: Opener
    meter: Meter
    stop: Stop

    @property
    def pinned(self) -> PinnedFile:
        return self.pin.files[self.name]

    def pull(self) -> str:
        """Bring the file to its path and return its sha256."""
        where, begun = f"{self.pin.uri}/{self.name}", _begin(self.path)
        for _ in range(NUM_TRIES_OF_BAD_BYTES):
            largest = 0
            while begun.stat().st_size < self.pinned.size:
                retry(where, partial(self._stream, begun, largest), stop=self.stop)
                largest = max(largest, begun.stat().st_size)
            sha256, wrong = _digest(begun, self.pinned, self.stop)
            if wrong is None:
                begun.replace(self.path)
                return sha256
            log.warning("pull_refused", what=where, reason=wrong)
            begun.write_bytes(b"")
        raise not_proven(where, wrong or "", "pull again later, or pin a revision that is whole")

    def _stream(self, begun: Path, largest: int) -> None:
        """Go on with a begun file; a stream that breaks is no failure if it brought something new.

        New is what is beyond the file's ``largest`` size so far: a server may know no ranges.
        """
        with open(begun, "ab") as handle:
            offset = handle.tell()
            try:
                with self.open_at(self.name, self.pinned, offset) as chunks:
                    for chunk in chunks:
                        self.stop.check()
                        handle.write(chunk)
                        self.meter.tick(len(chunk))
                        if handle.tell() > self.pinned.size:
                            return
            except RestartError:
                handle.truncate(0)
                what = "the server sends it from the beginning only"
                raise TransientError(what) from None
            except TransientError as error:
                if handle.tell() <= max(offset, largest):
                    raise
                at_byte, reason = handle.tell(), str(error)[:200]
                log.warning("pull_resumed", what=self.name, at_byte=at_byte, reason=reason)
            if handle.tell() <= max(offset, largest):
                raise TransientError(f"the stream ended at byte {offset} of {self.pinned.size}")


def _digest(path: Path, pinned: PinnedFile, stop: Stop) -> tuple[str, str | None]:
    """Return a file's sha256, and what is wrong with it by any digest that its source gives."""
    digests = {
        "sha256": hashlib.sha256(),
        "git_sha1": hashlib.sha1(b"blob %d\0" % pinned.size, usedforsecurity=False),
        "md5": hashlib.md5(usedforsecurity=False),
    }
    promised = {name: getattr(pinned, name) for name in digests}
    size = 0
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            stop.check()
            size += len(chunk)
            for name, digest in digests.items():
                if name == "sha256" or promised[name]:
                    digest.update(chunk)
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    wrong = [
        f"its {name} is {found[name][:12]}…, not the promised {hexes[:12]}…"
        for name, hexes in promised.items()
        if hexes not in (None, found[name])
    ]
    if size != pinned.size:
        wrong.insert(0, f"has {size} bytes, not {pinned.size}")
    return found["sha256"], wrong[0] if wrong else None
