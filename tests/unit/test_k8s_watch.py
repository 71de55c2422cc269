"""Asking again: while the server is away, and while it has just come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from job.errors import ExitCode, JobError
from k8s.refusals import CutError, ForbiddenError
from k8s.watch import until

CUT = CutError("server", "is away")
FORBIDDEN = ForbiddenError(ExitCode.NOT_ALLOWED, "server", "may not list jobs", "ask for it")


def _answers(*outcomes: JobError | str) -> Callable[[], str]:
    left = list(outcomes)

    def call() -> str:
        outcome = left.pop(0)
        if isinstance(outcome, JobError):
            raise outcome
        return outcome

    return call


def test_a_server_that_is_away_is_asked_again_and_may_forget_roles_at_first() -> None:
    """A restarted API server knows no Roles for some seconds: that is no refusal."""
    pauses: list[float] = []
    assert until(_answers(CUT, CUT, FORBIDDEN, "there"), wait=pauses.append) == "there"
    assert len(pauses) == 3
    # However long it was away.
    assert until(_answers(*[CUT] * 12, FORBIDDEN, "there"), wait=pauses.append) == "there"
    answers = _answers(FORBIDDEN, "there")
    assert until(answers, wait=pauses.append, allowed_before=True) == "there"


def test_a_refusal_is_a_refusal() -> None:
    """What was never allowed is not asked again; what stays refused is given up after a while."""
    pauses: list[float] = []
    with pytest.raises(ForbiddenError):
        until(_answers(FORBIDDEN, "there"), wait=pauses.append)
    assert pauses == []
    with pytest.raises(ForbiddenError):
        until(_answers(CUT, *[FORBIDDEN] * 50), wait=pauses.append)
    assert sum(pauses) < 60
    with pytest.raises(CutError):
        until(_answers(*[CUT] * 50), wait=pauses.append, away_s=20.0)
