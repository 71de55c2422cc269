"""What became of every row: data_report.json, and whether it is good enough to train on."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

from job.config import DataLimits
from job.data.tokens import IGNORED, Tokens
from job.errors import ExitCode, JobError

HISTOGRAM = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
MOST_PLACES = 50
"""Row numbers kept for each reason: enough to find them, and no more memory with more rows."""
MOST_REASONS = 100
NUM_SAMPLES = 3


@dataclass(slots=True)
class Tally:
    """Rows of one fate, and where the first of them are."""

    count: int = 0
    rows: list[str] = field(default_factory=list)
    last: str = ""

    def add(self, place: str) -> None:
        """Count a row once, whatever it has of examples; note where it is if there is room."""
        if place == self.last:
            return
        self.count, self.last = self.count + 1, place
        if len(self.rows) < MOST_PLACES:
            self.rows.append(place)

    def as_dict(self) -> dict[str, Any]:
        """Return how many, and which."""
        return {"count": self.count, "rows": self.rows}


Reasons = dict[str, Tally]


@dataclass
class Report:
    """Counts of one preparation. Rows are what the files hold, examples what is trained on."""

    rows_read: int = 0
    rows_kept: int = 0
    examples: int = 0
    packs: int = 0
    held_out_examples: int = 0
    held_out_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    tokens_lost: int = 0
    with_stop_token: int = 0
    longest: int = 0
    largest_id: int = 0
    truncated: Tally = field(default_factory=Tally)
    invalid: Reasons = field(default_factory=dict)
    """Rows that can't be read, recognised or rendered."""
    dropped: Reasons = field(default_factory=dict)
    """Rows that are right, and yet not trained on."""
    shapes: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [0] * (len(HISTOGRAM) + 1))
    samples: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, place: str, reason: str) -> None:
        """Count a row that can't be read, recognised or rendered."""
        _count(self.invalid, place, reason)

    def drop(self, place: str, reason: str) -> None:
        """Count a row that is right, and yet not trained on."""
        _count(self.dropped, place, reason)

    def keep(self, tokens: Tokens, stop_token_ids: set[int]) -> None:
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

    @property
    def num_dropped(self) -> int:
        """Rows not trained on, for any reason."""
        return _sum(self.invalid) + _sum(self.dropped)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        dropped = [
            {"reason": reason, "kind": kind, **tally.as_dict()}
            for kind, table in (("invalid", self.invalid), ("dropped", self.dropped))
            for reason, tally in sorted(table.items(), key=lambda item: -item[1].count)
        ]
        bars = zip([*HISTOGRAM, None], self.lengths, strict=True)
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, int)},
            "rows_dropped": self.num_dropped,
            "rows_invalid": _sum(self.invalid),
            "dropped": dropped,
            "truncated": self.truncated.as_dict(),
            "shapes": self.shapes,
            "length_histogram": [
                {"up_to": up_to, "count": count} for up_to, count in bars if count
            ],
            "stop_coverage": round(self.with_stop_token / max(self.examples, 1), 4),
            "samples": self.samples,
        }

    def judge_rows(self, limits: DataLimits) -> None:
        """Say no to data of which too many rows are bad.

        Raises:
            JobError: 65, naming the limit and the first rows that break it.
        """
        if not self.rows_read:
            raise _refusal("data.source", "holds no rows", "give it some")
        self._judge_share("max_invalid", self.invalid, limits.max_invalid)
        if not self.examples:
            raise self._all_gone()
        self._judge_share("max_dropped", {**self.invalid, **self.dropped}, limits.max_dropped)
        cut = {"is longer than data.max_length and was cut": self.truncated}
        self._judge_share("max_truncated", cut, limits.max_truncated)

    def judge(self, limits: DataLimits) -> None:
        """Say no to data that is not good enough to train on.

        Raises:
            JobError: 65, naming the limit.
        """
        self.judge_rows(limits)
        covered, least = self.with_stop_token / self.examples, limits.min_stop_coverage
        if covered < least:
            raise _refusal(
                "data.limits.min_stop_coverage",
                f"{covered:.1%} of the examples end with a stop token, {least:.1%}"
                " is the least: the model would not learn to stop",
                "use a chat template whose turns end with a token of this tokenizer, raise"
                " data.max_length, or lower the limit",
            )

    def _judge_share(self, name: str, table: Reasons, most: float) -> None:
        total = _sum(table)
        if total <= most * self.rows_read:
            return
        reason, worst = max(table.items(), key=lambda item: item[1].count)
        places = ", ".join(worst.rows[:3]) + (", …" if worst.count > 3 else "")
        others = f", and {total - worst.count} for other reasons" if total > worst.count else ""
        raise _refusal(
            worst.rows[0],
            f"{reason} ({worst.count} of {self.rows_read} rows: {places}{others})",
            f"mend or remove {'it' if total == 1 else 'them'}, or raise data.limits.{name} from {most:g}",
        )

    def _all_gone(self) -> JobError:
        table = {**self.invalid, **self.dropped}
        reason = max(table, key=lambda name: table[name].count) if table else "was held out"
        return _refusal(
            "data.source",
            f"leaves nothing to train on: all {self.rows_read} rows were dropped, most because a"
            f" row {reason}",
            "see data_report.json, and mend the data or data.max_length",
        )


def _refusal(where: str, what: str, do: str) -> JobError:
    return JobError(ExitCode.DATA, where, what, do)


def _sum(table: Reasons) -> int:
    return sum(tally.count for tally in table.values())


def _count(table: Reasons, place: str, reason: str) -> None:
    if reason not in table and len(table) >= MOST_REASONS:
        reason = "has another of very many faults"
    table.setdefault(reason, Tally()).add(place)
