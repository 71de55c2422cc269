"""How long a pod may take from SIGTERM to SIGKILL: what a save took when it was last measured."""

from __future__ import annotations

import math
from collections.abc import Callable

from job.config import JobConfig
from job.errors import JobError
from k8s.config import ClusterConfig
from k8s.render import default_grace_s
from k8s.stored import measured_save_s

MARGIN = 1.5
"""A slow store, the last words, and libraries that take their time to leave."""
SAVED_BYTES_PER_S = 50e6
"""What a pod's one upload brings at least, where nothing was measured."""


def with_grace(
    job: JobConfig,
    settings: ClusterConfig,
    run: str,
    *,
    say: Callable[[str], None],
    checkpoint_bytes: int = 0,
) -> ClusterConfig:
    """Return the cluster file with the grace period that a save of this job needs.

    What the file says stays, and no pod on spot nodes gets longer than the cloud gives it: there
    a save that is too slow is only told of. Without a measure, ``checkpoint_bytes`` is what counts.
    """
    try:
        measured = measured_save_s(job, run)
    except (JobError, ModuleNotFoundError) as error:
        say(f"grace_period_s: what a save took was not read: {error}")
        measured = None
    save_s = measured or checkpoint_bytes / SAVED_BYTES_PER_S
    source = "measured" if measured else "by estimate"
    given = settings.grace_period_s or default_grace_s(settings)
    needed = math.ceil(MARGIN * save_s)
    if needed <= given:
        return settings
    if settings.grace_period_s is None and settings.capacity == "on-demand":
        say(f"grace_period_s: {needed}: a step and its save take {save_s:.0f} s, {source}")
        return settings.model_copy(update={"grace_period_s": needed})
    what = f"a step and its save take {save_s:.0f} s, {source}, and the pod gets {given} s"
    do = f"a reclaimed node loses up to {_period(job)}: lower train.checkpoint_every_s"
    say(f"grace_period_s: warning: {what}; {do}, or {_instead(settings)}")
    return settings


def _period(job: JobConfig) -> str:
    if job.train.checkpoint_every_steps is not None:
        return f"{job.train.checkpoint_every_steps} steps"
    return f"{job.train.checkpoint_every_s:.0f} s"


def _instead(settings: ClusterConfig) -> str:
    return "use capacity: on-demand" if settings.capacity == "spot" else "raise grace_period_s"
