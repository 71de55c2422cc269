"""The story: pull, prepare, train, merge, judge, publish. Each stage is one call."""

from __future__ import annotations

import structlog

from job.artifacts import Receipt
from job.context import Context
from job.data.prepare import prepare
from job.judge import judge
from job.merge.stage import merge
from job.publish import publish
from job.pull import pull
from job.train.stage import train

log = structlog.get_logger()


def run(context: Context) -> Receipt:
    """Take one attempt through all stages; the Receipt is the proof that it is published.

    Raises:
        JobError: whatever the exit-code table says, from the stage that failed.
    """
    model, data, held_out = pull(context)
    dataset = prepare(context, model, data, held_out)
    adapter = train(context, model, dataset)
    merged = merge(context, model, dataset, adapter)
    verdict = judge(context, model, dataset, adapter)
    return publish(context, model, data, dataset, adapter, merged, verdict)
