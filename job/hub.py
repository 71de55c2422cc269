"""Copies for the Hugging Face Hub: one commit a repository, compared, verified, never repeated."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from job.config import HubSection
from job.errors import ExitCode, JobError
from job.files import list_files, sha256_file
from job.retry import TransientError, retry
from job.stop import Stop
from job.store.transfer import each

log = structlog.get_logger()

T = TypeVar("T")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".bin.index.json")
CARD = "README.md"
SILENT_S = 60.0
"""A server that says nothing for so long is asked again."""
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


def api() -> Any:
    """Return a client of the Hub that ``HF_ENDPOINT`` names, with the environment's token."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    limit_requests()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="lora-job")


@functools.cache
def limit_requests() -> None:
    """Give every request of the client an end: by itself it waits for an answer for ever.

    On ``send``, because some of its calls say ``timeout=None`` themselves.
    """
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limited_client() -> Any:
        client = default_client_factory()
        send = client.send

        def limited(request: Any, **how: Any) -> Any:
            if not any((request.extensions.get("timeout") or {}).values()):
                limit = httpx2.Timeout(SILENT_S).as_dict()
                request.extensions = {**request.extensions, "timeout": limit}
            return send(request, **how)

        client.send = limited
        return client

    set_client_factory(limited_client)


@contextlib.contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn the client's exceptions into a JobError, or a TransientError if it may pass."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        what = "needs the network, and HF_HUB_OFFLINE is set"
        raise JobError(ExitCode.NOT_FOUND, where, what, "unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        raise _explained(where, error) from error
    except httpx2.HTTPError as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        # The client's word for a card that the Hub does not take.
        if CARD not in str(error):
            raise
        what, do = " ".join(str(error).split()), "mend the job's sources, or leave out publish.hub"
        raise JobError(ExitCode.NOT_PROVEN, f"{where}/{CARD}", what, do) from error
    except RuntimeError as error:
        # The client wraps what an upload's thread raised: Error while uploading '…' to the Hub.
        if not isinstance(error.__cause__, httpx2.HTTPError):
            raise
        with hub_errors(where):
            raise error.__cause__ from error


def _explained(where: str, error: Any) -> Exception:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    if status == 412:
        return TransientError("the repository has a newer commit")
    if status in BUSY:
        wait_s = _reset_s(error.response.headers)
        return TransientError(f"the Hub answered {status}", retry_after_s=wait_s)
    said = " ".join(str(error.server_message or "").split()) or f"answer {status}"
    code, what, do = ExitCode.STORE, f"the Hub refused: {said}", "see the Hub's answer"
    if isinstance(error, GatedRepoError):
        code, what = ExitCode.NOT_ALLOWED, "is gated, and we are not let in"
        do = "accept its terms on its page, and set HF_TOKEN to a token that may read it"
    elif isinstance(error, RevisionNotFoundError):
        code, what = ExitCode.NOT_FOUND, "has no such revision"
        do = "name a branch, tag or commit that it has"
    elif status == 404 or isinstance(error, RepositoryNotFoundError):
        code, what = ExitCode.NOT_FOUND, "is not on the Hub, or is private"
        do = "see the name; if it is private, set HF_TOKEN"
    elif status in (401, 403):
        code, do = ExitCode.NOT_ALLOWED, "set HF_TOKEN to a token that may do this"
    return JobError(code, where, what, do)


def _reset_s(headers: Any) -> float:
    """Return for how many seconds the server asks us to wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else 0.0


def interruptible(call: Callable[[], T], *, stop: Stop) -> T:
    """Return ``call()``, but raise as soon as a stop is asked for, whatever it waits for.

    The client sleeps inside its own calls (a 429 may ask for minutes), where it hears nothing. It
    is left behind in its thread: what it may still do is one whole commit, or nothing.
    """
    return each(lambda _, __: call(), [None], stop=stop, daemon=True)[0]


def check_access(section: HubSection, *, stop: Stop) -> None:
    """Make sure, before any GPU time, that a token is there and the Hub takes it.

    Raises:
        JobError: 77 if not.
    """
    if section.adapter is None and section.merged is None:
        return

    def ask() -> None:
        from huggingface_hub import get_token

        if get_token() is None:
            what, do = "needs a token, and there is none", "set HF_TOKEN to a token that may write"
            raise JobError(ExitCode.NOT_ALLOWED, "publish.hub", what, do)
        with hub_errors("publish.hub"):
            me = api().whoami()
        if (me.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            what, do = "its token may only read", "set HF_TOKEN to a token that may write"
            raise JobError(ExitCode.NOT_ALLOWED, "publish.hub", what, do)

    retry("publish.hub", lambda: interruptible(ask, stop=stop), stop=stop)


def publish_folder(repo_id: str, folder: Path, *, private: bool, message: str, stop: Stop) -> str:
    """Bring a model repository's head to the files of ``folder``, in one commit; return it.

    What is there already is not committed again, so that a lost answer to our own success, or a
    second attempt, ends with the same commit. Weights of an earlier version that this one lacks
    are removed; other people's files stay.

    Raises:
        JobError: 70 if the Hub does not hold what was sent, 74 past the deadline, 77 not allowed.
    """
    where = f"hf://{repo_id}"
    files = {name: _Local(folder / name, stop) for name in list_files(folder)}

    def attempt() -> str:
        with hub_errors(where):
            return _one_commit(repo_id, files, private=private, message=message)

    # A head that moves all the time ends at the deadline, like a busy server.
    commit = retry(where, lambda: interruptible(attempt, stop=stop), stop=stop)
    verify = partial(_verify, repo_id, commit, files)
    retry(where, lambda: interruptible(verify, stop=stop), stop=stop)
    log.info("hub_published", repository=repo_id, commit=commit, num_files=len(files))
    return commit


class _Local:
    """A file to publish, and its size and sha256."""

    def __init__(self, path: Path, stop: Stop) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.sha256 = sha256_file(path, tick=stop.check)

    def equals(self, remote: Any) -> bool:
        """Whether the Hub's tree entry is this file."""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return bool(remote.lfs.sha256 == self.sha256)
        body = b"blob %d\0" % self.size + self.path.read_bytes()
        return bool(remote.blob_id == hashlib.sha1(body, usedforsecurity=False).hexdigest())


def tree(repo_id: str, commit: str, *, repo_type: str = "model") -> dict[str, Any]:
    """Return the Hub's entry of each file of a commit."""
    entries = api().list_repo_tree(repo_id, repo_type=repo_type, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _one_commit(repo_id: str, files: dict[str, _Local], *, private: bool, message: str) -> str:
    """Compare with the head, upload what differs, commit upon that head; return the new head."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    hub = api()
    hub.create_repo(repo_id, private=private, exist_ok=True)
    head = str(hub.repo_info(repo_id, revision="main").sha)
    there = tree(repo_id, head)
    changed = {name: file for name, file in files.items() if not file.equals(there.get(name))}
    stale = [name for name in there if name.endswith(WEIGHTS) and name not in files]
    if not changed and not stale:
        return head
    # Operations remember a try that failed (uploaded, ignored): each try gets new ones.
    adds = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=f.path) for n, f in changed.items()]
    for add in adds:
        add.upload_info.sha256 = bytes.fromhex(files[add.path_in_repo].sha256)
    hub.preupload_lfs_files(repo_id, additions=adds, free_memory=False)
    commit = hub.create_commit(
        repo_id,
        operations=[*adds, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=message,
        parent_commit=head,
    )
    return str(commit.oid)


def _verify(repo_id: str, commit: str, files: dict[str, _Local]) -> None:
    where = f"hf://{repo_id}@{commit}"
    with hub_errors(where):
        there = tree(repo_id, commit)
    wrong = [name for name, file in files.items() if not file.equals(there.get(name))]
    if wrong:
        what = f"the Hub holds other bytes than were sent: {', '.join(wrong[:3])}"
        do = "publish again; the copy in the store is whole"
        raise JobError(ExitCode.NOT_PROVEN, where, what, do)
