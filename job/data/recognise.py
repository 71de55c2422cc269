"""What shape a file's rows have, told from many of them: the first row alone proves nothing."""

from __future__ import annotations

from collections.abc import Mapping as Columns
from typing import Any, Literal

from job.errors import ExitCode, JobError

Shape = Literal["preference", "messages", "prompt+completion", "alpaca", "text", "mapping"]

SAMPLE_ROWS = 256
TURN_COLUMNS = ("messages", "conversations", "conversation")
# In the order of trust: a row of turns often carries its text or prompt in other columns as well.
NEEDED: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen",), ("rejected",)),
    "messages": (TURN_COLUMNS,),
    "prompt+completion": (("prompt",), ("completion",)),
    "alpaca": (("instruction",), ("output",)),
    "text": (("text",),),
}


def fits(shape: Shape, row: Columns[str, Any]) -> bool:
    """Return whether ``row`` has a value in every column that ``shape`` needs."""
    return all(any(row.get(name) is not None for name in names) for names in NEEDED[shape])


def recognise(sample: list[dict[str, Any]], where: str) -> Shape:
    """Return the most trusted shape that at least half of the sampled rows have.

    Raises:
        JobError: 65 for rows of no known shape, and for preference pairs.
    """
    shape = next(
        (s for s in NEEDED if sum(fits(s, row) for row in sample) * 2 >= len(sample)), None
    )
    if shape is None:
        columns = sorted({name for row in sample[:100] for name in row})
        raise JobError(
            ExitCode.DATA,
            where,
            f"has rows of no known shape: columns {', '.join(columns[:20]) or '(none)'}",
            "say in data.mapping which column means what",
        )
    if shape == "preference":
        raise JobError(
            ExitCode.DATA,
            where,
            "holds preference pairs (chosen, rejected), and train.method is sft",
            "choose data with answers to imitate, or train on one side with"
            " data.mapping: {messages: chosen}",
        )
    return shape
