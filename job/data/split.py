"""Where a model's words divide into analysis and answer: the rule that generate and judge use."""

from __future__ import annotations

import re
from collections.abc import Sequence

from job.data.template import CLOSE, OPEN

CHANNEL = "<|channel|>"
MESSAGE = re.compile(
    r"<\|channel\|>(?P<channel>\w+)(?P<header>[^<]*(?:<\|constrain\|>[^<]*)?)<\|message\|>"
    r"(?P<text>.*?)(?=<\|(?:end|return|call|start|channel)\|>|$)",
    re.DOTALL,
)
RECIPIENT = re.compile(r"to=(\S+?)(?=<|\s|$)")


def split_thinking(
    text: str, special_tokens: Sequence[str] = (), thinking: str = "keep"
) -> tuple[str, str]:
    """Return (analysis, answer) of generated text, decoded *with* its special tokens.

    Args:
        text: What was generated, from the end of the generation prompt.
        special_tokens: What is taken out of the result.
        thinking: ``data.thinking`` of the job. With "drop", tags are left in the answer.
    """
    if CHANNEL in text:
        analysis, answer = _channels(text)
    elif thinking != "drop" and (CLOSE in text or text.lstrip().startswith(OPEN)):
        before, _, answer = text.partition(CLOSE)
        analysis = before.lstrip().removeprefix(OPEN)
    else:
        analysis, answer = "", text
    return _clean(analysis, special_tokens), _clean(answer, special_tokens)


def _channels(text: str) -> tuple[str, str]:
    """Read gpt-oss's harmony: analysis apart; final, or else the calls and comments, as answer."""
    said: dict[str, list[str]] = {"analysis": [], "commentary": [], "final": []}
    end = 0
    for found in MESSAGE.finditer(text):
        header = text[end : found.start()] + found["header"]
        end = found.end()
        recipient = RECIPIENT.search(header)
        body = f"{recipient[1]} {found['text']}" if recipient else found["text"]
        said.setdefault(found["channel"], []).append(body)
    answer = said["final"] or said["commentary"]
    return "\n".join(said["analysis"]), "\n".join(answer)


def _clean(text: str, special_tokens: Sequence[str]) -> str:
    for token in special_tokens:
        text = text.replace(token, "")
    return text.strip()
