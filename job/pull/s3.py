"""``s3://bucket/key`` or ``s3://bucket/prefix``: an object, or all objects below a prefix."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

from job.pull.pin import Hashes, Pin, PinnedFile, SourceKind, not_found
from job.pull.select import selected
from job.pull.transfer import Opener, RestartError
from job.retry import retry
from job.stop import Stop
from job.store.s3_client import MissingError, PreconditionError, make_client, s3_errors
from job.store.transfer import each

STREAM_BYTES = 1 << 20


@contextlib.contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        with s3_errors(where):
            yield
    except MissingError as error:
        do = "see bucket, key and AWS_ENDPOINT_URL"
        raise not_found(where, f"is not there ({error})", do) from error
    except PreconditionError as error:
        what = "has changed since this run began"
        raise not_found(where, what, "put it back, or start a new run") from error


def parse(uri: str) -> tuple[str, str]:
    """Return bucket and key (or prefix) of ``s3://bucket/key``."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def resolve(uri: str, kind: SourceKind, hashes: Hashes) -> Pin:
    """Pin each object by its version id if the bucket keeps versions, and by its ETag anyhow.

    Raises:
        JobError: 66 nothing there, 77 not allowed, 74 unreachable.
    """

    def ask() -> Pin:
        with _errors(uri):
            return _resolve(uri, kind, make_client(), hashes.stop)

    return retry(uri, ask, stop=hashes.stop)


def _resolve(uri: str, kind: SourceKind, s3: Any, stop: Stop) -> Pin:
    bucket, key = parse(uri)
    keys = _listed(s3, bucket, key, stop)
    if not keys:
        raise not_found(uri, "holds no objects", "see bucket, prefix and AWS_ENDPOINT_URL")
    names = selected(keys, kind, where=uri)
    files = each(lambda name, _: _pinned(s3, bucket, keys[name]), names, stop=stop)
    return Pin(uri=uri, files=dict(zip(names, files, strict=True)))


def _listed(s3: Any, bucket: str, key: str, stop: Stop) -> dict[str, str]:
    """Return name → key: the one object, or those below the prefix."""
    prefix = key if key.endswith("/") else f"{key}/"
    found: dict[str, str] = {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
        stop.check()
        for item in page.get("Contents", []):
            if item["Key"] == key:
                return {key.rpartition("/")[2]: key}
            if item["Key"].startswith(prefix) and not item["Key"].endswith("/"):
                found[item["Key"].removeprefix(prefix)] = item["Key"]
    return found


def _pinned(s3: Any, bucket: str, key: str) -> PinnedFile:
    head = s3.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    etag = head["ETag"].strip('"')
    checksum = head.get("ChecksumSHA256", "")
    # Of a multipart upload, S3 may give a checksum of checksums; its ETag is no MD5 then, nor is
    # it where the object is encrypted with a key of KMS.
    whole = checksum and "-" not in checksum and head.get("ChecksumType") != "COMPOSITE"
    plain = "kms" not in head.get("ServerSideEncryption", "") and len(etag) == 32
    return PinnedFile(
        size=head["ContentLength"],
        sha256=base64.b64decode(checksum).hex() if whole else None,
        md5=etag if plain and "-" not in etag else None,
        etag=head["ETag"],
        version_id=head.get("VersionId"),
    )


def place(pin: Pin) -> Opener:
    """Return how to stream one of the pinned objects."""
    bucket, key = parse(pin.uri)
    s3 = make_client()
    single = len(pin.files) == 1 and key.rpartition("/")[2] in pin.files

    @contextlib.contextmanager
    def open_at(name: str, pinned: PinnedFile, offset: int) -> Iterator[Iterator[bytes]]:
        at = key if single else f"{key.rstrip('/')}/{name}"
        asked: dict[str, Any] = {"Bucket": bucket, "Key": at}
        if pinned.version_id not in (None, "null"):
            asked["VersionId"] = pinned.version_id
        else:
            asked["IfMatch"] = pinned.etag
        if offset:
            asked["Range"] = f"bytes={offset}-"
        with _errors(f"s3://{bucket}/{at}"):
            answer = s3.get_object(**asked)
            if offset and "ContentRange" not in answer:
                raise RestartError
            with contextlib.closing(answer["Body"]) as body:
                yield body.iter_chunks(STREAM_BYTES)

    return open_at
