"""Rows become batches: padded to the right, or packed with a mask that we build ourselves.

Transformers builds packed masks for some models and forgets them for others (gpt-oss), so the
block-diagonal causal mask is made here, from the documents' numbers, for every architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORED = -100
# transformers' models of these types take one mask for each kind of layer.
MIXED = frozenset({"gpt_oss", "gemma3_text", "qwen2", "qwen3"})
BLOCK = 50  # batches that are sorted by length together


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes tensors [rows, tokens] of rows with ``input_ids``, ``labels`` and ``lengths``.

    Batches have ``real`` (bool: not padding) and, if packed, ``documents`` (each token's
    document, counted from 1 in each row; 0 is padding) and ``position_ids`` within it. A
    document's first token is never a target: what comes before it is another document.
    """

    pad_token_id: int
    packed: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return one batch."""
        # At least 1: a blank batch, of a rank that has no rows left, is one token of padding.
        size = max(1, *(len(row["input_ids"]) for row in rows))
        shape = (len(rows), size)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            count = len(row["input_ids"])
            lengths = np.asarray(row["lengths"], dtype=np.int64)
            starts = np.cumsum(lengths) - lengths
            ids[index, :count] = row["input_ids"]
            labels[index, :count] = row["labels"]
            labels[index, starts] = IGNORED
            documents[index, :count] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            positions[index, :count] = np.arange(count) - np.repeat(starts, lengths)
        batch = {"input_ids": ids, "labels": labels, "real": documents > 0}
        if self.packed:
            batch |= {"documents": documents, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def build_masks(documents: torch.Tensor, config: Any, dtype: torch.dtype) -> Any:
    """Return the attention mask(s) that keep packed documents apart, as ``config``'s model takes it.

    Args:
        documents: int [rows, tokens], equal for tokens of one document.
        config: the model's text config: its attention, layers and window.
        dtype: of the additive mask that eager attention wants.

    Returns:
        ``{"full_attention": …, "sliding_attention": …}`` for models with mixed layers, else one
        mask. sdpa: bool [rows, 1, tokens, tokens]; eager: 0 or the least number; flex: BlockMask.
    """
    window = getattr(config, "sliding_window", None)

    def build(kind: str) -> Any:
        limit = window if kind == "sliding_attention" else None
        return _mask(documents, limit, config._attn_implementation, dtype)  # noqa: SLF001

    if config.model_type in MIXED:
        return {kind: build(kind) for kind in dict.fromkeys(config.layer_types)}
    return build("sliding_attention" if window else "full_attention")


def _mask(documents: torch.Tensor, window: int | None, attention: str, dtype: torch.dtype) -> Any:
    if attention == "flex_attention":
        return block_mask(documents, window)
    place = torch.arange(documents.shape[1], device=documents.device)
    back = place[:, None] - place[None, :]
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    seen = (documents[:, :, None] == documents[:, None, :]) & near
    if attention == "sdpa":
        return seen[:, None]
    zero = torch.zeros((), dtype=dtype, device=documents.device)
    return torch.where(seen[:, None], zero, torch.finfo(dtype).min)


def block_mask(documents: torch.Tensor, window: int | None) -> Any:
    """Return flex attention's mask of packed documents: int [rows, tokens]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row: Any, head: Any, query: Any, key: Any) -> Any:  # noqa: ARG001
        same = (documents[row, query] == documents[row, key]) & (query >= key)
        return same if window is None else same & (query - key < window)

    rows, tokens = documents.shape
    return create_block_mask(seen, rows, None, tokens, tokens, device=documents.device)


class Order(torch.utils.data.Sampler[int]):
    """The order of rows in each epoch: a function of seed and epoch alone.

    Rows of like length come into one batch, so that little is padding; batches come in a
    random order. Of ``size`` ranks, each takes every ``size``-th batch, so that a step has the
    rows that one process would take with as many more batches; a rank whose turn finds no batch
    left gets the row ``len(lengths)``: the blank one.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, *, rank: int = 0, size: int = 1
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.size = rank, size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) if self.size == 1 else sum(1 for _ in self)

    def __iter__(self) -> Iterator[int]:
        if self.size == 1:
            yield from self._rows()
            return
        rows = list(self._rows())
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        batches += [[len(rows)]] * (-len(batches) % self.size)
        for batch in batches[self.rank :: self.size]:
            yield from batch

    def _rows(self) -> Iterator[int]:
        dice = np.random.default_rng([self.seed, self.epoch])
        shuffled = dice.permutation(len(self.lengths))
        blocks = np.split(
            shuffled, range(BLOCK * self.batch_size, len(shuffled), BLOCK * self.batch_size)
        )
        ordered = np.concatenate([b[np.argsort(self.lengths[b], kind="stable")] for b in blocks])
        whole = len(ordered) // self.batch_size * self.batch_size
        batches = ordered[:whole].reshape(-1, self.batch_size)
        yield from batches[dice.permutation(len(batches))].ravel().tolist()
        yield from ordered[whole:].tolist()


def with_blank(rows: Any) -> Any:
    """Return the rows and, last, one without tokens: what a rank takes that has none left."""
    import datasets

    blank: dict[str, list[list[int]]] = {"input_ids": [[]], "labels": [[]], "lengths": [[0]]}
    one = datasets.Dataset.from_dict(blank, features=rows.features)
    return datasets.concatenate_datasets([rows, one])


def unpack(rows: Any) -> Any:
    """Return packed rows as one row a document."""
    import datasets
    import pyarrow as pa

    table = rows.with_format("arrow")[:]
    lengths = table.column("lengths").combine_chunks().flatten().to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    def cut(name: str) -> Any:
        return pa.ListArray.from_arrays(offsets, table.column(name).combine_chunks().flatten())

    ones = pa.array(np.arange(len(lengths) + 1, dtype=np.int32))
    counts = pa.ListArray.from_arrays(ones, pa.array(lengths, type=pa.int32()))
    columns = {"input_ids": cut("input_ids"), "labels": cut("labels"), "lengths": counts}
    return datasets.Dataset(pa.table(columns))
