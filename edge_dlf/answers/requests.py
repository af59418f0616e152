"""Requests as data: a line of an OpenAI batch file, or the short form, checked and turned into arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from numbers import Integral
from typing import Any

from ..errors import InvalidParameterError, require, shown
from ..params import Number, Text, settable

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

OTHER_NAMES = {"max_completion_tokens": "max_tokens"}
"""OpenAI's newer names of settings."""
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
"""Fields that OpenAI's clients send, and that change nothing here."""
_SKIPPED = ("model", *IGNORED)
OF_TEMPLATE = ("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs")
"""Fields of a chat that its template uses."""
NOTHING: Mapping[str, Any] = {
    "echo": False, "best_of": 1, "suffix": "", "modalities": ["text"], "functions": [], "function_call": "none",
    "verbosity": "medium", "ignore_eos": False, "min_tokens": 0, "repetition_penalty": 1, "typical_p": 1,
    "use_beam_search": False, "skip_special_tokens": True,
}  # fmt: skip
"""Fields that are not offered, with the value by which clients ask for nothing."""
_READ = frozenset(("messages", "prompt", "response_format", "grammar", "logprobs", "top_logprobs", "reasoning_effort"))
_ELSEWHERE = {"audio", "function_call", "functions", "image", "images", "prediction", "stream_options", "verbosity"} | {
    "ignore_eos", "min_tokens", "n_predict", "repetition_penalty", "typical_p", "web_search_options"
}  # fmt: skip
"""Fields of requests to other servers, which are refused in a row of the short form too."""
_OF_ROW = ("id", "custom_id")
count = Number(0, is_whole=True).read


@dataclass(frozen=True)
class Request:
    """One request. is_chat: whether `content` is messages for the chat template, or a prompt: text, or token ids.

    is_raw: whether a prompt must be taken raw. settings: keyword arguments of `FusedLlama.create_chat_completion` or
    `create_completion`, those that were given. columns: names beside the request in its line, which nothing uses.
    prompt: what the chat template has made of the content for an earlier choice; None where it is still to be made.
    """

    is_chat: bool
    content: Any
    settings: Mapping[str, Any]
    is_raw: bool = False
    columns: Sequence[str] = ()
    prompt: Any = None


def request_id(line: Any, number: int) -> str:
    """The `custom_id` of an OpenAI line, the `id` of the short form, or else its number; errors are told under it."""
    if isinstance(line, Mapping):
        own = line.get("custom_id", line.get("id"))
        if is_id(own):
            return own if isinstance(own, str) else str(int(own))
    return str(number)


def is_id(own: Any) -> bool:
    """Tell whether it is a text or a whole number; pandas writes 1 as 1.0."""
    is_whole = isinstance(own, Integral) or (isinstance(own, float) and own.is_integer())
    return isinstance(own, str) or (is_whole and not isinstance(own, bool))


def is_openai(line: Mapping[str, Any]) -> bool:
    """Tell a line of an OpenAI batch from the short form, which may have columns of the same names."""
    is_short = "prompt" in line or "messages" in line
    return "body" in line or (not is_short and ("url" in line or "custom_id" in line))


def columns_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line holds that no request uses: columns of the user's own, and fields that are ignored."""
    used = ("custom_id", "method", "url", "body") if is_openai(line) else _used()
    return {name: value for name, value in line.items() if name not in used}


@cache
def _used() -> frozenset[str]:
    """The fields of the short form, and those that it has to refuse."""
    settings = {*settable("body"), *settable("edge_dlf"), *OTHER_NAMES}
    return _READ.union(settings, OF_TEMPLATE, NOTHING, _ELSEWHERE, _OF_ROW, ("n", "stream", "edge_dlf"))


def parse_line(line: Any) -> Request:
    """The request of an OpenAI batch line (`custom_id`, `method`, `url`, `body`) or of the short form: a string, or an
    object with `prompt` or `messages`, an `id`, and fields as in `body`. Other columns may stand beside them.

    Raises InvalidParameterError.
    """
    if isinstance(line, str):
        return Request(False, line, {})
    if not isinstance(line, Mapping):
        raise InvalidParameterError(f"a request must be an object, not {shown(line)}")
    columns = tuple(str(name) for name in columns_of(line) if name not in _SKIPPED)
    if not is_openai(line):
        own = line.get("custom_id", line.get("id"))
        require(own is None or is_id(own), f"id must be text or an integer, not {shown(own)}")
        for name in columns:
            if meant := get_close_matches(name, _used() - _ELSEWHERE, 1, 0.8):
                raise InvalidParameterError(f"unknown field {shown(name)}; is {meant[0]} meant?")
        request = parse_body({name: value for name, value in line.items() if name in _used() and name not in _OF_ROW})
        return replace(request, columns=columns)
    require(is_id(line.get("custom_id")), "custom_id must be text")
    require(line.get("method", "POST") == "POST", f"method must be POST, not {shown(line.get('method'))}")
    url = line.get("url")
    require(url in (CHAT, COMPLETIONS), f"url must be {CHAT} or {COMPLETIONS}, not {shown(url)}")
    require(isinstance(line.get("body"), Mapping), "body must be an object")
    return replace(parse_body(line["body"], is_chat=url == CHAT), columns=columns)


def parse_body(body: Mapping[str, Any], is_chat: bool | None = None) -> Request:
    """The request of an OpenAI body. is_chat: whether it must hold messages or a prompt; None takes what there is.

    Raises InvalidParameterError for what is missing, unknown, of the wrong type, or not offered.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _SKIPPED}
    given = {name: value for name, value in given.items() if name not in NOTHING or not _same(value, NOTHING[name])}
    for other, name in OTHER_NAMES.items():
        if other in given:
            given[name] = given.pop(other)
    is_raw = is_chat is False
    if is_chat is None:
        require(("messages" in given) != ("prompt" in given), "a request has either a prompt or messages")
        is_chat = "messages" in given
    content = _messages(given) if is_chat else _prompt(given)
    settings = _fusion(given.pop("edge_dlf", {}))
    for name, setting in settable("body").items():
        if name in given and (value := setting.read(given.pop(name))) is not None:
            settings[name] = value
    if is_chat:
        settings |= {name: given.pop(name) for name in OF_TEMPLATE if name in given}
        _move_effort(given, settings)
    if "response_format" in given:
        settings["json_schema"] = schema_of(given.pop("response_format"))
    if "grammar" in given:
        settings["grammar"] = Text().read("grammar", given.pop("grammar"))
    if "logprobs" in given:
        logprobs = given.pop("logprobs")
        if is_chat or logprobs is not False:
            settings["logprobs"] = flag("logprobs", logprobs) if is_chat else count("logprobs", logprobs)
    if is_chat and "top_logprobs" in given:
        settings["top_logprobs"] = count("top_logprobs", given.pop("top_logprobs"))
        require(settings.get("logprobs") or not settings["top_logprobs"], "top_logprobs needs logprobs: true")
    require(_same(given.pop("n", 1), 1), "n must be 1: write the request several times, with a seed each")
    require(given.pop("stream", False) is False, "stream must be false")
    if misplaced := sorted(settable("edge_dlf").keys() & given.keys()):
        raise InvalidParameterError(f'{misplaced[0]} belongs under "edge_dlf"')
    if given:
        raise InvalidParameterError(f"unknown field {shown(min(given, key=str))}")
    return Request(is_chat, content, settings, is_raw)


def _move_effort(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Make `reasoning_effort` what it stands for: a variable of the template, or no thinking."""
    effort = given.pop("reasoning_effort", None)
    if effort is None:
        return
    if Text().read("reasoning_effort", effort) == "none":
        settings.setdefault("think", "off")
    elif isinstance(settings.setdefault("chat_template_kwargs", {}), Mapping):
        settings["chat_template_kwargs"] = {"reasoning_effort": effort, **settings["chat_template_kwargs"]}


def schema_of(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that OpenAI's `response_format` asks for. Raises InvalidParameterError."""
    kind = _object("response_format", response_format).get("type")
    if kind == "text":
        return None
    if kind == "json_object":  # llama-cpp-python takes a schema here
        return _object("schema", response_format.get("schema") or {"type": "object"})
    if kind == "json_schema":
        wrapped = _object("json_schema", response_format.get("json_schema"))
        return _object("json_schema.schema", wrapped.get("schema"))
    raise InvalidParameterError(f"response_format must be text, json_object or json_schema, not {shown(kind)}")


def _messages(given: dict[str, Any]) -> Any:
    messages = given.pop("messages", None)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidParameterError("messages must be a list of one message or more")
    if not all(isinstance(message, Mapping) for message in messages):
        raise InvalidParameterError("each message must be an object with role and content")
    return messages


def _prompt(given: dict[str, Any]) -> Any:
    prompt = given.pop("prompt", None)
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    is_ids = isinstance(prompt, Sequence) and all(type(token) is int for token in prompt)
    require(isinstance(prompt, str) or is_ids, "prompt must be one text, or a list of token ids")
    return prompt


def _fusion(fields: Any) -> dict[str, Any]:
    known = settable("edge_dlf")
    if unknown := sorted(_object("edge_dlf", fields).keys() - known.keys()):
        raise InvalidParameterError(f"unknown field {shown(unknown[0])} under edge_dlf; it takes {', '.join(known)}")
    return {name: known[name].read(value) for name, value in fields.items() if value is not None}


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"{name} must be an object, not {shown(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is true or false. Raises InvalidParameterError."""
    if not isinstance(value, bool):
        raise InvalidParameterError(f"{name} must be true or false, not {shown(value)}")
    return value


def _same(one: Any, other: Any) -> bool:
    """Tell whether they are equal and, other than in Python, 1 is not true."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
