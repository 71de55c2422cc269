"""Copies on the Hub: one commit a repository, whatever happens on the way."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hubserver
import pytest
import sources
from hubserver import Fault, Hub

from job.config import HubSection
from job.errors import ExitCode, JobError
from job.hub import check_access, publish_folder
from job.stop import Stop, preempted

REPO = "org/adapter"
FILES = {
    "README.md": b"---\nlibrary_name: peft\n---\n# Hello\n",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": sources.safetensors(9000),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hubserver.hub_server() as server:
        hubserver.hub_environment(server, monkeypatch)
        monkeypatch.setattr("job.retry.FIRST_WAIT_S", 0.01)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sources.write_files(tmp_path / "adapter", FILES)


def published(folder: Path, stop: Stop | None = None, **more: Any) -> str:
    options: dict[str, Any] = {"private": True, "message": "tiny v1", **more}
    return publish_folder(REPO, folder, stop=stop or Stop(), **options)


def num_commits(hub: Hub) -> int:
    """Return how many commits were made after the repository's first."""
    return len(hub.repos[f"models/{REPO}"].commits) - 1


def test_a_folder_becomes_one_commit(hub: Hub, folder: Path) -> None:
    """A new private repository, all files in one commit, and the commit is returned."""
    commit = published(folder)
    repo = hub.repos[f"models/{REPO}"]
    assert repo.private
    assert num_commits(hub) == 1
    assert repo.commits[-1][0] == commit
    assert {name: hub.files(REPO)[name] for name in FILES} == FILES


def test_what_is_there_is_not_published_again(hub: Hub, folder: Path) -> None:
    """A second attempt ends with the first one's commit, and sends nothing."""
    assert published(folder) == published(folder)
    assert num_commits(hub) == 1
    assert hub.count("PUT /lfs/") == 1


def test_a_lost_answer_to_our_own_commit_is_success(hub: Hub, folder: Path) -> None:
    """The commit was stored, the answer never came: found at the head, not made twice."""
    hub.faults = [Fault("POST .*/commit/", "lost")]
    commit = published(folder)
    assert num_commits(hub) == 1
    assert hub.repos[f"models/{REPO}"].commits[-1][0] == commit
    assert hub.count("POST .*/commit/") == 1


def test_a_head_that_moved_is_built_upon(hub: Hub, folder: Path) -> None:
    """Somebody commits between our look and our commit: 412, and the next try keeps theirs."""
    published(folder)
    (folder / "adapter_config.json").write_bytes(b'{"r": 8}')

    def meddle() -> None:
        hub.repos[f"models/{REPO}"].commit({**hub.files(REPO), "notes.txt": b"mine"})

    hub.faults = [Fault("POST .*/commit/", "none", before=meddle)]
    published(folder)
    assert hub.files(REPO)["notes.txt"] == b"mine"
    assert hub.files(REPO)["adapter_config.json"] == b'{"r": 8}'
    assert num_commits(hub) == 3
    assert hub.count("POST .*/commit/") == 3


def test_too_many_requests_wait_until_the_reset(hub: Hub, folder: Path) -> None:
    """429 on the commit waits as long as the Hub's header says, then there is one commit."""
    headers = {"RateLimit": '"api";r=0;t=1'}
    hub.faults = [Fault("POST .*/commit/", "status", status=429, headers=headers)]
    began = time.monotonic()
    published(folder)
    assert time.monotonic() - began >= 1
    assert num_commits(hub) == 1


def test_a_stop_ends_a_wait_inside_the_client(hub: Hub, folder: Path) -> None:
    """The client sleeps out a 429 of its own for minutes; SIGTERM is heard within a second."""
    headers = {"RateLimit": '"api";r=0;t=300'}
    stop = Stop()
    hub.faults = [
        Fault(
            "preupload",
            "status",
            status=429,
            headers=headers,
            times=9,
            before=lambda: threading.Timer(0.3, stop.request, [preempted("SIGTERM")]).start(),
        )
    ]
    began = time.monotonic()
    with pytest.raises(JobError) as caught:
        published(folder, stop)
    assert caught.value.code is ExitCode.PREEMPTED
    assert time.monotonic() - began < 10
    assert num_commits(hub) == 0


def test_old_weights_go_and_others_files_stay(hub: Hub, folder: Path) -> None:
    """A shard of an earlier version is removed in the same commit; a picture is not."""
    old = {"model-00002-of-00002.safetensors": sources.safetensors(), "picture.png": b"png"}
    hub.add(REPO, old)
    published(folder)
    assert set(hub.files(REPO)) == {*FILES, "picture.png"}
    assert num_commits(hub) == 1


def test_bytes_that_differ_on_the_hub_are_not_proven(hub: Hub, folder: Path) -> None:
    """The tree's sha256 is compared with what was sent: code 70."""
    digest = hashlib.sha256(FILES["adapter_model.safetensors"]).hexdigest()

    def rot() -> None:
        body = hub.lfs[digest]
        hub.lfs[digest] = bytes([body[0] ^ 1]) + body[1:]

    hub.faults = [Fault("POST .*/commit/", "none", before=rot)]
    with pytest.raises(JobError) as caught:
        published(folder)
    assert caught.value.code is ExitCode.NOT_PROVEN
    assert "adapter_model.safetensors" in str(caught.value)


def test_a_token_that_may_not_write_is_not_allowed(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's refusal is code 77 in one line, without the token in it."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(JobError) as caught:
        published(folder)
    assert caught.value.code is ExitCode.NOT_ALLOWED
    assert "\n" not in str(caught.value)
    assert "hf_canary" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_access_is_checked_before_any_work(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    """No token, or one that the Hub does not take, is code 77 at the start."""
    hubserver.hub_environment(hub, monkeypatch, token=token)
    with pytest.raises(JobError) as caught:
        check_access(HubSection(adapter=REPO), stop=Stop())
    assert caught.value.code is ExitCode.NOT_ALLOWED


def test_a_token_that_may_only_read_is_told_at_the_start(hub: Hub) -> None:
    """And not after a night of training."""
    hub.role = "read"
    with pytest.raises(JobError, match="may only read") as caught:
        check_access(HubSection(adapter=REPO), stop=Stop())
    assert caught.value.code is ExitCode.NOT_ALLOWED


def test_a_hub_that_accepts_and_never_answers_is_74(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself would wait for ever, and the pod with its GPU."""
    monkeypatch.setattr("job.hub.SILENT_S", 0.2)
    hub.faults = [Fault("GET /api/whoami", "hold", times=9)]
    with pytest.raises(JobError, match="ReadTimeout") as caught:
        check_access(HubSection(adapter=REPO), stop=Stop(patience_s=0.5))
    assert caught.value.code is ExitCode.STORE


def test_a_job_without_the_hub_asks_it_nothing(hub: Hub) -> None:
    """No repository in the job file, no request."""
    check_access(HubSection(), stop=Stop())
    assert hub.requests == []


def test_a_busy_upload_is_tried_again(hub: Hub, folder: Path) -> None:
    """A part that the storage refuses for a moment does not end the publish."""
    hub.faults = [Fault("PUT /lfs/", "status")]
    published(folder)
    assert num_commits(hub) == 1


def test_a_card_that_the_hub_refuses_is_one_line(hub: Hub, folder: Path) -> None:
    """The Hub's word about the front matter, not a traceback, and no commit."""
    (folder / "README.md").write_bytes(b"no front matter")
    with pytest.raises(JobError, match=r"README\.md") as caught:
        published(folder)
    assert caught.value.code is ExitCode.NOT_PROVEN
    assert "\n" not in str(caught.value)
    assert num_commits(hub) == 0
