"""Rows of tokens onto the disk: Arrow IPC streams, which training maps into memory."""

from __future__ import annotations

from pathlib import Path

from job.data.pack import Pack

BATCH_TOKENS = 1 << 19
"""Tokens that wait to be written: 8 bytes each in memory."""


class Arrow:
    """A stream of rows on disk, written many at a time."""

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
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import numpy as np
        import pyarrow as pa

        if not self._packs:
            return
        every = [tokens for pack in self._packs for tokens in pack]
        lengths = np.array([len(tokens.ids) for tokens in every], np.int32)
        documents = np.cumsum([0, *(len(pack) for pack in self._packs)], dtype=np.int32)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)[documents]
        columns = [
            pa.ListArray.from_arrays(ends, np.concatenate([tokens.ids for tokens in every])),
            pa.ListArray.from_arrays(ends, np.concatenate([tokens.labels for tokens in every])),
            pa.ListArray.from_arrays(documents, lengths),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._packs, self._waiting = [], 0
