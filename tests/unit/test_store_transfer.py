"""Many transfers at once: what becomes of the others when one fails."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from job.errors import ExitCode, JobError
from job.stop import Stop, preempted
from job.store.transfer import each

CODE = """
import contextlib, sys, threading
from job.errors import JobError
from job.stop import Stop
from job.store import transfer

def call(item, stop):
    if item == "fails":
        raise RuntimeError
    try:
        stop.wait(60)
    except JobError:
        threading.main_thread().join()
        print("cleaned up", flush=True)

transfer.CLEAN_UP_S = 0
with contextlib.suppress(RuntimeError):
    transfer.each(call, ["fails", "waits"], stop=Stop(), daemon=sys.argv[1] == "daemon")
"""


@pytest.mark.parametrize(("kind", "said"), [("writer", "cleaned up\n"), ("daemon", "")])
def test_a_writer_cleans_up_before_the_process_ends(kind: str, said: str) -> None:
    """Parts that were sent are thrown away, however long it takes; a daemon is left behind."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, kind],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_results_come_in_the_order_of_the_items() -> None:
    """Whoever is done first; and of nothing comes nothing."""
    assert each(lambda item, _: item * 2, range(20), stop=Stop()) == [2 * n for n in range(20)]
    assert each(lambda item, _: item, [], stop=Stop()) == []


def test_a_stop_ends_all_of_them() -> None:
    """The stop's reason is raised, and every call hears it."""
    stop, heard, both = Stop(), [], threading.Barrier(2)

    def call(_: int, inner: Stop) -> None:
        both.wait()
        stop.request(preempted("SIGTERM"))
        try:
            inner.wait(60)
        except JobError as error:
            heard.append(error.code)
            raise

    with pytest.raises(JobError) as caught:
        each(call, [1, 2], stop=stop)
    assert caught.value.code is ExitCode.PREEMPTED
    assert heard == [ExitCode.PREEMPTED] * 2
