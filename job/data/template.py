"""A model's chat template: compiled once, its date pinned, and probed for what it does.

The environment is the one that transformers renders with (sandboxed, blocks trimmed, `tojson`
that keeps characters), built without importing torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from typing import Any

from job.data.normalise import Message
from job.data.read import RowFault
from job.errors import ExitCode, JobError

# TRL and newer templates mark what the assistant generates; our masks don't need the marks.
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Before such a character in a probe, what follows it is the template's own text.
PROBE = "\u2603"
OPEN, CLOSE = "<think>", "</think>"


class Template:
    """A chat template that renders the same text today and tomorrow.

    Args:
        text: The Jinja source, as the checkpoint or the job file has it.
        started: Unix seconds: what ``strftime_now`` answers (UTC).
        variables: ``bos_token``, ``eos_token`` and the like.

    Raises:
        JobError: 65 if the text is no Jinja.
    """

    def __init__(self, text: str, *, started: float, variables: dict[str, str]) -> None:
        self.text = text
        self.date = time.strftime("%Y-%m-%d", time.gmtime(started))
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._variables = variables
        self._compiled = self._compile(time.gmtime(started))

    def _compile(self, now: time.struct_time) -> Any:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: time.strftime(form, now)
        text = GENERATION.sub(
            lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", self.text
        )
        try:
            compiled = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise JobError(
                ExitCode.DATA,
                "chat template",
                f"is no Jinja: {error}",
                "mend model.chat_template, or leave it out to use the tokenizer's own",
            ) from error
        # A ChainMap that is read whole for every render; nothing is added to it any more.
        compiled.globals = dict(compiled.globals)
        return compiled

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation: bool = False,
    ) -> str:
        """Return the conversation as text; with ``generation``, up to where the answer begins.

        Raises:
            RowFault: the template can't render it.
        """
        import jinja2

        try:
            return str(
                self._compiled.render(
                    messages=[_aliased(message) for message in messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=generation,
                    **self._variables,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            words = " ".join(str(error).split())[:160]
            raise RowFault(f"is refused by the chat template: {words}") from error

    def _probe(self, *messages: Message) -> str:
        try:
            return self.render(list(messages))
        except RowFault:
            return ""

    @functools.cached_property
    def renders_thinking(self) -> bool:
        """Whether the last turn's `thinking` reaches the text."""
        answer = {"role": "assistant", "content": "b", "thinking": PROBE}
        return PROBE in self._probe({"role": "user", "content": "a"}, answer)

    @functools.cached_property
    def writes_think_tags(self) -> bool:
        """Whether it puts `thinking` into tags by itself (Qwen3's kind)."""
        answer = {"role": "assistant", "content": "b", "thinking": PROBE}
        before, _, after = self._probe({"role": "user", "content": "a"}, answer).partition(PROBE)
        return before.rstrip().endswith(OPEN) and after.lstrip().startswith(CLOSE)

    @functools.cached_property
    def opening(self) -> str:
        """What the generation prompt begins that an answer without reasoning lacks (R1's <think>)."""
        user = {"role": "user", "content": "a"}
        answered = self._probe(user, {"role": "assistant", "content": PROBE}).partition(PROBE)[0]
        prompt = self.render([user], generation=True)
        return prompt.removeprefix(answered) if prompt.startswith(answered) else ""

    @functools.cached_property
    def strips_think_tags(self) -> bool:
        """Whether reasoning written into an answer by tags is cut out (DeepSeek-R1's kind)."""
        answer = {"role": "assistant", "content": f"<think>{PROBE}</think>b"}
        text = self._probe({"role": "user", "content": "a"}, answer)
        return bool(text) and PROBE not in text

    @functools.cached_property
    def is_incremental(self) -> bool:
        """Whether an earlier turn is rendered as it was when it was the last one."""
        turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
        first = self._probe(*turns[:2])
        return bool(first) and self._probe(*turns).startswith(first)

    @functools.cached_property
    def knows_developer(self) -> bool:
        """Whether `developer` is a role here; elsewhere it is called `system`."""
        return "developer" in self.text

    @functools.cached_property
    def endings(self) -> dict[str, str]:
        """What follows an answer, and a tool call: a stop token should be in it."""
        user = {"role": "user", "content": "a"}
        call = {"type": "function", "function": {"name": "f", "arguments": {"b": PROBE}}}
        answers: dict[str, Message] = {
            "answer": {"role": "assistant", "content": PROBE},
            "call": {"role": "assistant", "content": "", "tool_calls": [call]},
        }
        texts = {kind: self._probe(user, answer) for kind, answer in answers.items()}
        return {kind: text.rpartition(PROBE)[2] for kind, text in texts.items() if PROBE in text}


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Return JSON as chat templates expect it; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _aliased(message: Message) -> Message:
    """Give the reasoning under both names that templates read it by."""
    if "thinking" not in message:
        return message
    return {**message, "reasoning_content": message["thinking"]}
