"""What the check finds here, and what of it stops a submission."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config import JobConfig, parse
from job.errors import JobError
from job.stop import Stop
from k8s.local_checks import check_locally, local_findings, look

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


def test_doctor_tells_every_fault_of_this_machine_and_what_it_left_out() -> None:
    """One does not hide the next; without the extra it says so."""
    report = {"checks": [_fault("data", 66) | {"where": "x.jsonl"}, _fault("rows", 65)]}
    found = list(local_findings(report | {"disk": {"total": 120 << 30}}, JOB, POD))
    assert [one.state for one in found] == ["wrong"] * 3
    assert found[0].what == "x.jsonl: w"
    [left] = local_findings({"checks": [], "missing": "torch"}, JOB, POD)
    assert (left.state, left.what) == ("warning", "left out: torch is not installed")


def test_the_check_finds_a_file_and_a_package_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As doctor reports them."""
    text = f"name: n\ndevice: cpu\nstore: {tmp_path}/s\nmodel: {{source: 'package:nobody_has/x.gguf'}}\n"
    text += f"data: {{source: {tmp_path}/no.jsonl}}\n"
    monkeypatch.chdir(tmp_path)
    report = look(parse(text, JobConfig, where="job.yaml"), stop=Stop())
    found = {one.check: (one.code, one.state) for one in local_findings(report, JOB, POD)}
    assert found["model"] == found["data"] == (66, "wrong")
