"""Examples into rows of at most max_length tokens: best fit among a bounded number of open rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from job.data.tokens import Tokens

OPEN_TOKENS = 1 << 20
"""Room of the rows that wait for what fits: more fill better, and hold more memory (8 bytes each)."""
FEWEST_OPEN, MOST_OPEN = 16, 512

Pack = list[Tokens]


class Packer:
    """Put each example into the fullest open row that it fits into.

    Examples are never cut. Memory is bounded by ``OPEN_TOKENS``; the result depends on the order of
    the examples alone.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._most_open = min(max(OPEN_TOKENS // max_length, FEWEST_OPEN), MOST_OPEN)
        # (tokens left, serial): sorted, so that the first that is large enough fits best.
        self._room: list[tuple[int, int]] = []
        self._packs: dict[int, Pack] = {}
        self._serial = 0

    def add(self, tokens: Tokens) -> Iterator[Pack]:
        """Place one example, and yield the rows that are done with."""
        size = len(tokens.ids)
        at = bisect.bisect_left(self._room, (size, 0))
        if at < len(self._room):
            left, serial = self._room.pop(at)
            self._packs[serial].append(tokens)
        else:
            left, serial = self._max_length, self._serial
            self._serial += 1
            self._packs[serial] = [tokens]
        bisect.insort(self._room, (left - size, serial))
        if self._room[0][0] < 2 or len(self._room) > self._most_open:
            yield self._packs.pop(self._room.pop(0)[1])

    def rest(self) -> Iterator[Pack]:
        """Yield the rows that are still open, in the order they were opened."""
        self._room.clear()
        for serial in sorted(self._packs):
            yield self._packs[serial]
        self._packs.clear()


class Unpacked:
    """One example a row."""

    def add(self, tokens: Tokens) -> Iterator[Pack]:
        """Yield the example as a row of its own."""
        yield [tokens]

    def rest(self) -> Iterator[Pack]:
        """Yield nothing: no row waits."""
        yield from ()
