"""What became of every row: data_report.json, and whether it is good enough to train on."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from job.config import DataLimits
from job.data.pack import Pack
from job.data.render import Rendered
from job.data.tokens import IGNORED, Tokens
from job.errors import ExitCode, JobError

HISTOGRAM = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
MOST_PLACES = 50
"""Row numbers kept for each reason: enough to find them, and no more memory with more rows."""
MOST_REASONS = 100
NUM_SAMPLES = 3


@dataclass(slots=True)
class Dropped:
    """Rows dropped for one reason."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count a row, and note where it is if there is still room."""
        self.count += 1
        if len(self.places) < MOST_PLACES:
            self.places.append(place)


@dataclass(slots=True)
class Report:
    """Counts of one preparation. Rows are what the files hold, examples what is trained on."""

    shapes: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    rows_kept: int = 0
    invalid: dict[str, Dropped] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    truncated: Dropped = field(default_factory=Dropped)
    tokens_lost: int = 0
    examples: int = 0
    held_out_examples: int = 0
    held_out_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    with_stop_token: int = 0
    packs: int = 0
    longest: int = 0
    largest_id: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * (len(HISTOGRAM) + 1))
    samples: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, place: str, reason: str) -> None:
        """Count a row that can't be read, recognised or rendered."""
        _count(self.invalid, place, reason)

    def drop(self, place: str, reason: str) -> None:
        """Count a row that is right, and yet not trained on."""
        _count(self.dropped, place, reason)

    def keep(self, tokens: Tokens, *, stop_token_ids: set[int]) -> None:
        """Count an example that is trained on."""
        size = len(tokens.ids)
        trained = tokens.labels[tokens.labels != IGNORED]
        self.examples += 1
        self.tokens += size
        self.supervised_tokens += len(trained)
        self.with_stop_token += int(trained[-1]) in stop_token_ids
        self.longest = max(self.longest, size)
        self.largest_id = max(self.largest_id, int(tokens.ids.max()))
        self.lengths[bisect.bisect_left(HISTOGRAM, size)] += 1

    def hold_out(self, tokens: Tokens) -> None:
        """Count an example that only loss is measured on."""
        self.held_out_examples += 1
        self.held_out_tokens += len(tokens.ids)

    def pack(self, pack: Pack) -> None:
        """Count a row that is written."""
        self.packs += bool(pack)

    def sample(self, place: str, rendered: Rendered) -> None:
        """Keep the first few examples as people read them, masks and all."""
        if len(self.samples) < NUM_SAMPLES:
            parts = [{"text": rendered.shown(t), "trained": on} for t, on in rendered.segments if t]
            self.samples.append({"row": place, "segments": parts})

    @property
    def num_invalid(self) -> int:
        """Rows that can't be read, recognised or rendered."""
        return sum(entry.count for entry in self.invalid.values())

    @property
    def num_dropped(self) -> int:
        """Rows not trained on, for any reason."""
        return self.num_invalid + sum(entry.count for entry in self.dropped.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        kinds = [("invalid", self.invalid), ("dropped", self.dropped)]
        dropped = [
            {"reason": reason, "kind": kind, "count": entry.count, "rows": entry.places}
            for kind, table in kinds
            for reason, entry in sorted(table.items(), key=lambda item: -item[1].count)
        ]
        bounds = [*HISTOGRAM, None]
        return {
            "shapes": dict(sorted(self.shapes.items())),
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "rows_dropped": self.num_dropped,
            "rows_invalid": self.num_invalid,
            "dropped": dropped,
            "truncated": {"count": self.truncated.count, "rows": self.truncated.places},
            "tokens_lost": self.tokens_lost,
            "examples": self.examples,
            "packs": self.packs,
            "held_out_examples": self.held_out_examples,
            "held_out_tokens": self.held_out_tokens,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "longest": self.longest,
            "length_histogram": [
                {"up_to": bound, "count": count}
                for bound, count in zip(bounds, self.lengths, strict=True)
                if count
            ],
            "stop_coverage": round(self.with_stop_token / max(self.examples, 1), 4),
            "samples": self.samples,
        }

    def judge(self, limits: DataLimits) -> None:
        """Say no to data that is not good enough.

        Raises:
            JobError: 65, naming the limit and the first rows that break it.
        """
        if not self.rows_read:
            raise _refusal("data.source", "holds no rows", "give it some")
        rows = self.rows_read
        self._share("max_invalid", self.num_invalid / rows, limits.max_invalid, self.invalid)
        if not self.examples:
            _all_gone(self)
        both = {**self.invalid, **self.dropped}
        self._share("max_dropped", self.num_dropped / rows, limits.max_dropped, both)
        cut = {"is longer than data.max_length and was cut": self.truncated}
        self._share("max_truncated", self.truncated.count / rows, limits.max_truncated, cut)
        covered = self.with_stop_token / self.examples
        if covered < limits.min_stop_coverage:
            raise _refusal(
                "data.limits.min_stop_coverage",
                f"{covered:.1%} of the examples end with a stop token, {limits.min_stop_coverage:.1%}"
                " is the least: the model would not learn to stop",
                "use a chat template whose turns end with a token of this tokenizer, raise"
                " data.max_length, or lower the limit",
            )

    def _share(self, name: str, share: float, most: float, rows: dict[str, Dropped]) -> None:
        if share <= most:
            return
        reason, worst = max(rows.items(), key=lambda item: item[1].count)
        total = sum(entry.count for entry in rows.values())
        places = ", ".join(worst.places[:3]) + (", …" if worst.count > 3 else "")
        others = f", and {total - worst.count} for other reasons" if total > worst.count else ""
        raise _refusal(
            worst.places[0] if worst.places else "data",
            f"{reason} ({worst.count} of {self.rows_read} rows: {places}{others})",
            f"mend or remove {'it' if total == 1 else 'them'}, or raise data.limits.{name} from {most:g}",
        )


def _all_gone(report: Report) -> None:
    table = {**report.invalid, **report.dropped}
    reason = max(table, key=lambda name: table[name].count) if table else "were held out"
    raise _refusal(
        "data.source",
        f"leaves nothing to train on: all {report.rows_read} rows were dropped, most because a row"
        f" {reason}",
        "see data_report.json, and mend the data or data.max_length",
    )


def _refusal(where: str, what: str, do: str) -> JobError:
    return JobError(ExitCode.DATA, where, what, do)


def _count(table: dict[str, Dropped], place: str, reason: str) -> None:
    if reason not in table and len(table) >= MOST_REASONS:
        reason = "has another of very many faults"
    table.setdefault(reason, Dropped()).add(place)
