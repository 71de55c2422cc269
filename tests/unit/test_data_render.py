"""Templates, masks, thinking and tool calls: what text an example becomes, and what is trained on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
from rows import parts, renderer

from job.data.normalise import Normaliser
from job.data.read import RowFault
from job.data.split import split_thinking

CHATML = tiny.CHATML
HARMONY = tiny.harmony_template()
USER = {"role": "user", "content": "Hi"}


def trl_template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


QWEN3, R1 = trl_template("qwen3"), trl_template("deepseek_r1_distill")


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def rendered(text: str, *messages: dict[str, Any], tools: Any = None, **how: Any) -> list[Any]:
    made = renderer(text, **how)(list(messages), tools, [])
    return [parts(one) for one in made]


def test_only_the_answer_and_its_stop_token_are_trained() -> None:
    """The header is the generation prompt's, the stop token is the model's to say."""
    whole, trained = rendered(CHATML, USER, answer("Hello"))[0]
    assert whole == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    assert trained == "Hello<|im_end|>"


def test_all_answers_of_a_plain_conversation_in_one_example() -> None:
    """Where history stays as it was, one example trains every turn."""
    found = rendered(CHATML, USER, answer("A"), USER, answer("B"), USER)
    assert [trained for _, trained in found] == ["A<|im_end|>B<|im_end|>"]


def test_train_on_all() -> None:
    """With train_on: all, everything carries loss."""
    whole, trained = rendered(CHATML, USER, answer("A"), train_on="all")[0]
    assert whole == trained


def test_thinking_of_several_turns_is_an_example_a_turn() -> None:
    """Earlier turns lose their thinking, so each turn is trained as the last one (trl#5109)."""
    turns = [USER, answer("A", thinking="a?"), USER, answer("B", thinking="b?")]
    found = rendered(HARMONY, *turns)
    assert [trained for _, trained in found] == [
        f"<|channel|>analysis<|message|>{n}?<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{n.upper()}<|return|>"
        for n in "ab"
    ]
    assert "a?" not in found[1][0]


def test_harmony_turns_without_thinking_end_as_they_would() -> None:
    """<|return|> is on the last turn only: gpt-oss has an example a turn, so that each learns it."""
    found = rendered(HARMONY, USER, answer("A"), USER, answer("B"))
    assert [trained.endswith("<|return|>") for _, trained in found] == [True, True]
    assert not found[0][1].startswith("<|start|>")


def test_unrendered_thinking_is_refused() -> None:
    """ChatML and SmolLM2's template drop thinking: that is an error, and the words say the mend."""
    with pytest.raises(RowFault, match=r"data\.thinking to tags or drop"):
        rendered(CHATML, USER, answer("A", thinking="hm"))


def test_thinking_dropped() -> None:
    """data.thinking: drop leaves the answer alone, however the thinking was written."""
    assert (
        rendered(CHATML, USER, answer("A", thinking="hm"), thinking="drop")[0][1] == "A<|im_end|>"
    )
    inline = answer("<think>hm</think>\n\nA")
    assert rendered(CHATML, USER, inline, thinking="drop")[0][1] == "A<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, R1])
def test_thinking_in_tags(template: str) -> None:
    """data.thinking: tags writes <think>…</think>, also where the template would cut it out."""
    whole, trained = rendered(template, USER, answer("A", thinking="hm"), thinking="tags")[0]
    assert "<think>\nhm\n</think>\n\nA" in whole
    assert trained.removeprefix("<think>\n").startswith("hm\n</think>\n\nA<")


def test_tags_of_earlier_turns_are_gone() -> None:
    """A chat shows a model its answers without their thinking; training does the same."""
    turns = [USER, answer("A", thinking="a?"), USER, answer("B", thinking="b?")]
    found = rendered(CHATML, *turns, thinking="tags")
    assert len(found) == 2
    assert "a?" not in found[1][0]
    assert "<|im_start|>assistant\nA<|im_end|>" in found[1][0]


def test_a_template_that_writes_tags_itself_writes_them_once() -> None:
    """Qwen3 has a place for thinking: keep and tags mean the same there."""
    turns = (USER, answer("A", thinking="hm"))
    kept = rendered(QWEN3, *turns)
    assert kept == rendered(QWEN3, *turns, thinking="tags")
    assert kept == rendered(QWEN3, USER, answer("<think>\nhm\n</think>\n\nA"))
    assert kept[0][1] == "<think>\nhm\n</think>\n\nA<|im_end|>"


def test_r1_keeps_the_thinking_of_the_trained_turn() -> None:
    """R1's template strips what stands before </think>; what is trained on keeps it."""
    turns = [USER, answer("<think>\na?\n</think>\n\nA"), USER, answer("<think>\nb?\n</think>\n\nB")]
    found = rendered(R1, *turns)
    assert [trained.split("</think>")[0].strip() for _, trained in found] == ["a?", "b?"]
    assert "a?" not in found[1][0]
    assert found[1][0].count("<think>") == 1


def test_r1_answer_without_thinking() -> None:
    """Where the generation prompt opens <think> and the answer has none, none is trained or shown."""
    whole, trained = rendered(R1, USER, answer("A"))[0]
    assert trained.startswith("A<")
    assert "<think>" not in whole


def test_inline_tags_stay_text_under_a_plain_template() -> None:
    """Data that has its reasoning in the text is trained on as it is."""
    text = "<think>hm</think>A"
    assert rendered(CHATML, USER, answer(text))[0][1] == text + "<|im_end|>"


def test_the_date_is_pinned_in_the_text() -> None:
    """The template's date is the run's, not today's, however the template asks for it."""
    assert "Current date: 2023-11-14" in rendered(HARMONY, USER, answer("A"))[0][0]
    asks = "{% set f = '%d' %}{% if strftime_now is defined %}{{ strftime_now(f) }}{% endif %}"
    assert rendered(asks + CHATML, USER, answer("A"))[0][0].startswith("14<|im_start|>")
    made = renderer(HARMONY)
    assert made.template is not None
    assert made.template.date == "2023-11-14"
    assert len(made.template.sha256) == 64


def test_developer_is_system_where_it_is_not_known() -> None:
    """A role that only gpt-oss has is rendered under the name that others have for it."""
    developer = {"role": "developer", "content": "Be brief."}
    assert "<|im_start|>system\nBe brief." in rendered(CHATML, developer, USER, answer("A"))[0][0]
    assert "# Instructions\n\nBe brief." in rendered(HARMONY, developer, USER, answer("A"))[0][0]


def test_generation_marks_are_understood() -> None:
    """A training template with {% generation %} renders like one without."""
    marked = trl_template("qwen3_training")
    assert rendered(marked, USER, answer("A"))[0][1].endswith("A<|im_end|>")


def test_a_lost_turn_is_refused() -> None:
    """A template that leaves out a turn's text, or all of it, is told on (landmine 8)."""
    no_users = CHATML.replace("{% for message", "{% for message").replace(
        "{{ message['content'] }}", "{{ message['content'] if message.role != 'user' }}"
    )
    with pytest.raises(RowFault, match="user turn that the chat template does not render"):
        rendered(no_users, USER, answer("A"))
    with pytest.raises(RowFault):
        rendered("nothing", USER, answer("A"))
    with pytest.raises(RowFault, match="no assistant turn"):
        rendered(CHATML, USER)


def test_a_refusing_template_is_quoted() -> None:
    """What the template itself says reaches the report."""
    with pytest.raises(RowFault, match="refused by the chat template: no tools"):
        rendered("{{ raise_exception('no tools') }}", USER, answer("A"))


TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {}}}


def test_a_tool_call_is_trained_to_its_stop() -> None:
    """gpt-oss's call ends with <|call|>, its arguments are JSON once."""
    row = {
        "messages": [
            USER,
            answer("", tool_calls=[{"function": {"name": "get", "arguments": '{"a": "ö\\"x"}'}}]),
        ]
    }
    example = Normaliser("messages", None, as_chat=True)(row)
    trained = rendered(HARMONY, *example.messages, tools=[TOOL])[0][1]
    assert trained == (
        ' to=functions.get<|channel|>commentary json<|message|>{"a": "ö\\"x"}<|call|>'
    )


def test_history_is_what_the_model_will_see() -> None:
    """After a call, the model still sees its analysis; the template drops it once it answered."""
    turns = [
        USER,
        answer("", thinking="call it", tool_calls=[call("get", a=1)]),
        {"role": "tool", "content": "42"},
        answer("It is 42.", thinking="seen"),
    ]
    found = rendered(HARMONY, *turns, tools=[TOOL])
    assert [one[1].rpartition("<|")[2] for one in found] == ["call|>", "return|>"]
    assert "call it" in found[1][0]
    assert found[1][1].startswith("<|channel|>analysis<|message|>seen<|end|>")


def test_parallel_tool_calls_never_vanish() -> None:
    """gpt-oss's template renders the first of several calls: such a turn is refused."""
    for second in (call("get", a=2), call("put", b=1), call("get", a=1)):
        with pytest.raises(RowFault, match="tool calls that the chat template does not render"):
            rendered(HARMONY, USER, answer("", tool_calls=[call("get", a=1), second]))
    both = answer("", tool_calls=[call("get", a=1), call("put", b=1)])
    assert rendered(QWEN3, USER, both)[0][1].count("<tool_call>") == 2


def test_calls_vanish_under_chatml() -> None:
    """A template without tool calls drops them: refused, never trained as an empty answer."""
    with pytest.raises(RowFault, match="tool calls"):
        rendered(CHATML, USER, answer("", tool_calls=[call("get", a=1)]))


ANALYSED = "<|channel|>analysis<|message|>hm<|end|>"
CALLED = (
    "<|start|>assistant to=functions.get<|channel|>commentary <|constrain|>json<|message|>"
    '{"a": 1}<|call|>'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            ANALYSED + "<|start|>assistant<|channel|>final<|message|>A<|return|>",
            ("hm", "A"),
        ),
        ("<|channel|>analysis<|message|>cut off", ("cut off", "")),
        ("<|channel|>final<|message|>A", ("", "A")),
        (
            ANALYSED + CALLED,
            ("hm", 'functions.get {"a": 1}'),
        ),
        ("<think>\nhm\n</think>\n\nA", ("hm", "A")),
        ("hm\n</think>\n\nA", ("hm", "A")),
        ("<think>cut off", ("cut off", "")),
        ("A", ("", "A")),
    ],
)
def test_analysis_and_answer_apart(text: str, expected: tuple[str, str]) -> None:
    """Harmony's channels and think tags are split by one rule."""
    assert split_thinking(text) == expected


def test_split_takes_special_tokens_out() -> None:
    """A tokenizer's special tokens are not part of what was said."""
    assert split_thinking("<think>a</think>b<|im_end|>", ["<|im_end|>"], "tags") == ("a", "b")


def test_differences_from_harmony_are_those_listed() -> None:
    """docs/harmony.md lists where the checkpoint's template leaves harmony; so it renders here."""
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        answer("", thinking="call", tool_calls=[call("get", a=1)]),
        {"role": "tool", "content": '{"b": 2}'},
        answer("Done."),
    ]
    whole = rendered(HARMONY, *turns, tools=None)[-1][0]
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>" in whole
    assert "<|start|>assistant to=functions.get<|channel|>commentary json<|message|>" in whole
    assert r'to=assistant<|channel|>commentary<|message|>"{\"b\": 2}"<|end|>' in whole
    assert whole.endswith("<|start|>assistant<|channel|>final<|message|>Done.<|return|>")
    assert "Reasoning: medium" in whole


def test_an_empty_thought_is_none() -> None:
    """The template would write an analysis of no words for thinking: ""."""
    row = {"messages": [USER, answer("A", thinking="")]}
    example = Normaliser("messages", None, as_chat=True)(row)
    assert "analysis<|message|>" not in rendered(HARMONY, *example.messages)[0][0]


def test_what_the_data_gives_to_read_is_not_trained() -> None:
    """Answers inside `prompt`, and turns of weight 0: TRL and OpenAI train neither."""
    old = [USER, answer("OLD"), USER]
    example = Normaliser("prompt+completion", None, as_chat=True)(
        {"prompt": old, "completion": [answer("NEW")]}
    )
    assert [trained for _, trained in rendered(CHATML, *example.messages)] == ["NEW<|im_end|>"]
    weighed = {"messages": [USER, answer("OLD", weight=0), USER, answer("NEW", weight=1)]}
    example = Normaliser("messages", None, as_chat=True)(weighed)
    [(whole, trained)] = rendered(CHATML, *example.messages)
    assert ("OLD" in whole, trained) == (True, "NEW<|im_end|>")
    only = Normaliser("messages", None, as_chat=True)({"messages": [USER, answer("OLD", weight=0)]})
    with pytest.raises(RowFault, match="no assistant turn to train on"):
        rendered(CHATML, *only.messages)
