"""Signals: the first saves, and an impatient person is not kept."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CODE = """
import os, sys
from job.stop import Stop, install_signals
class Late:
    def __del__(self, read=os.read, write=os.write):
        write(1, b"late\\n")
        read(0, 1)
late = Late()
stop = Stop()
install_signals(stop)
print("ready", flush=True)
for line in sys.stdin:
    print(stop.requested, flush=True)
    if line == "end\\n":
        sys.exit(75)
"""


@contextmanager
def listening() -> Iterator["subprocess.Popen[str]"]:
    """A process that is asked to end and takes its time; it answers each line."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", CODE]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def say(process: "subprocess.Popen[str]", line: str = "\n") -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def is_asked(process: "subprocess.Popen[str]", number: signal.Signals) -> bool:
    """Send a signal, and return whether the process goes on and knows that it should end."""
    assert process.stdout is not None
    process.send_signal(number)
    say(process)
    return process.stdout.readline() == "True\n"


def test_the_third_ctrl_c_ends_at_once_with_130() -> None:
    """The first asks for the end, the second says that it saves, the third is obeyed."""
    with listening() as process:
        assert is_asked(process, signal.SIGINT)
        assert is_asked(process, signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.wait() == 130
        saving, given_up = process.stderr.read().splitlines()
    assert "saving, then ending; Ctrl-C once more" in saving
    assert "given up" in given_up


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_may_come_as_often_as_they_like(number: signal.Signals) -> None:
    """A kubelet's signals ask for the end, and never cut the saving short."""
    with listening() as process:
        assert all(is_asked(process, number) for _ in range(4))


def test_a_signal_in_the_last_moment_does_not_change_the_code() -> None:
    """While the interpreter takes itself down, the code that was decided stays."""
    with listening() as process:
        assert process.stdout is not None
        assert is_asked(process, signal.SIGINT)
        say(process, "end\n")
        assert process.stdout.readline() == "True\n"
        assert process.stdout.readline() == "late\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        say(process)
        assert process.wait() == 75
