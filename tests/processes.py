"""Servers that tests start: with a log, awaited, and stopped by their own process id."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Return ``count`` different ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((address, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _die_with_parent() -> None:
    # A test session that is killed outright takes its servers along. Linux only, like the rigs.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """One process: started in a session of its own, its words in a log file."""

    def __init__(self, command: Sequence[str | Path], log: Path, **environment: str) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start the process (again)."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads hold locks here
            )
        return self

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def stop(self, *, wait_s: float = 10.0, number: int = signal.SIGTERM) -> None:
        """End the process, by force if it does not heed the signal."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ready(self, check: Callable[[], bool], *, within_s: float = 60.0) -> None:
        """Wait until ``check`` holds.

        Raises:
            RuntimeError: the process ended before, or the time is over; with the log's tail.
        """
        end = time.monotonic() + within_s
        while not check():
            if not self.running:
                raise RuntimeError(f"{self.command[0]} ended:\n{self.tail()}")
            if time.monotonic() > end:
                raise RuntimeError(f"{self.command[0]} not ready in {within_s} s:\n{self.tail()}")
            time.sleep(0.05)  # a process that starts gives no event to wait for

    def tail(self, lines: int = 30) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def listens(port: int, address: str = "127.0.0.1") -> bool:
    """Return whether somebody accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True
