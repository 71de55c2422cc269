"""Whole files or none, safe names, artifacts that are reused, retries that end."""

import os
import time
from pathlib import Path

import pytest

from job.artifacts import Artifact, reuse
from job.errors import ExitCode, JobError
from job.files import atomic_writer, fingerprint, safe_relative, sha256_file, write_json
from job.retry import TransientError, retry
from job.stop import Stop, preempted


class Made(Artifact):
    """A stage's result, for these tests."""

    value: int


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Nothing half-written, and no litter beside it."""
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def interrupted() -> None:
        with atomic_writer(path) as handle:
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == '{\n  "old": true\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_written_file_can_be_read_by_other_users(tmp_path: Path) -> None:
    """Another user's pod reads what this one wrote."""
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "a/../../b", "a\\b", "a\0b", "", ".", "a//b", "a/./b", "a\nb"]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str) -> None:
    """Manifests come from elsewhere: their names may only lie inside."""
    with pytest.raises(JobError) as caught:
        safe_relative(name, where="manifest")
    assert caught.value.code is ExitCode.NOT_PROVEN


def test_a_plain_name_is_kept() -> None:
    """Folders and dots inside names are fine."""
    assert str(safe_relative("adapter/a..b.json", where="manifest")) == "adapter/a..b.json"


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    """The digest of 'abc' stands in FIPS 180-2."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected


def test_a_finished_artifact_is_reused_and_a_changed_one_made_anew(tmp_path: Path) -> None:
    """Same fingerprint: not made again. Another one: made, and the old one is gone."""
    calls = []

    def make(folder: Path) -> Made:
        calls.append(folder)
        (folder / f"file-{len(calls)}").touch()
        return Made(folder=folder, value=len(calls))

    stage = tmp_path / "train"
    first = reuse(stage, fingerprint(1), Made, make, stage="train")
    again = reuse(stage, fingerprint(1), Made, make, stage="train")
    other = reuse(stage, fingerprint(2), Made, make, stage="train")
    assert (first.value, again.value, other.value) == (1, 1, 2)
    assert again.folder == stage
    assert not (stage / "file-1").exists()
    assert (stage / "file-2").exists()


def test_an_interrupted_stage_goes_on_where_it_was_only_for_the_same_inputs(
    tmp_path: Path,
) -> None:
    """What lies in .partial is kept for the same fingerprint, and thrown away for another."""
    stage = tmp_path / "merge"

    def die(folder: Path) -> Made:
        (folder / "shard-1").touch()
        raise KeyboardInterrupt

    def seen(folder: Path) -> Made:
        return Made(folder=folder, value=int((folder / "shard-1").exists()))

    for mark, expected in ((fingerprint(1), 1), (fingerprint(2), 0)):
        with pytest.raises(KeyboardInterrupt):
            reuse(stage, fingerprint(1), Made, die, stage="merge")
        assert not stage.exists()
        assert reuse(stage, mark, Made, seen, stage="merge").value == expected
        for path in stage.iterdir():
            path.unlink()
        stage.rmdir()


def test_a_retry_ends_with_success_or_with_74() -> None:
    """What passes is tried again; what does not is code 74 at the deadline."""
    failures = iter([True, True, False])

    def flaky() -> str:
        if next(failures):
            raise TransientError("busy")
        return "done"

    def dead() -> str:
        raise TransientError("refused")

    assert retry("server", flaky, stop=Stop()) == "done"
    with pytest.raises(JobError) as caught:
        retry("server", dead, stop=Stop(patience_s=0.3))
    assert caught.value.code is ExitCode.STORE


def test_a_stop_ends_a_wait_at_once() -> None:
    """A retry that would wait for long hears the signal."""
    stop = Stop()

    def busy() -> None:
        stop.request(preempted("SIGTERM"))
        raise TransientError("busy", retry_after_s=60)

    began = time.monotonic()
    with pytest.raises(JobError) as caught:
        retry("server", busy, stop=stop)
    assert caught.value.code is ExitCode.PREEMPTED
    assert time.monotonic() - began < 5


def test_a_fence_outranks_a_signal() -> None:
    """A fenced attempt must not say that its checkpoint is the durable one."""
    stop = Stop()
    stop.request(preempted("SIGTERM"))
    stop.request(JobError(ExitCode.FENCED, "run", "fenced", "nothing"))
    stop.request(preempted("SIGTERM"))
    with pytest.raises(JobError) as caught:
        stop.check()
    assert caught.value.code is ExitCode.FENCED
