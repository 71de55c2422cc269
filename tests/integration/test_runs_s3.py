"""Whole runs on a real S3 server: killed, frozen, doubled, published, fetched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import servers

from job.errors import ExitCode, JobError
from job.fetch import fetch
from job.progress import Progress
from job.stop import Stop
from job.store import base, open_store, runs
from job.store.runs import Attempt, take
from job.store.versions import move_channel, resolve, version_name, write_version

RUN = "demo-0123abcd"
BEGIN = """
import sys
from pathlib import Path
from job.errors import JobError
from job.progress import Progress
from job.stop import Stop
from job.store import open_store, runs
from job.store.runs import take

runs.LOOK_S = 0.1
root, folder = sys.argv[1], Path(sys.argv[2])
stop, progress = Stop(), Progress()
store = open_store(root, stop=stop)
try:
    attempt = take(store, "demo-0123abcd", owner="me", job_text=b"", stop=stop, progress=progress)
    print("taken", attempt.epoch, flush=True)
"""
END = """
except JobError as error:
    print(error, file=sys.stderr)
    sys.exit(int(error.code))
"""


def start(body: str, root: str, folder: Path) -> subprocess.Popen[str]:
    """Start an attempt in a process of its own, and wait until it has taken the run."""
    program = BEGIN + textwrap.indent(textwrap.dedent(body), "    ") + END
    command = [sys.executable, "-c", program, root, str(folder)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    say_until(child, "taken")
    return child


def say_until(child: subprocess.Popen[str], word: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(word):
            return line.strip()
    raise AssertionError(child.communicate()[1])


def take_here(root: str, owner: str = "me") -> Attempt:
    stop = Stop()
    store = open_store(root, stop=stop)
    return take(store, RUN, owner=owner, job_text=b"", stop=stop, progress=Progress())


def a_folder(folder: Path, size: int = 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(size))
    return folder


def test_a_zombie_that_wakes_late_is_fenced(s3_root: str, tmp_path: Path) -> None:
    """A frozen process whose run was taken over ends with 76, and its heir's work stands."""
    zombie = start(
        """
        while True:
            attempt.save_checkpoint(folder, 1)
            stop.wait(0.05)
            attempt._head["checkpoint"] = None
        """,
        s3_root,
        a_folder(tmp_path / "c"),
    )
    zombie.send_signal(signal.SIGSTOP)
    heir = take_here(s3_root)
    assert heir.epoch == 2
    heir.save_checkpoint(a_folder(tmp_path / "heir"), 7)
    zombie.send_signal(signal.SIGCONT)
    _, said = zombie.communicate(timeout=30)
    assert zombie.returncode == ExitCode.FENCED, said
    assert "attempt 2 took over from attempt 1" in said
    again = take_here(s3_root)
    assert again.restore_checkpoint(tmp_path / "back") == 7
    again.end({"code": 0})


def test_an_idle_zombie_learns_it_from_its_heartbeat(
    s3_root: str, tmp_path: Path, seaweed: servers.S3Server
) -> None:
    """Also an attempt that writes nothing is told, by its heartbeat, and stops with 76."""
    zombie = start(
        """
        number = 0
        while True:
            number += 1
            progress.enter(f"stage {number}")
            stop.wait(0.2)
        """,
        s3_root,
        tmp_path,
    )
    heir = take_here(s3_root)
    _, said = zombie.communicate(timeout=30)
    assert zombie.returncode == ExitCode.FENCED, said
    heir.end({"code": 0})


def test_a_killed_upload_costs_nothing(
    s3_root: str, tmp_path: Path, seaweed: servers.S3Server
) -> None:
    """SIGKILL amid a checkpoint: the one before is taken, and the orphan parts are swept."""
    folder = a_folder(tmp_path / "c", 36 << 20)
    child = start(
        """
        attempt.save_checkpoint(folder, 1)
        from job.store.s3 import S3Store
        S3Store._complete = lambda *_: (print("parts sent", flush=True), sys.stdin.read())
        attempt.save_checkpoint(folder, 2)
        """,
        s3_root,
        folder,
    )
    say_until(child, "parts sent")
    child.kill()
    child.communicate()
    heir = take_here(s3_root)
    import boto3

    client = boto3.client("s3", **seaweed.client_options())
    prefix = s3_root.removeprefix(f"s3://{seaweed.bucket}/")
    left = client.list_multipart_uploads(Bucket=seaweed.bucket, Prefix=prefix)
    assert left.get("Uploads", []) == []
    assert heir.restore_checkpoint(tmp_path / "back") == 1
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    heir.end({"code": 0})


def test_two_attempts_at_once(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that start together get epochs of their own; only the last one may write."""
    body = "stop.wait(60)"
    children = [start(body, s3_root, tmp_path) for _ in range(2)]
    last = take_here(s3_root)
    assert last.epoch == 3
    last.save_checkpoint(a_folder(tmp_path / "c"), 1)
    for child in children:
        child.kill()
        child.communicate()
    for name in ("LOOK_S", "SIGN_S", "HEARTBEAT_S"):
        monkeypatch.setattr(runs, name, 0.1)
    with pytest.raises(JobError) as caught:
        take_here(s3_root, "somebody else")
    assert caught.value.code is ExitCode.TAKEN
    last.end({"code": 0})


def test_from_take_to_fetch(s3_root: str, tmp_path: Path) -> None:
    """Published, pointed to, and fetched: byte for byte, through a real server."""
    attempt = take_here(s3_root)
    version = version_name(attempt.started, attempt.epoch, "0123abcd" * 8)
    folders = {"adapter": a_folder(tmp_path / "adapter", 20 << 20)}
    attempt.publishing(version)
    manifest = write_version(attempt, "demo", version, folders, {"seed": 0}, stop=Stop())
    order = (attempt.scheduled, attempt.epoch)
    assert move_channel(attempt.store, "demo", "nightly", version, order) == "moved"
    assert resolve(attempt.store, "demo", None) == version
    older = (order[0] - 1, 9)
    assert move_channel(attempt.store, "demo", "nightly", version, older) == "moved"
    attempt.end({"code": 0})
    report = fetch(f"{s3_root}/demo@nightly", tmp_path / "out", stop=Stop())
    assert report["size_bytes"] == manifest.size_bytes
    for name in manifest.files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_publisher_killed_anywhere_leaves_no_half_version(
    s3_root: str, seaweed: servers.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever request is the last: readers find no version, or a whole one that verifies."""
    folders = {"adapter": a_folder(tmp_path / "adapter", 6 << 20)}
    version = "20261120T010203Z-e1-0123abcd"
    monkeypatch.setattr(base, "PART_BYTES", 5 << 20)
    attempt = take_here(s3_root)
    with servers.faulty_proxy(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for last in range(30):
            whole = publish_until(proxy, last, attempt, s3_root, folders, version)
            monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
            target = tmp_path / f"out-{last}"
            if whole:
                fetch(f"{s3_root}/demo", target, stop=Stop())
                break
            with pytest.raises(JobError) as caught:
                fetch(f"{s3_root}/demo", target, stop=Stop())
            assert caught.value.code is ExitCode.NOT_FOUND
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert whole
        assert last >= 6
    attempt.end({"code": 0})


def publish_until(
    proxy: servers.Proxy, last: int, attempt: Attempt, root: str, folders: Any, version: str
) -> bool:
    """Publish until ``last`` requests have gone through; say whether all of it did."""
    lock, left = threading.Lock(), [last]

    def rule(method: str, path: str, headers: Any) -> str | None:
        with lock:
            left[0] -= 1
            return "403" if left[0] < 0 else None

    proxy.rule = rule
    present = attempt.store
    attempt.store = open_store(root, stop=Stop())
    try:
        write_version(attempt, "demo", version, folders, {}, stop=Stop())
    except JobError as error:
        if error.code is not ExitCode.NOT_ALLOWED:
            raise
        return False
    finally:
        attempt.store = present
    return True


def test_the_head_can_be_read_by_people(s3_root: str) -> None:
    """head.json has what `status` and `why` show, in plain JSON."""
    attempt = take_here(s3_root)
    found = attempt.store.get(f"_runs/{RUN}/head.json")
    assert found is not None
    head = json.loads(found.body)
    assert head["progress"] == {"stage": "start"}
    assert {"seq", "epoch", "owner", "heartbeat", "started", "state", "ends"} <= set(head)
    attempt.end({"code": 69, "stage": "train", "step": 3})
    found = attempt.store.get(f"_runs/{RUN}/head.json")
    assert found is not None
    assert json.loads(found.body)["ends"][0]["code"] == 69
