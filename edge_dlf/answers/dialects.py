"""How families of chat templates mark thinking and tool calls: what an answer is read and constrained by.

The text of a chat template tells its family, as in llama.cpp. A dialect has one syntax of calls and one pair of tags
around thinking, either of which may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..system.jsonl import no_number

ToolSchemas: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Name of each tool that may be called, and the JSON schema of its arguments."""
Found: TypeAlias = tuple[list[tuple[str, str]], int]
"""Calls as (name, arguments), and the characters that they take."""

_BRACKET_OR_TEXT = r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]'
_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
)
"""Tags around thinking, of Qwen and DeepSeek, Mistral, Seed, Command, and others."""


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written.

    opens: what calls begin with.
    closes: what stands after a call, "" for nothing.
    read: text after `opens`, and the tools -> the calls at its beginning. None where more text has to come; ValueError
        where it is no call.
    prefix, suffix: what is written before and after the arguments of a call to {name}, `opens` and `closes` included.
    between: what is written between two calls; None where an answer has one call alone.
    is_bare: whether an answer may also be a call with nothing before it.
    """

    opens: str
    closes: str
    read: Callable[[str, ToolSchemas], Found | None]
    prefix: str
    suffix: str
    between: str | None = ""
    is_bare: bool = False


@dataclass(frozen=True)
class Dialect:
    """What marks the parts of an answer.

    tags: what stands before and after thinking. calls: None where the template knows no tools, or writes calls in a
    way that is not known here. control: names of control tokens that are part of the marks. is_harmony: whether an
    answer is messages with headers, as that of gpt-oss.
    """

    tags: tuple[str, str] | None = None
    calls: CallSyntax | None = None
    control: tuple[str, ...] = ()
    is_harmony: bool = False

    @property
    def can_think(self) -> bool:
        """Whether answers may hold thinking."""
        return self.tags is not None or self.is_harmony


def value_end(text: str, start: int, closes: str = "") -> int | None:
    """Return where the JSON object or list that begins at `start` ends; None where more text has to come.

    Raises ValueError where `closes` comes before its end.
    """
    depth = 0
    pattern = f"{_BRACKET_OR_TEXT}|{re.escape(closes)}" if closes else _BRACKET_OR_TEXT
    for match in re.compile(pattern, re.DOTALL).finditer(text, start):
        found = match[0]
        if found == closes:
            raise ValueError("the call ends inside its JSON")
        depth += (found in "{[") - (found in "}]")
        if depth == 0:
            return match.end()
    return None


_read_json = json.JSONDecoder(parse_constant=no_number).decode
"""Value of JSON. Raises ValueError for other text, RecursionError for JSON nested too deeply."""


def as_object(value: Any) -> str:
    """Return a JSON object, given as such or in text, on one line. Raises as `_read_json`."""
    value = _read_json(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError("the arguments of a call are a JSON object")
    return json.dumps(value, ensure_ascii=False)


def _json_calls(key: str, closes: str) -> Callable[[str, ToolSchemas], Found | None]:
    """Return what reads {"name": …, key: …}, or a list of such objects."""

    def read(text: str, tools: ToolSchemas) -> Found | None:
        start = len(text) - len(text.lstrip())
        if start == len(text):
            return None
        if text[start] not in "{[":
            raise ValueError("a call is a JSON object")
        if (end := value_end(text, start, closes)) is None:
            return None
        value = _read_json(text[start:end])
        return [_named(each, key) for each in (value if isinstance(value, list) else [value])], end

    return read


def _named(value: Any, key: str) -> tuple[str, str]:
    """Return name and arguments of one call. Small models mix up the names that families give the arguments."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call has a name")
    arguments: Any = next((value[name] for name in (key, "arguments", "parameters") if name in value), {})
    return value["name"], as_object(arguments)


def _mistral_calls(text: str, tools: ToolSchemas) -> Found | None:
    """Read name[ARGS]{…}, or the older list of objects."""
    if text.lstrip()[:1] in ("[", "{", ""):
        return _json_calls("arguments", "")(text, tools)
    head = re.match(r"\s{0,9}([^\[\]{}\s]{1,99})\s{0,9}(?:\[CALL_ID\][^\[\]{}]{0,99})?\[ARGS\]\s*", text)
    if head is None:
        if "{" in text or len(text) > 300:
            raise ValueError("a call has a name and arguments")
        return None
    return _after_name(text, head)


def _after_name(text: str, head: re.Match[str]) -> Found | None:
    """Read the arguments that follow the name in `head`."""
    start = head.end()
    if start == len(text):
        return None
    if text[start] != "{":
        raise ValueError("the arguments of a call are a JSON object")
    if (end := value_end(text, start)) is None:
        return None
    return [(head[1], as_object(text[start:end]))], end


def _xml_calls(text: str, tools: ToolSchemas) -> Found | None:
    """Read <function=name><parameter=name>value</parameter></function>."""
    begin = "<function="
    stripped = text.lstrip()
    if not (stripped.startswith(begin) or begin.startswith(stripped)):
        raise ValueError("a call begins with its function")
    end, wrong_end = text.find("</function>"), text.find("</tool_call>")
    if 0 <= wrong_end < (end if end >= 0 else len(text)):
        raise ValueError("the call ends before its function does")
    if end < 0:
        return None
    match = re.match(r"\s*<function=([^>\n]+)>(.*?)</function>", text, re.DOTALL)
    if match is None:
        raise ValueError("a call begins with its function")
    given = tools.get(match[1], {}).get("properties")
    properties = given if isinstance(given, Mapping) else {}
    pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", match[2], re.DOTALL)
    arguments = {name: _typed(value, properties.get(name)) for name, value in pairs}
    return [(match[1], json.dumps(arguments, ensure_ascii=False))], match.end()


def _typed(text: str, schema: Any) -> Any:
    """Return the value that `text` stands for: itself where it may be text, otherwise JSON."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" or (isinstance(kind, list) and "string" in kind):
        return text
    try:
        return _read_json(text)
    except (ValueError, RecursionError):
        return text


HERMES = CallSyntax(
    opens="<tool_call>",
    closes="</tool_call>",
    read=_json_calls("arguments", "</tool_call>"),
    prefix='<tool_call>\n{{"name": "{name}", "arguments": ',
    suffix="}}\n</tool_call>",
    between="\n",
    is_bare=True,
)
QWEN_XML = CallSyntax(opens="<tool_call>", closes="</tool_call>", read=_xml_calls, prefix="", suffix="")
LLAMA = CallSyntax(
    opens="<|python_tag|>",
    closes="",
    read=_json_calls("parameters", ""),
    prefix='{{"name": "{name}", "parameters": ',
    suffix="}}",
    between=None,
    is_bare=True,
)
MISTRAL = CallSyntax(
    opens="[TOOL_CALLS]",
    closes="",
    read=_mistral_calls,
    prefix='[TOOL_CALLS][{{"name": "{name}", "arguments": ',
    suffix="}}]",
    between=None,
)
MISTRAL_ARGS = CallSyntax(
    opens="[TOOL_CALLS]",
    closes="",
    read=_mistral_calls,
    prefix="[TOOL_CALLS]{name}[ARGS]",
    suffix="",
)
HARMONY = CallSyntax(
    opens="<|call|>",
    closes="",
    read=_mistral_calls,
    prefix="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
    suffix="",
    between=None,
)
_HARMONY_MARKS = (
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip


_CALL_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")


def dialect_of(template: str) -> Dialect:
    """Return the dialect of a chat template's text."""
    if "<|channel|>" in template and "<|message|>" in template:
        return Dialect(calls=HARMONY, control=_HARMONY_MARKS, is_harmony=True)
    tags = next((pair for pair in _TAGS if pair[1] in template), None)
    calls = _calls_of(template) if re.search(r"\btools\b", template) else None
    return Dialect(tags, calls, (*(tags or ()), *_CALL_MARKS))


def _calls_of(template: str) -> CallSyntax | None:
    if "<tool_call>" in template:
        return QWEN_XML if "<function=" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    return LLAMA if "<|start_header_id|>" in template else None
