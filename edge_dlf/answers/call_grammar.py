"""Grammars of tool calls, for llguidance: each call keeps to the JSON schema of its tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import require
from .dialects import QWEN_XML, CallSyntax, Dialect
from .forms import json_grammar
from .gbnf import OPTIONS
from .tools import Tools

_ANY_TEXT = r"/(.|\n)*/"


def call_grammar(
    dialect: Dialect,
    tools: Tools,
    answer: Mapping[str, Any] | None,
    control: Mapping[str, int],
) -> str:
    """Return the grammar of an answer that calls tools, or, unless it has to, may be text or JSON.

    answer: JSON schema of an answer that is no call; None for any text.
    control: name -> id of every control token.
    Raises InvalidParameterError where calls of this family cannot be kept to a schema.
    """
    calls = dialect.calls
    assert calls
    require(calls is not QWEN_XML, "this model writes arguments as tags: they cannot be kept to a JSON schema")

    def literal(text: str) -> str:
        marks = "|".join(map(re.escape, control)) or "(?!)"
        parts = re.split(f"({marks})", text)
        return " ".join(f"<[{control[part]}]>" if part in control else json.dumps(part) for part in parts if part)

    schemas = dict(tools.callable)
    if not tools.is_required:
        schemas = {name: schema if name in tools.strict else {"type": "object"} for name, schema in schemas.items()}
    rules = _rules(dialect, calls, tools, schemas, literal, has_answer=answer is not None)
    grammars: list[Mapping[str, Any]] = [{"name": "calls", "lark_grammar": OPTIONS + "\n".join(rules)}]
    numbered = [*schemas.values(), *([answer] if answer is not None else [])]
    grammars += [{**json_grammar(schema), "name": f"json_{n}"} for n, schema in enumerate(numbered)]
    return json.dumps({"grammars": grammars})


def _rules(
    dialect: Dialect,
    calls: CallSyntax,
    tools: Tools,
    names: Sequence[str] | Mapping[str, Any],
    literal: Callable[[str], str],
    *,
    has_answer: bool,
) -> list[str]:
    """Return the rules. An answer that may be any text is text up to what calls open with, a call, and so on."""
    suffix = calls.suffix.format()
    prefixes = [calls.prefix.format(name=name) for name in names]
    is_free = not (tools.is_required or has_answer)
    is_marked = is_free and calls.prefix.startswith(calls.opens)
    opened = len(calls.opens) if is_marked else 0
    rules = [
        "call: " + " | ".join(f"call_{n}" for n in range(len(prefixes))),
        *(f"call_{n}: {literal(prefix[opened:])} @json_{n} {literal(suffix)}" for n, prefix in enumerate(prefixes)),
    ]
    one = tools.one_call or calls.between is None
    several = "call" if one else f"call ({literal(calls.between or '')} call)*"
    answer = f"@json_{len(prefixes)}" if has_answer else _ANY_TEXT
    if dialect.is_harmony:
        final = f"{literal('<|channel|>final<|message|>')} {answer}"
        return [
            f"start: (thinking)? ({several}{'' if tools.is_required else ' | final'})",
            f"thinking: {literal('<|channel|>analysis<|message|>')} thought {literal('<|start|>assistant')}",
            f"final: {final}", *_up_to("thought", literal("<|end|>")), *rules,
        ]  # fmt: skip
    if is_marked:
        return ["start: (before call)* TEXT", f"TEXT: {_ANY_TEXT}", *_up_to("before", literal(calls.opens)), *rules]
    if tools.is_required:
        return [f"start: {several}", *rules]
    text = answer if has_answer else "TEXT"
    return [f"start: {several} | {text}", *([] if has_answer else [r"TEXT: /([^{\s](.|\n)*)?/"]), *rules]


def _up_to(name: str, mark: str) -> list[str]:
    """Return the rule of any text that ends with its first mark: a control token ends text by itself."""
    return [f"{name}: {_ANY_TEXT} {mark}" if mark.startswith("<[") else f"{name}[lazy]: {_ANY_TEXT} {mark}"]
