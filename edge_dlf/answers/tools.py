"""Tools that an answer may call: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`, read and checked."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidParameterError, require, shown

_ID_LETTERS = string.ascii_letters + string.digits
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer makes. arguments: text of a JSON object."""

    id: str
    name: str
    arguments: str

    @classmethod
    def new(cls, name: str, arguments: str) -> ToolCall:
        """Make a call with an id of its own: nine letters and digits, which is all that Mistral's templates take."""
        return cls("".join(secrets.choice(_ID_LETTERS) for _ in range(9)), name, arguments)

    def dictionary(self, index: int | None = None) -> dict[str, Any]:
        """Return it as OpenAI has it. index: its number among the calls of a streamed answer."""
        function = {"name": self.name, "arguments": self.arguments}
        numbered = {} if index is None else {"index": index}
        return {**numbered, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Tools:
    """Tools of one request.

    definitions: as the request gave them, for the chat template.
    callable: name -> JSON schema of the arguments, of those that the answer may call.
    strict: names of those whose arguments are always kept to their schema.
    is_required: whether the answer has to be a call.
    one_call: whether it ends after its first call.
    """

    definitions: tuple[Mapping[str, Any], ...]
    callable: Mapping[str, Mapping[str, Any]]
    strict: frozenset[str] = frozenset()
    is_required: bool = False
    one_call: bool = False

    @property
    def is_constrained(self) -> bool:
        """Whether calls are held to the schemas while they are written."""
        return self.is_required or bool(self.strict)


def read_tools(tools: Any, tool_choice: Any = None, parallel_tool_calls: Any = None) -> Tools | None:
    """Read these fields of a request; None where the answer may call nothing. Raises InvalidParameterError."""
    if not isinstance(parallel_tool_calls, bool | None):
        raise InvalidParameterError(f"parallel_tool_calls must be true or false, not {shown(parallel_tool_calls)}")
    if tools is None or (isinstance(tools, list | tuple) and not tools):
        asks_none = isinstance(tool_choice, str | None) and tool_choice in (None, "none", "auto")
        require(asks_none, "tool_choice needs tools")
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InvalidParameterError(f"tools must be a list, not {shown(tools)}")
    functions = [_function(tool) for tool in tools]
    schemas = {function["name"]: _schema(function) for function in functions}
    require(len(schemas) == len(functions), "two tools have the same name")
    strict = frozenset(function["name"] for function in functions if function.get("strict"))
    choice = "auto" if tool_choice is None else tool_choice
    one_call = parallel_tool_calls is False
    definitions = tuple({"type": "function", "function": function} for function in functions)
    if isinstance(choice, str) and choice in _CHOICES:
        return None if choice == "none" else Tools(definitions, schemas, strict, choice == "required", one_call)
    name = _chosen(choice)
    require(name in schemas, f"tool_choice names {shown(name)}, which is none of the tools")
    return Tools(definitions, {name: schemas[name]}, strict, is_required=True, one_call=True)


def _function(tool: Any) -> Mapping[str, Any]:
    function = (
        tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
    )
    if not isinstance(function, Mapping):
        raise InvalidParameterError(f'a tool must be {{"type": "function", "function": …}}, not {shown(tool)}')
    name = function.get("name")
    if not isinstance(name, str) or not name or not set(name) <= {*_ID_LETTERS, *"_-."}:
        raise InvalidParameterError(f"the name of a tool must be letters, digits, _, - and ., not {shown(name)}")
    return function


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise InvalidParameterError(f"parameters of the tool {function['name']} must be a JSON schema of an object")
    return {"type": "object", **schema}


def _chosen(choice: Any) -> Any:
    """Return the name in `{"type": "function", "function": {"name": …}}`."""
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        message = f"tool_choice must be {', '.join(_CHOICES)} or the name of a tool as OpenAI writes it"
        raise InvalidParameterError(f"{message}, not {shown(choice)}")
    return function.get("name")


def with_read_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as objects, which is what templates write out as JSON.

    Arguments that are no JSON, as those of an answer that was cut short, stay text. Raises InvalidParameterError.
    """
    calls = message.get("tool_calls")
    if calls is None:
        return dict(message)
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidParameterError(f"tool_calls must be a list, not {shown(calls)}")
    return {**message, "tool_calls": [_with_read_arguments(call) for call in calls]}


def _with_read_arguments(call: Any) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidParameterError(f"a tool call must have a function with a name, not {shown(call)}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
