"""Encoding word by word gives the tokenizer's own ids, for every expression of GPT's family."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from job.data import words
from job.data.words import Words, splits_at_spaces

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ["gpt2", "smollm2", "llama3", "qwen2", "gpt_oss"]
SPECIALS = ["<|im_start|>", "<|im_end|>"]


def before(kind: str) -> Any:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm2":
        own = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    expression = {"llama3": GPT4 % "{1,3}", "qwen2": GPT4 % "", "gpt_oss": O200K}[kind]
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), plain])


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = before(kind), decoders.ByteLevel()
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    text = "the word's  two\n\nnew lines, 123 numbers; और हिन्दी, l'été — 中文。\tx = f(a, b)\n    y"
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator([text] * 5, trainer)
    made.add_special_tokens(SPECIALS)
    return made


@functools.cache
def by_words(kind: str) -> Words:
    return Words(tokenizer(kind))


PIECES = st.sampled_from(
    [
        " ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "\u0085",
        "word", "Word", "WORD", "'s", "'RE", "don't", "é", "e\u0301", "\u0301", "हिन्दी", "क्",
        "中文", "。", "1", "12", "2024", "½", "٣", ".", "...", "/", "//", "(", "_", "😀", "👩\u200d🚀",
        "\u200b", "<|im_start|>", "<|im_end|>", "<", "|>", "\ufeff", "K", "ſ", "ǅ",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, max_size=4))
@settings(max_examples=150, deadline=None)
def test_ids_are_the_tokenizers(kind: str, texts: list[str]) -> None:
    """Whatever white space, marks, digits and control tokens a text mixes, the ids are the same."""
    expected = [tokenizer(kind).encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):  # learning the words, and knowing them
        found = [np.frombuffer(ids, np.int32).tolist() for ids in by_words(kind).encode(texts)]
        assert expected == found


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_is_known(kind: str) -> None:
    """Each tokenizer.json of the family is recognised."""
    assert splits_at_spaces(json.loads(tokenizer(kind).to_str()))


def test_others_are_left_alone() -> None:
    """Other kinds (SentencePiece's, other expressions, odd added tokens) are encoded as a whole."""
    known = json.loads(tokenizer("llama3").to_str())
    others: list[dict[str, Any]] = [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"normalizer": {"type": "Replace"}},
        {"added_tokens": [{"lstrip": True, "rstrip": False, "single_word": False}]},
    ]
    assert not any(splits_at_spaces({**known, **other}) for other in others)
    known["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+ \w+|."
    assert not splits_at_spaces(known)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are forgotten before they fill the memory; the ids stay right."""
    monkeypatch.setattr(words, "MOST_REMEMBERED", 2000)
    made = Words(tokenizer("gpt2"))
    for number in range(200):
        text = f"a b{number} c{number} d"
        expected = tokenizer("gpt2").encode(text, add_special_tokens=False).ids
        assert np.frombuffer(made.encode([text])[0], np.int32).tolist() == expected
        assert len(made._middle) < 60
