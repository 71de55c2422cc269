"""An Example becomes text in segments, each trained on or not.

What is trained on is what the model has to say: from where the generation prompt ends to the
token that ends the turn. Text of a row is hidden behind private-use characters ("slots") where
it looks like a control token, so that neither template nor tokenizer takes it for one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from job.data.normalise import CONTEXT, Message
from job.data.read import RowFault
from job.data.template import CLOSE, OPEN, Template

FIRST_SLOT, LAST_SLOT = 0xF0000, 0xF0FFD
OPEN_SLOT, CLOSE_SLOT = chr(0xF0FFE), chr(0xF0FFF)
SLOT = re.compile("[\U000f0000-\U000f0fff]")
# The first bytes of a slot in UTF-8: what a row must not hold without being hidden itself.
SLOT_BYTES = b"\xf3\xb0"

Thinking = Literal["keep", "drop", "tags"]


@dataclass(slots=True)
class Rendered:
    """One example as text: segments with whether they are trained on, and what slots stand for."""

    segments: list[tuple[str, bool]]
    slots: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text, as a person reads it."""
        return self.shown("".join(text for text, _ in self.segments))

    def shown(self, text: str) -> str:
        """Return ``text`` with its slots filled."""
        if not self.slots:
            return text
        return SLOT.sub(lambda found: self.slots[ord(found[0]) - FIRST_SLOT], text)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the segments with their masks, as the data report shows them."""
        return [{"text": self.shown(text), "trained": on} for text, on in self.segments if text]


class Hidden:
    """The slots of one row: each text that looks like a control token has one of its own."""

    def __init__(self, special_tokens: list[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._heads = [SLOT_BYTES, *{token[:2].encode() for token in special_tokens}]
        pattern = "|".join([*map(re.escape, longest_first), SLOT.pattern])
        self._tokens = re.compile(pattern)

    def messages(self, messages: list[Message], slots: list[str]) -> list[Message]:
        """Return turns with such texts in slots."""
        return [
            {
                key: value if key == "role" else self.hide(value, slots)
                for key, value in turn.items()
            }
            for turn in messages
        ]

    def hide(self, value: Any, slots: list[str]) -> Any:
        """Return ``value`` (text, or text in lists and objects) with such texts in slots.

        Raises:
            RowFault: the text can't be encoded as UTF-8, or has thousands of such texts.
        """
        if isinstance(value, str):
            return self._text(value, slots)
        if isinstance(value, dict):
            return {self._text(key, slots): self.hide(item, slots) for key, item in value.items()}
        return [self.hide(item, slots) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, slots: list[str]) -> str:
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            raise RowFault("holds characters that are not UTF-8") from None
        for head in self._heads:  # `in` is many times as fast as the expression
            if head in encoded:
                return self._tokens.sub(lambda found: self._slot(found[0], slots), text)
        return text

    def _slot(self, text: str, slots: list[str]) -> str:
        if text not in slots:
            slots.append(text)
        number = FIRST_SLOT + slots.index(text)
        if number > LAST_SLOT:
            raise RowFault("holds too many texts that look like control tokens")
        return chr(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    """How the conversations of one job become text."""

    template: Template
    special_tokens: list[str]
    train_on: Literal["assistant", "all"] = "assistant"
    thinking: Thinking = "keep"

    def __call__(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, slots: list[str]
    ) -> list[Rendered]:
        """Return what is trained on of a conversation (with its slots): one example or several.

        Raises:
            RowFault: something in it would be lost.
        """
        given = {at for at, message in enumerate(messages) if message.get(CONTEXT)}
        plain = ({k: v for k, v in it.items() if k != CONTEXT} for it in messages)
        turns = [self._adapted(message) for message in plain]
        return [Rendered(it, slots) for it in self._conversation(turns, tools, given)]

    def _adapted(self, message: Message) -> Message:
        """Return a turn as this template takes it: roles that it knows, reasoning where it looks."""
        if message["role"] == "developer" and not self.template.knows_developer:
            return {**message, "role": "system"}
        if message["role"] != "assistant":
            return message
        if "thinking" not in message and CLOSE in message["content"]:
            message = self._split_tags(message)
        if self.thinking == "drop" and "thinking" in message:
            return {key: value for key, value in message.items() if key != "thinking"}
        return message

    def _split_tags(self, message: Message) -> Message:
        """Take reasoning out of the text if it is to be dropped, or has a place of its own."""
        keeps = not self.template.renders_thinking and self.thinking == "keep"
        if keeps and not self.template.strips_think_tags:
            return message
        thinking, _, content = message["content"].partition(CLOSE)
        thinking = thinking.removeprefix(OPEN).strip()
        said = {**message, "content": content.lstrip("\n")}
        if not thinking:
            return said
        return {**said, "thinking": thinking, **({"tagged": True} if keeps else {})}

    def _conversation(
        self, turns: list[Message], tools: list[dict[str, Any]] | None, given: set[int]
    ) -> list[list[tuple[str, bool]]]:
        """Return the segments of every example that a conversation makes; ``given`` is only read."""
        said = {at for at, turn in enumerate(turns) if turn["role"] == "assistant"}
        answers = sorted(said - given)
        if not answers:
            raise RowFault(f"has no assistant turn{' to train on' if said else ''}")
        if self.train_on == "all":
            return [[(self._all(turns, tools, answers), True)]]
        thinks = any("thinking" in turns[at] for at in answers)
        if len(answers) == 1 or (self.template.is_incremental and not thinks):
            segments = self._incremental(turns, tools, answers)
            if segments is not None:
                return [segments]
        return [self._last(turns[: at + 1], tools) for at in answers]

    def _all(self, turns: list[Message], tools: Any, answers: list[int]) -> str:
        tagged = [self._tagged(turn, trained=True) for turn in turns]
        text = self._render(tagged, tools)
        for at in answers:
            self._check(turns[at], text)
        _check_rest(turns, text)
        return text

    def _incremental(
        self, turns: list[Message], tools: Any, answers: list[int]
    ) -> list[tuple[str, bool]] | None:
        """Return the conversation with all its answers trained, or None if history changes."""
        turns = [self._tagged(turn, trained=True) for turn in turns[: answers[-1] + 1]]
        text = self._render(turns, tools)
        segments, done = [], 0
        for at in answers:
            start = self._render(turns[:at], tools, generation=True)
            is_last = at == answers[-1]
            end = text if is_last else self._render(turns[: at + 1], tools)
            if not text.startswith(start) or not text.startswith(end) or len(start) < done:
                return None
            answer, rest = self._cut(text[len(start) : len(end)])
            self._check(turns[at], answer)
            segments += [(text[done : len(start)], False), (answer, True)]
            done = len(end) - len(rest)
        _check_rest(turns, text)
        return segments

    def _last(self, turns: list[Message], tools: Any) -> list[tuple[str, bool]]:
        """Return one example that ends with its last turn, the only one trained on.

        Its history is rendered as the model will see it when it has to give that answer.
        """
        history = [self._tagged(turn, trained=False) for turn in turns[:-1]]
        turn = self._tagged(turns[-1], trained=True)
        prompt = self._render(history, tools, generation=True)
        full = self._render([*history, turn], tools)
        closed = prompt.removesuffix(self.template.opening)
        if full.startswith(prompt):
            answer = full[len(prompt) :]
        elif full.startswith(closed):
            prompt, answer = closed, full[len(closed) :]
        else:
            answer = self._tail(turn, full)
        answer, _ = self._cut(answer)
        self._check(turn, answer)
        _check_rest(turns[:-1], prompt)
        return [(prompt, False), (answer, True)]

    def _tail(self, turn: Message, full: str) -> str:
        """Return the answer's own text where the template rewrites its history once it is given.

        (gpt-oss drops a tool call's analysis then.) The turn is rendered after one question
        alone, and must end the full conversation in the same words.
        """
        question: list[Message] = [{"role": "user", "content": "a"}]
        before = self._render(question, generation=True)
        alone = self._render([*question, turn])
        tail = alone[len(before) :]
        if not tail or not alone.startswith(before) or not full.endswith(tail):
            raise RowFault("has an answer that the chat template does not put after its prompt")
        return tail

    def _tagged(self, turn: Message, *, trained: bool) -> Message:
        """Write reasoning into the answer as <think>…</think>, where the job file says so.

        An earlier turn loses it, as it does in a chat. Tags are hidden from templates that would
        cut them out of the answer that is trained on.
        """
        asked = self.thinking == "tags" and not self.template.writes_think_tags
        if "thinking" not in turn or not (asked or "tagged" in turn):
            return turn
        plain = {key: turn[key] for key in turn if key not in ("thinking", "tagged")}
        if not trained:
            return plain
        hidden = self.template.strips_think_tags
        opening, closing = (OPEN_SLOT, CLOSE_SLOT) if hidden else (OPEN, CLOSE)
        body = f"{opening}\n{turn['thinking'].strip()}\n{closing}\n\n{turn['content'].strip()}"
        return {**plain, "content": body}

    def _render(self, turns: list[Message], tools: Any = None, *, generation: bool = False) -> str:
        return _filled(self.template.render(turns, tools, generation=generation))

    def _cut(self, answer: str) -> tuple[str, str]:
        """Split what the model says, stop token included, from what the template puts after it."""
        bare = answer.rstrip()
        ends = bare.endswith(tuple(self.special_tokens))
        return (bare, answer[len(bare) :]) if ends else (answer, "")

    def _check(self, turn: Message, answer: str) -> None:
        """Refuse a trained turn of which the template leaves something out."""
        opened = self.template.opening.strip()  # the generation prompt says it, not the model
        if _filled(turn["content"]).strip().removeprefix(opened).strip() not in answer:
            raise RowFault("has an answer that the chat template does not render whole")
        if turn.get("thinking", "").strip() not in answer:
            raise RowFault(
                "has `thinking` that the chat template does not render"
                " (set data.thinking to tags or drop)"
            )
        calls = turn.get("tool_calls", [])
        names = [call["function"]["name"] for call in calls]
        lost = any(answer.count(name) < names.count(name) for name in names)
        leaves = [leaf for call in calls for leaf in _leaves(call["function"]["arguments"])]
        if lost or any(leaf not in answer and _escaped(leaf) not in answer for leaf in leaves):
            raise RowFault(
                "has tool calls that the chat template does not render all"
                " (one call a turn is what it knows)"
            )


def _check_rest(turns: list[Message], text: str) -> None:
    """Refuse a conversation that loses a turn that is no answer."""
    for turn in turns:
        said = turn["content"].strip()
        if turn["role"] != "assistant" and said not in text and _escaped(said) not in text:
            raise RowFault(f"has a {turn['role']} turn that the chat template does not render")


def _filled(text: str) -> str:
    return text.replace(OPEN_SLOT, OPEN).replace(CLOSE_SLOT, CLOSE)


def _leaves(value: Any) -> list[str]:
    """Return the texts and numbers in a call's arguments: what must be seen of them."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
