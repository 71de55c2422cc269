"""S3 as a store: conditional writes for small objects, parts at once for large ones.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.files import safe_relative
from job.stop import Stop
from job.store import base
from job.store.base import (
    MAX_SMALL_BYTES,
    PARTS_AHEAD,
    REQUESTS_AT_ONCE,
    Entry,
    Small,
    Store,
    Tick,
    missing,
    no_tick,
    too_large,
)
from job.store.s3_client import MissingError, PreconditionError, make_client, s3_errors
from job.store.transfer import ordered

MAX_PARTS = 9_000
"""S3 allows 10,000 parts: above 150 GB they grow."""


class S3Store(Store):
    """A tag is an ETag."""

    def __init__(self, uri: str, *, stop: Stop, single_writer: bool = False) -> None:
        super().__init__(uri.rstrip("/"), stop=stop, single_writer=single_writer)
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._bucket, self._prefix = bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client = make_client()

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

    def put(self, key: str, body: bytes) -> str:
        """Write a small object without a condition, and return its tag."""
        return self._put(key, body)

    def _put(self, key: str, body: bytes, **condition: str) -> str:
        request = {**self._at(key), "Body": body, **condition}
        return str(self.ask(key, lambda: self._client.put_object(**request))["ETag"])

    def _create(self, key: str, body: bytes) -> str | None:
        try:
            return self._put(key, body, IfNoneMatch="*")
        except PreconditionError:
            return None

    def _swap(self, key: str, body: bytes, tag: str) -> str | None:
        try:
            return self._put(key, body, IfMatch=tag)
        except (PreconditionError, MissingError):
            return None

    def upload(self, key: str, path: Path, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Send a file, in parts if it is large, and return its size and sha256."""
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > base.PART_BYTES:
                return size, self._upload_parts(key, handle.fileno(), size, tick)
            body = handle.read()
        self._put(key, body)
        tick(size)
        return size, hashlib.sha256(body).hexdigest()

    def _upload_parts(self, key: str, descriptor: int, size: int, tick: Tick) -> str:
        part_bytes = max(base.PART_BYTES, -(-size // MAX_PARTS))
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
            self._complete(key, upload, list(sent), size)
        except BaseException as error:
            self._abort(key, upload)
            if isinstance(error, MissingError):
                what = "its upload was thrown away by somebody else"
                raise JobError(ExitCode.STORE, f"{self.uri}/{key}", what, "start again") from error
            raise
        return digest.hexdigest()

    def _complete(
        self, key: str, upload: dict[str, str], parts: list[dict[str, Any]], size: int
    ) -> None:
        request = {**upload, "MultipartUpload": {"Parts": parts}}
        try:
            self.ask(key, lambda: self._client.complete_multipart_upload(**request))
        except MissingError:
            # The upload is gone: completed by our own first try, if the object is there.
            if self._head(key)[0] != size:
                raise

    def _abort(self, key: str, upload: dict[str, str]) -> None:
        """Throw away the parts, which no listing shows and which cost money for ever."""
        last = self.hearing(Stop(patience_s=15.0))
        with contextlib.suppress(JobError, MissingError):
            last.ask(key, lambda: self._client.abort_multipart_upload(**upload))

    def _head(self, key: str) -> tuple[int, str]:
        answer = self.ask(key, lambda: self._client.head_object(**self._at(key)))
        return answer["ContentLength"], answer["ETag"]

    def _state(self, key: str) -> tuple[int, str]:
        try:
            return self._head(key)
        except MissingError:
            raise missing(self.uri, key) from None

    def _range(self, key: str, tag: str, offset: int, size: int) -> bytes:
        span = {"IfMatch": tag, "Range": f"bytes={offset}-{offset + size - 1}"}
        try:
            with self._explained(key):
                return _body(self._client.get_object(**self._at(key), **span))
        except (MissingError, PreconditionError):
            what = "was replaced or deleted while it was read"
            raise JobError(ExitCode.NOT_PROVEN, f"{self.uri}/{key}", what, "start again") from None

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

    def _explained(self, where: str) -> AbstractContextManager[None]:
        return s3_errors(where)

    def _at(self, key: str) -> dict[str, str]:
        name = safe_relative(key, where=self.uri)
        return {"Bucket": self._bucket, "Key": f"{self._prefix}{name}"}


def _body(answer: dict[str, Any]) -> bytes:
    with contextlib.closing(answer["Body"]) as body:
        return bytes(body.read())
