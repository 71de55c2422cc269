"""The story: pull, prepare, train, merge, judge, publish. Each stage is one call."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator

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

# No more than this: libraries that load their parts when asked (transformers, huggingface_hub) break
# when two threads ask at once, and a pull may ask too.
HEAVY = ("torch",)


def run(context: Context) -> Receipt:
    """Take one attempt through all stages; the Receipt is the proof that it is published.

    Raises:
        JobError: whatever the exit-code table says, from the stage that failed.
    """
    with imported_meanwhile(*HEAVY):
        model, data, held_out = pull(context)
    context.progress.end("imports")
    dataset = prepare(context, model, data, held_out)
    adapter = train(context, model, dataset)
    merged = merge(context, model, dataset, adapter)
    verdict = judge(context, model, dataset, adapter)
    return publish(context, model, data, dataset, adapter, merged, verdict)


@contextlib.contextmanager
def imported_meanwhile(*modules: str) -> Iterator[None]:
    """Import what the next stages need while the block waits for the network.

    One that can't be imported is left to the stage that needs it, and to its words.
    """
    enough = threading.Event()

    def bring() -> None:
        for name in modules:
            if enough.is_set():
                return
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    thread = threading.Thread(target=bring, name="imports")
    thread.start()
    try:
        yield
    except BaseException:
        enough.set()
        raise
    finally:
        # Also after an error: a thread inside an import would break the interpreter's end.
        thread.join()
