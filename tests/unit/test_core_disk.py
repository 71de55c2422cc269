"""A run that passes its pod's share of the disk says so before the kubelet ends it without a word."""

from pathlib import Path

import pytest

from job import disk
from job.disk import used_bytes, within_share
from job.errors import ExitCode, JobError
from job.stop import Stop, preempted

MIB = 1 << 20


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of a pod that may have 1 MiB."""
    for name in ("work", "home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv(disk.LIMIT, str(MIB))
    return tmp_path / "work"


@pytest.mark.parametrize("where", ["work/deep", "home", "tmp"])
def test_files_beyond_the_share_end_the_run_with_71(
    work: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Wherever they are: with the figures, and the setting to change."""
    monkeypatch.setattr(disk, "PERIOD_S", 0.01)
    stop, folder = Stop(), work.parent / where
    folder.mkdir(exist_ok=True)
    (folder / "big").write_bytes(b"x" * 2 * MIB)
    with pytest.raises(JobError) as caught, within_share(work, stop):
        stop.wait(60)
    assert caught.value.code == ExitCode.OUT_OF_RESOURCES
    assert "2.1 MB are written, and the pod may have 1.0" in caught.value.what
    assert "raise ephemeral_storage" in caught.value.do


@pytest.mark.parametrize(("written", "code"), [(2 * MIB, 71), (MIB // 2, 75)])
def test_a_sigterm_because_of_the_disk_is_no_preemption(
    work: Path, written: int, code: int
) -> None:
    """The kubelet may look first: a run that it evicts would only be tried again."""
    stop = Stop()
    (work / "big").write_bytes(b"x" * written)
    stop.request(preempted("SIGTERM"))
    with pytest.raises(JobError) as caught, within_share(work, stop):
        stop.check()
    assert caught.value.code == code


def test_without_a_limit_nothing_is_looked_at(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On somebody's own machine."""
    monkeypatch.delenv(disk.LIMIT)
    monkeypatch.setattr(disk, "used_bytes", lambda _: pytest.fail("looked"))
    with pytest.raises(JobError, match="SIGTERM"), within_share(work, Stop()):
        raise preempted("SIGTERM")


def test_a_file_of_two_names_counts_once(tmp_path: Path) -> None:
    """As the kubelet's own measure does."""
    (tmp_path / "one").write_bytes(b"x" * MIB)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert MIB <= used_bytes([tmp_path, tmp_path]) < 1.5 * MIB
