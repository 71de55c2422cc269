"""boto3 as we need it: its own retries off, short timeouts, and its errors said in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from job.errors import ExitCode, JobError
from job.retry import TransientError

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
"""A stop is heard between requests, so a server that says nothing may cost a stop this long."""
CONNECTIONS = 32

MISSING = {"NoSuchKey", "NotFound", "404", "NoSuchUpload", "NoSuchVersion"}
BUSY = {
    "409", "429", "500", "502", "503", "504", "BandwidthLimitExceeded", "ConditionalRequestConflict",
    "ConflictException", "InternalError", "OperationAborted", "RequestLimitExceeded",
    "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests",
}  # fmt: skip
SERVER_FAULTS = set(range(500, 600)) - {501}
"""All but NotImplemented, which stays so however often it is asked."""
REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}


class MissingError(Exception):
    """There is no such object (or upload)."""


class PreconditionError(Exception):
    """If-Match or If-None-Match did not hold."""


def make_client() -> Any:
    """Return a boto3 client made from the environment, AWS_ENDPOINT_URL included.

    Checksums beyond what S3 requires are left to AWS: others refuse or ignore them, and what
    counts is hashed by us, end to end.

    Raises:
        JobError: 77 or 78, if the environment's AWS settings are no good.
    """
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        # A session of our own: the default one keeps the first credentials that it met.
        session = boto3.session.Session()
        client = session.client("s3", config=_config("when_supported"))
        if not (urlsplit(client.meta.endpoint_url).hostname or "").endswith("amazonaws.com"):
            client = session.client("s3", config=_config("when_required"))
    except (BotoCoreError, ValueError) as error:
        what = f"the AWS settings are wrong: {error}"
        do = "mend AWS_ENDPOINT_URL, AWS_PROFILE or AWS_DEFAULT_REGION"
        raise JobError(ExitCode.CONFIG, "s3", what, do) from error
    return client


def _config(checksums: str) -> Any:
    from botocore.config import Config

    return Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=CONNECTIONS,
        # One retry layer: ours (stacked layers reach dozens of tries, and hear no stop).
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        # The body's sha256 in the signature would be a pass over bytes that we read back anyway.
        s3={"payload_signing_enabled": False},
        tcp_keepalive=True,
    )


@contextlib.contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """Turn what boto3 raises into one of the two above, a TransientError, or a JobError."""
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (ClientError, BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
        raise _understood(error, where) from error


def _understood(error: Exception, where: str) -> Exception:
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        return _refused(error.response, where)
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.TokenRetrievalError
        | exceptions.UnauthorizedSSOTokenError,
    ):
        do = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role that has access"
        return JobError(ExitCode.NOT_ALLOWED, where, f"no usable credentials ({error})", do)
    if isinstance(error, exceptions.ParamValidationError | exceptions.InvalidRegionError):
        return JobError(ExitCode.CONFIG, where, f"can't be asked for: {error}", "mend its name")
    return TransientError(f"{type(error).__name__}: {error}")


def _refused(answer: Mapping[str, Any], where: str) -> Exception:
    fault, meta = answer.get("Error", {}), answer.get("ResponseMetadata", {})
    code, status = str(fault.get("Code", "")), int(meta.get("HTTPStatusCode") or 0)
    said = f"{code}: {fault.get('Message', '')}".strip(": ") or f"HTTP {status}"
    if code in MISSING:
        return MissingError(said)
    if code in ("PreconditionFailed", "412"):
        return PreconditionError(said)
    if code not in FULL and (code in BUSY or status in (409, 429) or status in SERVER_FAULTS):
        return TransientError(said, retry_after_s=_seconds(meta.get("HTTPHeaders", {})))
    exit_code, what, do = _mistake(code, status)
    return JobError(exit_code, where, f"{what} ({said})", do)


def _mistake(code: str, status: int) -> tuple[ExitCode, str, str]:
    """Return what a person has to mend: exit code, what is wrong, and what to do."""
    if code == "NoSuchBucket":
        do = "create the bucket, or mend the store's name or AWS_ENDPOINT_URL"
        return ExitCode.NOT_FOUND, "the bucket does not exist", do
    if code in FULL:
        return ExitCode.OUT_OF_RESOURCES, "the store is full", "free some space there"
    if code == "RequestTimeTooSkewed":
        return ExitCode.NOT_ALLOWED, "this machine's clock is wrong", "set it (NTP), start again"
    if code in REGION or status in (301, 307):
        do = "set AWS_DEFAULT_REGION to the bucket's region"
        return ExitCode.CONFIG, "the bucket is in another region", do
    if status in (401, 403) or code in EXPIRED:
        do = "see that the credentials are right, not expired, and allowed to do this here"
        return ExitCode.NOT_ALLOWED, "refused", do
    return ExitCode.CONFIG, "the server refuses this request", "see `lora-job storage probe`"


def _seconds(headers: Mapping[str, str]) -> float:
    try:
        return min(60.0, float(headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
