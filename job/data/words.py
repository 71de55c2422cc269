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
from collections.abc import Callable, Sequence
from typing import Any

# A space with something else on either side. (Beginning with the space, it is found fast.)
PLACE = re.compile(r" (?<=\S )(?=\S)")
MOST_REMEMBERED = 16_000_000
"""Characters, and 60 for every word: some 50 MB."""


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
        # By their place in a run: what stands in the middle neither begins nor ends with a space.
        self._only: dict[str, bytes] = {}
        self._first: dict[str, bytes] = {}
        self._middle: dict[str, bytes] = {}
        self._last: dict[str, bytes] = {}
        self._remembered = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as int32, without special tokens around it."""
        if self._remembered > MOST_REMEMBERED:
            for known in (self._only, self._first, self._middle, self._last):
                known.clear()
            self._remembered = 0
        # Where all that stands between spaces is known, those spaces were such places.
        ids = [self._joined(self._runs(text, lambda run: run.split(" "))) for text in texts]
        new = {at: self._runs(texts[at], PLACE.split) for at, one in enumerate(ids) if one is None}
        self._learn([run for runs in new.values() for run in runs])
        for at, runs in new.items():
            ids[at] = self._joined(runs)
        return [one for one in ids if one is not None]

    def _runs(self, text: str, cut: Callable[[str], list[str]]) -> list[list[str]]:
        """Return the words of each run of text between added tokens, and those tokens as runs."""
        parts = self._added.split(text)
        return [[p] if at % 2 else cut(p) for at, p in enumerate(parts) if p]

    def _joined(self, runs: list[list[str]]) -> bytes | None:
        """Return the ids of known words, or None."""
        parts = []
        try:
            for first, *rest in runs:
                if not rest:
                    parts.append(self._only[first])
                    continue
                parts.append(self._first[first])
                last = rest.pop()
                parts += map(self._middle.__getitem__, rest)
                parts.append(self._last[last])
        except KeyError:
            return None
        return b"".join(parts)

    def _learn(self, runs: list[list[str]]) -> None:
        several = [run for run in runs if len(run) > 1]
        self._remember({run[0] for run in runs if len(run) == 1}, self._only, "")
        self._remember({run[0] for run in several}, self._first, "")
        self._remember({word for run in several for word in run[1:-1]}, self._middle, " ")
        self._remember({run[-1] for run in several}, self._last, " ")

    def _remember(self, words: set[str], known: dict[str, bytes], before: str) -> None:
        unknown = list(words.difference(known))
        self._remembered += sum(map(len, unknown)) + 60 * len(unknown)
        texts = [before + word for word in unknown]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for word, found in zip(unknown, encoded, strict=True):
            known[word] = array("i", found.ids).tobytes()
