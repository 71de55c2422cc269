"""What an API server's refusals mean to a person: the verb, the resource, the mend."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from job.errors import ExitCode, JobError


class NotFoundError(JobError):
    """The object is not there, or no longer."""

    def __init__(self, where: str) -> None:
        do = "see `lora-job list`; somebody may have deleted it just now"
        super().__init__(ExitCode.NOT_FOUND, where, "it is not there", do)


class AlreadyExistsError(JobError):
    """An object of this name is there already."""

    def __init__(self, where: str) -> None:
        super().__init__(ExitCode.TAKEN, where, "there is one of this name already", "repeat it")


class ForbiddenError(JobError):
    """The Role does not hold this verb on this resource."""


class GoneError(JobError):
    """The resource version is too old (410): list anew."""

    def __init__(self) -> None:
        what = "the list changed faster than it was read"
        super().__init__(ExitCode.STORE, "the cluster", what, "repeat it")


class CutError(JobError):
    """The server can't be reached, the connection broke, or it is busy: it may pass."""

    def __init__(self, where: str, what: str) -> None:
        do = "see the kubeconfig's address, the VPN, and whether the cluster runs, then repeat"
        super().__init__(ExitCode.STORE, where, what[:300], do)


def raise_refusal(
    status: int, reason: str | None, message: str, deed: str, namespace: str, where: str
) -> None:
    """Raise what a status of 400 or more means; ``deed`` is the verb and resource it was for."""
    if status == 401:
        do = "log in again (the kubeconfig's user), then repeat"
        raise JobError(ExitCode.NOT_ALLOWED, where, "the credentials are expired or refused", do)
    if status == 403:
        raise _forbidden(message, deed, namespace, where)
    if status == 404 and "namespaces" in message:
        do = "create it: kubectl apply -k k8s/manifests/setup, or name another one"
        raise JobError(ExitCode.NOT_FOUND, where, f"there is no namespace {namespace}", do)
    if status == 404:
        raise NotFoundError(where)
    if status == 409 and reason == "AlreadyExists":
        raise AlreadyExistsError(where)
    if status == 410:
        raise GoneError
    # A log of a container that has not started yet is a 400 that passes.
    if status in (429, 500, 502, 503, 504) or (status == 400 and "log" in where):
        raise CutError(where, message)
    raise JobError(ExitCode.CONFIG, where, f"the server refused ({status}): {message}", "mend it")


def _forbidden(message: str, deed: str, namespace: str, where: str) -> JobError:
    # "exceeded quota: …", "failed quota: …"; a Role that lacks resourcequotas says that word too.
    if re.search(r"\b(exceeded|failed) quota\b", message):
        return JobError(ExitCode.NOT_ALLOWED, where, message, "ask for less, or for more quota")
    # An authorizer says "User … cannot create resource …"; webhooks and dying namespaces do not.
    if " cannot " not in message:
        do = "as it says, or ask who made that rule"
        return JobError(ExitCode.NOT_ALLOWED, where, message, do)
    if deed.endswith(("nodes", "priorityclasses")):
        do = "it goes without; k8s/manifests/setup/look has a ClusterRole for it"
        return ForbiddenError(ExitCode.NOT_ALLOWED, where, f"may not {deed}", do)
    what = f"may not {deed} in namespace {namespace}"
    do = f"see that this namespace is meant, or add to your Role (k8s/manifests/setup): {deed}"
    return ForbiddenError(ExitCode.NOT_ALLOWED, where, what, do)


def require_name(name: str) -> None:
    """Refuse a name that no object can have: a path with a slash in it asks for something else.

    Raises:
        JobError: 66.
    """
    if name and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
        what = "there is no such run: names have a-z, 0-9 and -"
        raise JobError(ExitCode.NOT_FOUND, name, what, "see `lora-job list`")


def warnings_in(headers: Iterable[str]) -> list[str]:
    """Return the texts of Warning headers, with the quotes in them (RFC 7234, 5.5)."""
    found = [re.search(r'"((?:[^"\\]|\\.)*)"', header) for header in headers]
    return [re.sub(r"\\(.)", r"\1", text[1]) for text in found if text]


@contextlib.contextmanager
def cut_is_told(host: str) -> Iterator[None]:
    """Turn the ways in which a server can't be reached, or goes away, into a CutError."""
    import urllib3

    try:
        yield
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise CutError(host, f"can't be reached: {str(reason).split(': ', 1)[-1]}") from error
