"""Examples into rows of at most max_length tokens, and those onto the disk."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path

from job.data.tokens import Tokens

OPEN_TOKENS = 1 << 20
"""Room of the rows that wait for what fits: more fill better, and hold more memory (8 bytes each)."""
FEWEST_OPEN, MOST_OPEN = 16, 512
BATCH_TOKENS = 1 << 19
"""Tokens that wait to be written: 8 bytes each in memory."""

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
        while self._packs:
            yield self._packs.pop(min(self._packs))


class Arrow:
    """A stream of rows on disk (Arrow IPC, which training maps into memory), many at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        kinds = [(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "lengths")]
        self._schema = pa.schema(kinds)
        self._writer = pa.ipc.new_stream(str(path), self._schema)
        self._packs: list[Pack] = []
        self._waiting = 0
        self.num_rows = 0

    def write(self, pack: Pack) -> None:
        """Add one row."""
        self._packs.append(pack)
        self.num_rows += 1
        self._waiting += sum(len(tokens.ids) for tokens in pack)
        if self._waiting >= BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the end of the stream."""
        if self._packs:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import numpy as np
        import pyarrow as pa

        every = [tokens for pack in self._packs for tokens in pack]
        lengths = np.array([len(tokens.ids) for tokens in every], np.int32)
        documents = np.cumsum([0, *map(len, self._packs)], dtype=np.int32)
        ends = np.cumsum([0, *lengths], dtype=np.int32)[documents]
        columns = [
            pa.ListArray.from_arrays(ends, np.concatenate([tokens.ids for tokens in every])),
            pa.ListArray.from_arrays(ends, np.concatenate([tokens.labels for tokens in every])),
            pa.ListArray.from_arrays(documents, lengths),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._packs, self._waiting = [], 0
