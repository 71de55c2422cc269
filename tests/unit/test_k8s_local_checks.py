"""What the check finds here, and what of it stops a submission."""

from __future__ import annotations

from typing import Any

import pytest

from job.config import JobConfig, parse
from job.errors import JobError
from job.stop import Stop
from k8s.local_checks import check_locally

JOB = parse(
    'name: n\ndevice: cuda\nstore: s3://b/p\nmodel: {source: "hf://a/b"}\ndata: {source: "hf://a/c"}',
    JobConfig,
    where="job.yaml",
)
POD = {"containers": [{"resources": {"requests": {"ephemeral-storage": "100Gi"}}}]}


def _fault(check: str, code: int) -> dict[str, Any]:
    return {"check": check, "ok": False, "code": code, "where": check, "what": "w", "do": "d"}


def _checked(monkeypatch: pytest.MonkeyPatch, **report: Any) -> list[str]:
    said: list[str] = []
    found = {"checks": [{"check": "model", "ok": True}], **report}
    monkeypatch.setattr("job.check.check", lambda *_, **__: found)
    check_locally(JOB, POD, stop=Stop(), say=said.append)
    return said


def test_bad_data_stops_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the data's own code, before anything is created."""
    with pytest.raises(JobError) as caught:
        _checked(monkeypatch, checks=[_fault("rows", 65)])
    assert caught.value.code == 65


def test_credentials_that_only_the_cluster_has_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in a Secret there: not allowed to look, from here."""
    (said,) = _checked(monkeypatch, checks=[_fault("store", 77)])
    assert "not allowed to look" in said
    with pytest.raises(JobError):
        _checked(monkeypatch, checks=[_fault("model", 77)])


def test_a_disk_request_below_the_estimate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figure to set."""
    assert _checked(monkeypatch, disk={"total": 90 << 30}) == []
    with pytest.raises(JobError, match="set it to 132Gi") as caught:
        _checked(monkeypatch, disk={"total": 120 << 30})
    assert caught.value.code == 78


def test_more_memory_than_an_h100_has_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is one."""
    (said,) = _checked(monkeypatch, memory={"total": 97e9})
    assert "about 97 GB" in said
