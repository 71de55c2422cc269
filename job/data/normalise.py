"""Rows of every shape become one: an Example of turns (role, content, thinking, tool_calls).

The shape is told from many rows: the first row alone proves nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from job.config import Mapping
from job.data.read import RowFault
from job.errors import ExitCode, JobError

Shape = Literal["preference", "messages", "prompt+completion", "alpaca", "text", "mapping"]

Message = dict[str, Any]
"""`role` and `content` always; `thinking`, `tool_calls`, `name`, `tool_call_id` only if there."""

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
COLUMNS: dict[Shape, Mapping] = {
    "messages": Mapping(messages="messages"),
    "prompt+completion": Mapping(prompt="prompt", completion="completion"),
    "alpaca": Mapping(prompt="instruction", completion="output"),
    "text": Mapping(text="text"),
}
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response"), "tool"
    ),
}
CONTEXT = "_context"
"""A turn's mark: it is read, and not trained on."""
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")


@dataclass(slots=True)
class Example:
    """One row: a conversation with the tools it may call, or plain text after an untrained prompt."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    text: str | None = None


def recognise(sample: list[dict[str, Any]], where: str) -> Shape:
    """Return the most trusted shape that at least half of the sampled rows have.

    Raises:
        JobError: 65 for rows of no known shape, and for preference pairs.
    """
    shape = next(
        (s for s in NEEDED if sum(_fits(s, row) for row in sample) * 2 >= len(sample)), None
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


def _fits(shape: Shape, row: dict[str, Any]) -> bool:
    return all(any(row.get(name) is not None for name in names) for names in NEEDED[shape])


class Normaliser:
    """Makes an Example of a row.

    Args:
        shape: What the rows are.
        mapping: The job file's, if ``shape`` is "mapping".
        as_chat: Whether a prompt and its completion become turns (there is a chat template), or
            stay plain text, one after the other.
    """

    def __init__(self, shape: Shape, mapping: Mapping | None, *, as_chat: bool) -> None:
        self._names = mapping or COLUMNS[shape]
        self._roles = ROLES | {name.lower(): role for name, role in self._names.roles.items()}
        self._shape, self._as_chat = shape, as_chat

    def __call__(self, row: dict[str, Any]) -> Example:
        """Return the row's example.

        Raises:
            RowFault: it can't be one.
            JobError: 65 for a conversation where there is no chat template.
        """
        if self._names.text is not None:
            return Example(text=_text(row.get(self._names.text), self._names.text))
        if self._names.messages is None:
            return self._pair(row)
        column = self._names.messages
        if self._shape == "messages":
            column = next((name for name in TURN_COLUMNS if row.get(name) is not None), column)
        turns = _parsed(row.get(column))
        if not isinstance(turns, list) or not turns:
            raise RowFault(f"has no turns in {column}")
        return self._chat([self._turn(turn) for turn in turns], row)

    def _pair(self, row: dict[str, Any]) -> Example:
        names = self._names
        assert names.prompt is not None
        assert names.completion is not None
        prompt = _perhaps_turns(row.get(names.prompt))
        completion = _perhaps_turns(row.get(names.completion))
        if self._shape == "alpaca" and row.get("input"):
            prompt = f"{_text(prompt, names.prompt)}\n\n{_text(row['input'], 'input')}"
        if not (self._as_chat or isinstance(prompt, list) or isinstance(completion, list)):
            prompt, completion = _text(prompt, names.prompt), _text(completion, names.completion)
            return Example(prompt=prompt, text=completion)
        asked = [{**it, CONTEXT: True} for it in self._side(prompt, "user", names.prompt)]
        turns = [*asked, *self._side(completion, "assistant", names.completion)]
        if names.thinking and row.get(names.thinking):
            turns[-1]["thinking"] = _text(row[names.thinking], names.thinking)
        return self._chat(turns, row)

    def _side(self, value: Any, role: str, column: str) -> list[Message]:
        if isinstance(value, list):
            return [self._turn(turn) for turn in value]
        return [{"role": role, "content": _text(value, column)}]

    def _chat(self, turns: list[Message], row: dict[str, Any]) -> Example:
        if not self._as_chat:
            raise JobError(
                ExitCode.DATA, "data.source",
                "holds conversations, and the model has no chat template",
                "give one in model.chat_template",
            )  # fmt: skip
        column = self._names.system or ("system" if self._shape != "mapping" else "")
        named = self._names.system or turns[0]["role"] not in ("system", "developer")
        if named and row.get(column):
            turns.insert(0, {"role": "system", "content": _text(row[column], column)})
        return Example(turns, _tools(row))

    def _turn(self, turn: Any) -> Message:
        """Return one turn in our words, whatever the data's names for role and content are."""
        if not isinstance(turn, dict):
            raise RowFault("has a turn that is no object with role and content")
        named = turn.get(self._names.role, turn.get("from"))
        role = self._roles.get(str(named).lower())
        if role is None:
            known = "system, user, assistant, tool, human, gpt, …"
            raise RowFault(f"has a turn of unknown role {str(named)[:40]!r} (known: {known})")
        content = turn.get(self._names.content)
        content = turn.get("value") if content is None else content
        if role == "function_call":
            return {"role": "assistant", "content": "", "tool_calls": _calls(_parsed(content))}
        message: Message = {"role": role, "content": _content(content)}
        if role == "assistant":
            # OpenAI's word for an answer that is there to be read only.
            read_only = {CONTEXT: True} if turn.get("weight") == 0 else {}
            return self._answer(message, turn) | read_only
        if role == "tool":
            message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
        return message

    def _answer(self, message: Message, turn: dict[str, Any]) -> Message:
        """Complete an assistant's turn: it must say, think or call something."""
        keys = (self._names.thinking or "thinking", *THINKING_KEYS)
        thinking = next((turn[key] for key in keys if turn.get(key)), "")
        if not isinstance(thinking, str):
            raise RowFault("has `thinking` that is no text")
        if thinking.strip():
            message["thinking"] = thinking
        if turn.get("tool_calls"):
            message["tool_calls"] = _calls(_parsed(turn["tool_calls"]))
        if not message["content"].strip() and len(message) == 2:
            raise RowFault("has an assistant turn that says nothing")
        return message


def _perhaps_turns(value: Any) -> Any:
    """Return turns if they are some; an answer that happens to be JSON stays the text it is."""
    parsed = _parsed(value)
    if isinstance(parsed, list) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in parsed
    ):
        return parsed or ""
    return value


def _content(value: Any) -> str:
    """Return a turn's text; the parts of typed content are joined, and only text is known."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, dict | str) for part in value):
        parts = [part if isinstance(part, str) else part.get("text") for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise RowFault("has a turn whose content is no text")


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return tool calls the way templates expect them, arguments as an object (not as its JSON)."""
    return [_call(call) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any) -> dict[str, Any]:
    function = _parsed(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault("has a tool call without a name")
    arguments = _parsed(function.get("arguments", function.get("parameters")) or {})
    if not isinstance(arguments, dict):
        raise RowFault("has a tool call whose arguments are no JSON object")
    known = {"id": call["id"]} if call.get("id") else {}
    said = {"name": function["name"], "arguments": arguments}
    return {**known, "type": "function", "function": said}


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _parsed(row.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("has tools that are no list of JSON schemas")
    # Templates read `tool.function`; bare schemas are as common in data.
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def _parsed(value: Any) -> Any:
    """Return ``value``, read as JSON if it is a string that holds an object or a list (csv does)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowFault(f"has no text in {column}")
    return value
