"""Rows of every shape become one: an Example of turns (role, content, thinking, tool_calls)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from job.config import Mapping
from job.data.read import RowFault
from job.data.recognise import TURN_COLUMNS, Shape

Message = dict[str, Any]
"""`role` and `content` always; `thinking`, `tool_calls`, `name`, `tool_call_id` only if there."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")


@dataclass(slots=True)
class Example:
    """One row: a conversation with the tools it may call, or plain text after an untrained prompt."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    text: str | None = None


Normalise = Callable[[dict[str, Any]], Example]


def normaliser(shape: Shape, mapping: Mapping | None, *, as_chat: bool) -> Normalise:
    """Return the function that makes an Example of a row.

    Args:
        shape: What the rows are.
        mapping: The job file's, if ``shape`` is "mapping".
        as_chat: Whether a prompt and its completion become turns (there is a chat template), or
            stay plain text, one after the other.
    """
    if mapping is not None:
        return lambda row: _mapped(row, mapping, as_chat)
    table: dict[str, Normalise] = {
        "messages": _turns,
        "prompt+completion": lambda row: _pair(row, as_chat),
        "alpaca": lambda row: _alpaca(row, as_chat),
        "text": lambda row: Example(text=_text(row.get("text"), "text")),
    }
    return table[shape]


def _turns(row: dict[str, Any]) -> Example:
    column = next((name for name in TURN_COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise RowFault("has no messages")
    turns = [_turn(turn, Mapping(messages=column), ROLES) for turn in _list(row[column], column)]
    system = row.get("system")
    if system and turns and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": _text(system, "system")})
    return Example(_some(turns, column), _tools(row))


def _pair(row: dict[str, Any], as_chat: bool) -> Example:
    prompt, completion = _perhaps_turns(row.get("prompt")), _perhaps_turns(row.get("completion"))
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = [*_side(prompt, "user"), *_side(completion, "assistant")]
        return Example(turns, _tools(row))
    return _question(_text(prompt, "prompt"), _text(completion, "completion"), None, as_chat, row)


def _perhaps_turns(value: Any) -> Any:
    """Return turns if they are some; an answer that happens to be JSON stays the text it is."""
    parsed = _parsed(value)
    turns = isinstance(parsed, list) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in parsed
    )
    return parsed if turns else value


def _side(value: Any, role: str) -> list[Message]:
    if isinstance(value, list):
        return [_turn(turn, Mapping(messages="messages"), ROLES) for turn in value]
    return [{"role": role, "content": _text(value, "prompt" if role == "user" else "completion")}]


def _alpaca(row: dict[str, Any], as_chat: bool) -> Example:
    question = _text(row.get("instruction"), "instruction")
    if row.get("input"):
        question = f"{question}\n\n{_text(row['input'], 'input')}"
    return _question(question, _text(row.get("output"), "output"), row.get("system"), as_chat, row)


def _question(
    prompt: str, completion: str, system: Any, as_chat: bool, row: dict[str, Any]
) -> Example:
    if not as_chat:
        return Example(prompt=prompt, text=completion)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if system:
        turns.insert(0, {"role": "system", "content": _text(system, "system")})
    return Example(turns, _tools(row))


def _mapped(row: dict[str, Any], mapping: Mapping, as_chat: bool) -> Example:
    if mapping.text is not None:
        return Example(text=_text(row.get(mapping.text), mapping.text))
    system = row.get(mapping.system) if mapping.system else None
    if mapping.messages is None:
        assert mapping.prompt is not None
        assert mapping.completion is not None
        prompt = _text(row.get(mapping.prompt), mapping.prompt)
        completion = _text(row.get(mapping.completion), mapping.completion)
        example = _question(prompt, completion, system, as_chat, row)
        if mapping.thinking and row.get(mapping.thinking) and as_chat:
            example.messages[-1]["thinking"] = _text(row[mapping.thinking], mapping.thinking)
        return example
    roles = {**ROLES, **{name.lower(): role for name, role in mapping.roles.items()}}
    values = _list(row.get(mapping.messages), mapping.messages)
    turns = [_turn(turn, mapping, roles) for turn in values]
    if system:
        turns.insert(0, {"role": "system", "content": _text(system, "system")})
    return Example(_some(turns, mapping.messages), _tools(row))


def _turn(turn: Any, mapping: Mapping, roles: dict[str, str]) -> Message:
    """Return one turn in our words, whatever the data's names for role and content are."""
    if not isinstance(turn, dict):
        raise RowFault("has a turn that is no object with role and content")
    named = turn.get(mapping.role, turn.get("from"))
    role = roles.get(str(named).lower())
    if role is None:
        known = "system, user, assistant, tool, human, gpt, …"
        raise RowFault(f"has a turn of unknown role {str(named)[:40]!r} (known: {known})")
    content = turn.get(mapping.content)
    content = turn.get("value") if content is None else content
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(_parsed(content))}
    message: Message = {"role": role, "content": _content(content)}
    if role == "assistant":
        return _answer(message, turn, mapping)
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return message


def _answer(message: Message, turn: dict[str, Any], mapping: Mapping) -> Message:
    """Complete an assistant's turn: it must say, think or call something."""
    keys = (mapping.thinking, *THINKING_KEYS) if mapping.thinking else THINKING_KEYS
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


def _content(value: Any) -> str:
    """Return a turn's text; the parts of typed content are joined, and only text is known."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict | str) for part in value):
        parts = [part if isinstance(part, str) else part.get("text") for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise RowFault("has a turn whose content is no text")


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return tool calls the way templates expect them, arguments as an object (not as its JSON)."""
    calls = value if isinstance(value, list) else [value]
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = _parsed(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault("has a tool call without a name")
    arguments = _parsed(function.get("arguments", function.get("parameters")) or {})
    if not isinstance(arguments, dict):
        raise RowFault("has a tool call whose arguments are no JSON object")
    assert isinstance(call, dict)
    known = {"id": call["id"]} if call.get("id") else {}
    return {
        **known,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _parsed(row.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("has tools that are no list of JSON schemas")
    # Templates read `tool.function`; bare schemas are as common in data.
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def _list(value: Any, column: str) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list):
        raise RowFault(f"has no list in {column}")
    return value


def _some(turns: list[Message], column: str) -> list[Message]:
    if not turns:
        raise RowFault(f"has no turns in {column}")
    return turns


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
