"""S3 as a store: conditional writes for small objects, parts at once for large ones.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from job.errors import ExitCode, JobError
from job.files import atomic_writer, safe_relative
from job.retry import DEADLINE_S, TransientError, retry
from job.stop import Stop
from job.store.base import (
    MAX_SMALL_BYTES,
    ConflictError,
    Entry,
    ExistsError,
    Small,
    Tick,
    missing,
    no_tick,
    require_same,
)
from job.store.folder import refusals, too_large
from job.store.s3_client import (
    MissingError,
    PreconditionError,
    client_errors,
    make_client,
    understood,
)
from job.store.transfer import ordered

T = TypeVar("T")

PART_BYTES = 16 << 20
MAX_PARTS = 9_000
"""S3 allows 10,000 parts: above 150 GB they grow."""
REQUESTS_AT_ONCE = 8
PARTS_AHEAD = 4
"""Parts of one file in memory: with four files, at most 256 MiB."""


class S3Store:
    """See :class:`job.store.base.Store`."""

    def __init__(self, uri: str, *, stop: Stop, single_writer: bool = False) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.uri = uri.rstrip("/")
        self.single_writer = single_writer
        self._bucket, self._prefix = bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.stop, self.deadline_s = stop, DEADLINE_S
        self._client = make_client()
        self._errors = client_errors()
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="s3")

    def hearing(self, stop: Stop, *, deadline_s: float = DEADLINE_S) -> Self:
        """Return the same store with another stop and deadline."""
        other = copy.copy(self)
        other.stop, other.deadline_s = stop, deadline_s
        return other

    def get(self, key: str) -> Small | None:
        """Return a small object, or None if it is not there."""

        def read() -> Small:
            answer = self._client.get_object(**self._at(key))
            if answer["ContentLength"] > MAX_SMALL_BYTES:
                raise too_large(f"{self.uri}/{key}")
            return Small(_body(answer), answer["ETag"])

        try:
            return self.ask(key, read)
        except MissingError:
            return None

    def create(self, key: str, body: bytes) -> str:
        """Write ``body`` if ``key`` is absent, and return its tag."""
        if self.single_writer:
            found = self.get(key)
            if found is None:
                return self._put(key, body)
        else:
            try:
                return self._put(key, body, IfNoneMatch="*")
            except PreconditionError:
                found = self.get(key)
        if found is None or found.body != body:
            raise ExistsError(key)
        # Our own first try arrived; its answer was lost, and the second try was refused.
        return found.tag

    def swap(self, key: str, body: bytes, tag: str) -> str:
        """Replace the object whose tag is ``tag``, and return the new tag."""
        if self.single_writer:
            return self._swap_without_condition(key, body, tag)
        try:
            return self._put(key, body, IfMatch=tag)
        except (PreconditionError, MissingError):
            found = self.get(key)
            if found is None or found.body != body:
                raise ConflictError(key) from None
            return found.tag

    def _swap_without_condition(self, key: str, body: bytes, tag: str) -> str:
        found = self.get(key)
        if found is None or found.tag != tag:
            raise ConflictError(key)
        return self._put(key, body)

    def put(self, key: str, body: bytes) -> None:
        """Write a small object without a condition."""
        self._put(key, body)

    def _put(self, key: str, body: bytes, **condition: str) -> str:
        def write() -> str:
            return str(self._client.put_object(**self._at(key), Body=body, **condition)["ETag"])

        return self.ask(key, write)

    def upload(self, key: str, path: Path, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Send a file, in parts if it is large, and return its size and sha256."""
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > PART_BYTES:
                return size, self._upload_parts(key, handle.fileno(), size, tick)
            body = handle.read()
        self._put(key, body)
        tick(size)
        return size, hashlib.sha256(body).hexdigest()

    def _upload_parts(self, key: str, descriptor: int, size: int, tick: Tick) -> str:
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        digest = hashlib.sha256()
        opened = self.ask(key, lambda: self._client.create_multipart_upload(**self._at(key)))
        upload = {**self._at(key), "UploadId": opened["UploadId"]}

        def parts() -> Iterator[tuple[int, bytes]]:
            for number, offset in enumerate(range(0, size, part_bytes), start=1):
                body = os.pread(descriptor, part_bytes, offset)
                digest.update(body)
                yield number, body

        def send(part: tuple[int, bytes]) -> dict[str, Any]:
            number, body = part
            request = {**upload, "PartNumber": number, "Body": body}
            answer = self.ask(key, lambda: self._client.upload_part(**request))
            tick(len(body))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            sent = ordered(self._pool, send, parts(), window=PARTS_AHEAD, stop=self.stop)
            self._complete(key, upload, tuple(sent), size)
        except BaseException as error:
            self._abort(key, upload)
            if isinstance(error, MissingError):
                what = "its upload was thrown away by somebody else"
                raise JobError(ExitCode.STORE, f"{self.uri}/{key}", what, "start again") from error
            raise
        return digest.hexdigest()

    def _complete(
        self, key: str, upload: dict[str, str], parts: Sequence[dict[str, Any]], size: int
    ) -> None:
        request = {**upload, "MultipartUpload": {"Parts": [*parts]}}
        try:
            self.ask(key, lambda: self._client.complete_multipart_upload(**request))
        except MissingError:
            # The upload is gone: completed by our own first try, if the object is there.
            if self._state(key)[0] != size:
                raise

    def _abort(self, key: str, upload: dict[str, str]) -> None:
        """Throw away the parts, which no listing shows and which cost money for ever."""
        last = self.hearing(Stop(), deadline_s=15.0)
        with contextlib.suppress(JobError, MissingError):
            last.ask(key, lambda: self._client.abort_multipart_upload(**upload))

    def download(
        self, key: str, path: Path, *, size: int, sha256: str, tick: Tick = no_tick
    ) -> None:
        """Fetch a file in ranges, several at once, verified, and renamed when it is whole."""
        where = f"{self.uri}/{key}"
        with refusals(str(path)), atomic_writer(path) as writer:
            digest, found = hashlib.sha256(), 0
            for body in self._ranges(key, tick, expected=size):
                digest.update(body)
                found += writer.write(body)
            require_same(where, (size, sha256), (found, digest.hexdigest()))

    def sha256(self, key: str, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Read an object back in whole and return its size and sha256."""
        digest, size = hashlib.sha256(), 0
        for body in self._ranges(key, tick):
            digest.update(body)
            size += len(body)
        return size, digest.hexdigest()

    def _ranges(self, key: str, tick: Tick, expected: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes in order; of an object of another size than expected, none."""
        try:
            size, tag = self._state(key)
        except MissingError:
            raise missing(self.uri, key) from None
        if expected not in (None, size):
            require_same(f"{self.uri}/{key}", (expected or 0, "?"), (size, "?"))

        def fetch(offset: int) -> bytes:
            body = self._range(key, tag, offset, min(PART_BYTES, size - offset))
            tick(len(body))
            return body

        offsets = range(0, size, PART_BYTES)
        return ordered(self._pool, fetch, offsets, window=PARTS_AHEAD, stop=self.stop)

    def _range(self, key: str, tag: str, offset: int, size: int) -> bytes:
        request = {**self._at(key), "IfMatch": tag, "Range": f"bytes={offset}-{offset + size - 1}"}

        def read() -> bytes:
            body = _body(self._client.get_object(**request))
            if len(body) != size:
                raise TransientError(f"{len(body)} bytes came in place of {size}")
            return body

        try:
            return self.ask(key, read)
        except (MissingError, PreconditionError):
            what = "was replaced or deleted while it was read"
            raise JobError(ExitCode.NOT_PROVEN, f"{self.uri}/{key}", what, "start again") from None

    def _state(self, key: str) -> tuple[int, str]:
        answer = self.ask(key, lambda: self._client.head_object(**self._at(key)))
        return answer["ContentLength"], answer["ETag"]

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every key below ``prefix``."""
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self.ask(prefix, lambda: self._client.list_objects_v2(**request))
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                yield Entry(key, found["Size"], found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys; absent ones are no error."""

        def delete_one(key: str) -> None:
            # Not DeleteObjects: it needs a checksum that not all servers understand alike.
            with contextlib.suppress(MissingError):
                self.ask(key, lambda: self._client.delete_object(**self._at(key)))

        deleted = ordered(self._pool, delete_one, keys, window=REQUESTS_AT_ONCE, stop=self.stop)
        deque(deleted, maxlen=0)

    def sweep(self, prefix: str, *, older_than_s: float = 0.0) -> None:
        """Abort multipart uploads that were begun below ``prefix`` and never ended."""
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        # The first thousand; the next sweep takes the others.
        page = self.ask(prefix, lambda: self._client.list_multipart_uploads(**request))
        for upload in page.get("Uploads", []):
            if upload["Initiated"].timestamp() <= time.time() - older_than_s:
                where = {"Bucket": self._bucket, "Key": upload["Key"]}
                self._abort(prefix, {**where, "UploadId": upload["UploadId"]})

    def _at(self, key: str) -> dict[str, str]:
        name = safe_relative(key, where=self.uri)
        return {"Bucket": self._bucket, "Key": f"{self._prefix}{name}"}

    def ask(self, key: str, call: Callable[[], T]) -> T:
        """Return ``call()``, with our retries, and with boto3's errors in our words."""
        where = f"{self.uri}/{key}"

        def once() -> T:
            try:
                return call()
            except self._errors as error:
                raise understood(error, where) from error

        return retry(where, once, stop=self.stop, deadline_s=self.deadline_s)


def _body(answer: dict[str, Any]) -> bytes:
    with contextlib.closing(answer["Body"]) as body:
        return bytes(body.read())
