"""Answers taken apart: golden transcripts of each family of templates, cut anywhere, and text nobody would write."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dlf.answers.dialects import Dialect, dialect_of
from edge_dlf.answers.message import MessageParser, MessageStream

TEMPLATES = {
    "plain": "{{ messages }}",
    "hermes": "{{ tools }}<tool_call></tool_call>",
    "qwen3": "{{ tools }}<tool_call></tool_call><think></think>",
    "qwen3-coder": "{{ tools }}<tool_call><function=",
    "deepseek-r1": "<think></think>",
    "llama3": "{{ tools }}<|start_header_id|>ipython",
    "mistral": "{{ tools }}[TOOL_CALLS]",
    "magistral": "{{ tools }}[TOOL_CALLS][ARGS][THINK][/THINK]",
    "gpt-oss": "{{ tools }}<|channel|><|message|>",
    "seed": "<seed:think></seed:think>",
    "command": "<|START_THINKING|><|END_THINKING|>",
}
TOOLS: dict[str, Any] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "time": {"type": "object", "properties": {}},
}
OSLO, NOW = ("weather", {"city": "Oslo"}), ("time", {})
HERMES_OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BARE_OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
NOT_JSON = "<tool_call>\nhello\n</tool_call>"
NOT_WHOLE, NOT_NAMED = '<tool_call>{"name": </tool_call>', '<tool_call>{"a": 1}</tool_call>'
Apart = tuple[str, str, list[tuple[str, Any]]]

GOLDEN: dict[str, tuple[str, str, Apart]] = {
    "no template has tags": ("plain", "<think>a</think> b", ("", "<think>a</think> b", [])),
    "white space is kept": ("hermes", "  hi \n", ("", "  hi \n", [])),
    "a call": ("hermes", HERMES_OSLO, ("", "", [OSLO])),
    "text before a call": ("hermes", f"Let me see.\n{HERMES_OSLO}", ("", "Let me see.", [OSLO])),
    "two calls": ("hermes", f"{HERMES_OSLO}\n{HERMES_NOW}", ("", "", [OSLO, NOW])),
    "two calls in one tag": (
        "hermes",
        '<tool_call>\n{"name": "time", "arguments": {}}\n{"name": "time"}\n</tool_call>',
        ("", "", [NOW, NOW]),
    ),
    "arguments as text": ("hermes", '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>', ("", "", [NOW])),
    "the end is missing": ("hermes", HERMES_OSLO.removesuffix("\n</tool_call>"), ("", "", [OSLO])),
    "the tag in an argument": (
        "hermes",
        HERMES_OSLO.replace("Oslo", "</tool_call>\\\"}"),
        ("", "", [("weather", {"city": '</tool_call>"}'})]),
    ),
    "in a code block": ("hermes", f"```json\n{BARE_OSLO}\n```", ("", "", [OSLO])),
    "in two code blocks": ("hermes", f"```json\n{BARE_OSLO}\n```\n\n```\n{BARE_OSLO}\n```", ("", "", [OSLO, OSLO])),
    "no block around it": ("hermes", f"{BARE_OSLO}\nDone.", ("", "Done.", [OSLO])),
    "code": ("hermes", "```json\n{}\n```", ("", "```json\n{}\n```", [])),
    "an unknown tool in a block": ("hermes", '```\n{"name": "x"}\n```', ("", '```\n{"name": "x"}\n```', [])),
    "cut short": ("hermes", HERMES_OSLO[:40], ("", HERMES_OSLO[:40], [])),
    "no JSON": ("hermes", f"{NOT_JSON}\n{HERMES_NOW}", ("", NOT_JSON, [NOW])),
    "JSON that ends early": ("hermes", NOT_WHOLE, ("", NOT_WHOLE, [])),
    "no name": ("hermes", NOT_NAMED, ("", NOT_NAMED, [])),
    "thinking": ("qwen3", "<think>\nHm <b>.\n</think>\n\nHello", ("Hm <b>.", "Hello", [])),
    "thinking and a call": ("qwen3", f"<think>\nHm.\n</think>\n\n{HERMES_OSLO}", ("Hm.", "", [OSLO])),
    "a call in thinking is a thought": ("qwen3", f"<think>{HERMES_NOW}</think>Hi", (HERMES_NOW, "Hi", [])),
    "no thought": ("qwen3", "<think>\n\n</think>\n\nHello", ("", "Hello", [])),
    "thinking cut short": ("qwen3", "<think>\nHm", ("Hm", "", [])),
    "tags in the answer": ("qwen3", "Write <think>x</think>", ("", "Write <think>x</think>", [])),
    "parameters as tags": (
        "qwen3-coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        ("", "", [("weather", {"city": "Oslo", "days": 3})]),
    ),
    "an open tag that was given": ("deepseek-r1", "<think>Hm</think>\nHi", ("Hm", "Hi", [])),
    "a bare call": ("llama3", '{"name": "weather", "parameters": {"city": "Oslo"}}', ("", "", [OSLO])),
    "a marked call": ("llama3", '<|python_tag|>{"name": "time", "parameters": {}}', ("", "", [NOW])),
    "two bare calls": ("llama3", '{"name": "time"}; {"name": "time"}', ("", "", [NOW, NOW])),
    "JSON that is no call": ("llama3", '{"name": "Ann", "age": 3}', ("", '{"name": "Ann", "age": 3}', [])),
    "braces": ("llama3", "{x} is a set", ("", "{x} is a set", [])),
    "a list of calls": (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}]',
        ("", "", [OSLO, NOW]),
    ),
    "names before arguments": (
        "magistral",
        '[THINK]Hm.[/THINK]One moment.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[CALL_ID]a1[ARGS]{}',
        ("Hm.", "One moment.", [OSLO, NOW]),
    ),
    "channels": (
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi",
        ("Hm.", "Hi", []),
    ),
    "a channel for a tool": (
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Oslo"}',
        ("Hm.", "", [OSLO]),
    ),
    "a recipient before its channel": (
        "gpt-oss",
        "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant to=functions.time<|channel|>commentary"
        "<|message|>{}",
        ("", "One moment.", [NOW]),
    ),
    "thinking of Seed": ("seed", "<seed:think>Hm.</seed:think>\nHi <think>", ("Hm.", "Hi <think>", [])),
    "thinking of Command": ("command", "<|START_THINKING|>Hm.<|END_THINKING|>Hi", ("Hm.", "Hi", [])),
    "no channel": ("gpt-oss", "Hello", ("", "Hello", [])),
}  # fmt: skip


def apart(dialect: Dialect, pieces: list[str], *, tools: bool = True, is_thinking: bool = False) -> Apart:
    """Thinking, content and calls of an answer that comes in these pieces."""
    parser = MessageParser(dialect, TOOLS if tools else None, is_thinking=is_thinking)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part.tool_calls]
    return "".join(part.reasoning for part in parts), "".join(part.text for part in parts), calls


@pytest.mark.parametrize("name", GOLDEN)
def test_each_family_s_answers_come_apart_however_they_are_cut(name: str) -> None:
    family, text, expected = GOLDEN[name]
    dialect = dialect_of(TEMPLATES[family])
    assert apart(dialect, [text]) == expected
    assert apart(dialect, list(text)) == expected
    for cut in range(len(text)):
        assert apart(dialect, [text[:cut], text[cut:]]) == expected, text[:cut]


def test_every_family_has_a_transcript() -> None:
    assert {family for family, _, _ in GOLDEN.values()} == set(TEMPLATES)


def test_thinking_that_the_prompt_has_begun() -> None:
    dialect = dialect_of(TEMPLATES["deepseek-r1"])
    assert apart(dialect, ["Hm", ".\n</th", "ink>\n", "\nHi"], is_thinking=True) == ("Hm.", "Hi", [])


def test_without_tools_calls_stay_text() -> None:
    for family in ("hermes", "llama3", "mistral"):
        text = GOLDEN["a call"][1]
        assert apart(dialect_of(TEMPLATES[family]), [text], tools=False) == ("", text, [])


@pytest.mark.parametrize("properties", [[1], "x", {"city": [1]}, {"city": {"type": {}}}, None])
def test_schemas_that_are_none_leave_a_call_as_it_is(properties: Any) -> None:
    parser = MessageParser(dialect_of(TEMPLATES["qwen3-coder"]), {"time": {"properties": properties}})
    text = "<tool_call>\n<function=time>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
    (call,) = (call for part in [*parser.push(text), *parser.finish()] for call in part.tool_calls)
    assert json.loads(call.arguments) == {"city": "Oslo"}


def test_stop_strings_end_the_content_and_no_thought() -> None:
    stream = MessageStream(["STOP"], MessageParser(dialect_of(TEMPLATES["qwen3"]), TOOLS))
    deltas = [stream.push(byte.encode()) for byte in "<think>STOP it</think>Hi ST and STOP more"] + [stream.finish()]
    assert "".join(delta.reasoning for delta in deltas) == "STOP it"
    assert "".join(delta.text for delta in deltas) == "Hi ST and "
    assert stream.stopped


def test_an_answer_of_one_call_ends_with_it() -> None:
    stream = MessageStream((), MessageParser(dialect_of(TEMPLATES["hermes"]), TOOLS), one_call=True)
    deltas = [stream.push(f"{HERMES_OSLO}\n{HERMES_NOW}".encode()), stream.finish()]
    assert [call.name for delta in deltas for call in delta.tool_calls] == ["weather"]
    assert stream.stopped


def test_characters_cut_in_two_come_whole() -> None:
    stream = MessageStream((), MessageParser(dialect_of(TEMPLATES["qwen3"])))
    deltas = [stream.push(bytes([byte])) for byte in "<think>é</think>漢".encode()] + [stream.finish()]
    assert ("".join(d.reasoning for d in deltas), "".join(d.text for d in deltas)) == ("é", "漢")


WORDS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "time", "arguments": {}}', '{"name": "weather"',
    '"arguments": {"city": "O\\"', "}", "{", "]", "[", ", ", '"', "\\", "\n", " ", "é", "text", "[TOOL_CALLS]", "time",
    "[ARGS]", "[THINK]", "[/THINK]", "<function=time>", "</function>", "<parameter=city>\n", "\n</parameter>",
    "<|python_tag|>", ";",
    "```", "```json", "`", "<|channel|>", "analysis", "final", "commentary to=functions.time", "<|message|>", "<|end|>",
    "<|start|>", "assistant", "<|call|>", "to=", "<", "</",
]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.sampled_from(WORDS), max_size=25).map("".join),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
)
def test_no_text_is_lost_or_doubled_and_no_cut_matters(
    family: str, text: str, cuts: list[int], is_thinking: bool
) -> None:
    dialect = dialect_of(TEMPLATES[family])
    is_thinking = is_thinking and dialect.tags is not None
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(ends)]
    whole = apart(dialect, [text], is_thinking=is_thinking)
    assert apart(dialect, pieces, is_thinking=is_thinking) == whole
    reasoning, content, calls = whole
    words = re.compile(r"text|é")
    n_in_calls = sum(len(words.findall(json.dumps(call, ensure_ascii=False))) for call in calls)
    found = len(words.findall(reasoning)) + len(words.findall(content)) + n_in_calls
    may_hide = dialect.is_harmony or (calls and family in ("qwen3-coder", "magistral"))  # marks with text in them
    if not may_hide:
        assert found == len(words.findall(text))
