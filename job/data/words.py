"""Text to ids word by word, each word encoded once: several times as fast as the tokenizer alone.

Byte-level tokenizers of GPT's family (GPT-2, cl100k, o200k, Llama 3, Qwen, SmolLM2) cut a text by a
regular expression before they merge anything, and none of these reaches over the place before a
single space between two other characters. So what stands between such places can be encoded by
itself, and language repeats its words. Others are not encoded so: :func:`splits_at_spaces` says
which are, and tests compare both ways on all of these expressions.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

# A space with something else on either side. (Beginning with the space, it is found fast.)
PLACE = re.compile(r" (?<=\S )(?=\S)")
MOST_WORDS, MOST_CHARACTERS = 200_000, 4_000_000
"""What is remembered at a time: some 50 MB."""


def splits_at_spaces(tokenizer: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is of the kind that is encoded word by word."""
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    added = tokenizer.get("added_tokens") or []
    plain = all(not (t["lstrip"] or t["rstrip"] or t["single_word"]) for t in added)
    kinds = [step.get("type") for step in steps]
    return (
        plain
        and kinds[-1] == "ByteLevel"
        and not steps[-1].get("add_prefix_space")
        and (steps[-1].get("use_regex", True) or "Split" in kinds)
        and all(_isolates(step) for step in steps[:-1])
        and (tokenizer.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
    )


def _isolates(step: dict[str, Any]) -> bool:
    """Return whether a step cuts where we do: digits, or one of the known expressions."""
    if step.get("type") == "Digits":
        return True
    pattern = (step.get("pattern") or {}).get("Regex", "")
    isolated = step.get("type") == "Split" and step.get("behavior") == "Isolated"
    # All of the family end so: white space before a word, then white space at the end.
    return isolated and not step.get("invert") and r"\s+(?!\S)|\s+" in pattern


class Words:
    """A tokenizer that remembers words. The ids are those of the tokenizer itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        names = sorted((token.content for token in added), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"((?!))")
        self._first: dict[str, bytes] = {}
        self._spaced: dict[str, bytes] = {}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as int32, without special tokens around it."""
        if len(self._spaced) > MOST_WORDS or self._characters > MOST_CHARACTERS:
            self._first.clear()
            self._spaced.clear()
            self._characters = 0
        cut = [self._runs(text) for text in texts]
        found = [self._known(runs) for runs in cut]
        new = [runs for runs, ids in zip(cut, found, strict=True) if ids is None]
        self._learn({run[0] for runs in new for run in runs}, self._first, "")
        self._learn({w for runs in new for run in runs for w in run[1:]}, self._spaced, " ")
        return [
            ids if ids is not None else self._joined(runs)
            for runs, ids in zip(cut, found, strict=True)
        ]

    def _runs(self, text: str) -> list[list[str]]:
        """Return the words of each run of text between added tokens, and those tokens as runs."""
        parts = self._added.split(text)
        return [[p] if at % 2 else PLACE.split(p) for at, p in enumerate(parts) if p]

    def _known(self, runs: list[list[str]]) -> bytes | None:
        try:
            return self._joined(runs)
        except KeyError:
            return None

    def _joined(self, runs: list[list[str]]) -> bytes:
        parts = []
        for first, *rest in runs:
            parts.append(self._first[first])
            parts += map(self._spaced.__getitem__, rest)
        return b"".join(parts)

    def _learn(self, words: set[str], known: dict[str, bytes], before: str) -> None:
        unknown = list(words.difference(known))
        self._characters += sum(map(len, unknown))
        texts = [before + word for word in unknown]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for word, found in zip(unknown, encoded, strict=True):
            known[word] = array("i", found.ids).tobytes()
