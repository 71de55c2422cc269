"""Many transfers at once: bounded, in order, and with an ear for the stop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

import structlog

from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop

T = TypeVar("T")
R = TypeVar("R")
log = structlog.get_logger()

FILES_AT_ONCE = 4
POLL_S = 0.2
SAY_EVERY_S = 10.0
CLEAN_UP_S = 1.0


def ordered(
    pool: Executor, call: Callable[[T], R], items: Iterable[T], *, window: int, stop: Stop
) -> Iterator[R]:
    """Yield ``call(item)`` in the order of the items, with ``window`` of them under way.

    Items are drawn in the caller's thread, just before they are handed over: what a lazy iterable
    reads and hashes runs beside what ``pool`` sends. When it ends early, it waits for what is
    under way, so that nothing is written after the caller has cleaned up.
    """
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(call, item))
            if len(under_way) >= window:
                yield _result(under_way.popleft(), stop)
        while under_way:
            yield _result(under_way.popleft(), stop)
    finally:
        for future in under_way:
            future.cancel()
        wait(under_way)


def _result(future: Future[R], stop: Stop) -> R:
    while not wait([future], timeout=POLL_S).done:
        stop.check()
    return future.result()


def each(
    call: Callable[[T, Stop], R],
    items: Sequence[T],
    *,
    stop: Stop,
    workers: int = FILES_AT_ONCE,
    daemon: bool = False,
) -> list[R]:
    """Return ``call(item, inner_stop)`` for all items, several at once.

    The first failure, or ``stop``, is raised; the others are asked to end by the inner stop and
    get a second to clean up behind them, not more: one may hang on a server that says nothing.
    The process's end waits for it, that it may throw away the parts that it sent; not for a
    ``daemon``, which leaves nothing behind.
    """
    inner, todo = Stop(patience_s=stop.patience_s), deque(enumerate(items))
    done: SimpleQueue[tuple[int, R | BaseException]] = SimpleQueue()

    def work() -> None:
        while todo and not inner.requested:
            with suppress(IndexError):  # another thread took the last one
                number, item = todo.popleft()
                try:
                    done.put((number, call(item, inner)))
                except BaseException as error:  # noqa: BLE001 - raised again by the caller
                    done.put((number, error))

    threads = [
        threading.Thread(target=work, name="transfer", daemon=daemon)
        for _ in range(min(workers, len(items)))
    ]
    for thread in threads:
        thread.start()
    try:
        return _collected(done, len(items), stop)
    except BaseException as error:
        inner.request(error if isinstance(error, JobError) else _abandoned(error))
        give_up = time.monotonic() + CLEAN_UP_S
        for thread in threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        raise


def _collected(done: SimpleQueue[tuple[int, R | BaseException]], count: int, stop: Stop) -> list[R]:
    results: dict[int, R] = {}
    while len(results) < count:
        stop.check()
        with suppress(Empty):
            number, result = done.get(timeout=POLL_S)
            if isinstance(result, BaseException):
                raise result
            results[number] = result
    return [results[number] for number in range(count)]


def _abandoned(error: BaseException) -> JobError:
    return JobError(ExitCode.STORE, "transfer", f"given up: {error!r}", "see the error before it")


class Meter:
    """Counts bytes from many threads, and says every ten seconds how far it is."""

    def __init__(self, what: str, total_bytes: int, progress: Progress | None = None) -> None:
        self.what, self.total_bytes, self.done_bytes = what, total_bytes, 0
        self._progress = progress
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()

    def tick(self, count: int) -> None:
        """Add ``count`` bytes."""
        with self._lock:
            self.done_bytes += count
            now = time.monotonic()
            if now - self._said < SAY_EVERY_S:
                return
            self._said = now
        self._say(now - self._began)

    def _say(self, elapsed_s: float) -> None:
        rate = self.done_bytes / elapsed_s
        eta_s = round(max(0, self.total_bytes - self.done_bytes) / rate) if rate else None
        if self._progress is not None:
            self._progress.update(eta_s=eta_s)
        done = f"{self.done_bytes / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB"
        rate_mb = round(rate / 1e6, 1)
        log.info("transfer", what=self.what, done=done, mb_per_s=rate_mb, eta_s=eta_s)
