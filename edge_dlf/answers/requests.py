"""Requests as data: a line of an OpenAI batch file, or the short form, checked and turned into arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import InvalidParameterError
from ..params import FusionParams, SamplingParams

_Kind: TypeAlias = tuple[Any, ...]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_NUMBER: _Kind = (int, float)
_INTEGER: _Kind = (int,)
_TEXT: _Kind = (str,)
_OBJECT: _Kind = (Mapping,)
_WORDS = {_NUMBER: "a number", _INTEGER: "an integer", _TEXT: "text", _OBJECT: "an object", (bool,): "true or false"}
_SAMPLING: Mapping[str, _Kind] = {
    "temperature": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repeat_penalty": _NUMBER,
    "repeat_last_n": _INTEGER,
    "frequency_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "logit_bias": _OBJECT,
    "seed": _INTEGER,
}
_FUSION: Mapping[str, _Kind] = {
    "method": _TEXT,
    "search": _TEXT,
    "alpha": (int, float, Mapping),
    "alpha_max": _NUMBER,
    "alpha_step": _NUMBER,
    "plausibility": _NUMBER,
}
_LIMITS = ("max_tokens", "max_completion_tokens")
_IGNORED = frozenset(("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
assert _SAMPLING.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
assert _FUSION.keys() == {field.name for field in dataclasses.fields(FusionParams)}


@dataclass(frozen=True)
class Request:
    """One request. is_chat: whether `content` is messages for the chat template, or a prompt: text, or token ids.

    is_raw: whether a prompt must be taken raw. settings: keyword arguments of `FusedLlama.create_chat_completion` or
    `create_completion`, those that were given.
    """

    is_chat: bool
    content: Any
    settings: Mapping[str, Any]
    is_raw: bool = False


def request_id(line: Any, number: int) -> str:
    """The `custom_id` of an OpenAI line, the `id` of the short form, or else its number; errors are told under it."""
    if isinstance(line, Mapping):
        own = line.get("custom_id", line.get("id"))
        if isinstance(own, str) or (isinstance(own, int) and not isinstance(own, bool)):
            return str(own)
    return str(number)


def parse_line(line: Any) -> Request:
    """The request of an OpenAI batch line (`custom_id`, `method`, `url`, `body`) or of the short form: a string, or an
    object with `prompt` or `messages`, an `id`, and fields as in `body`. Raises InvalidParameterError."""
    if isinstance(line, str):
        return Request(False, line, {})
    if not isinstance(line, Mapping):
        raise InvalidParameterError(f"a request must be an object, not {line!r:.60}")
    if not any(name in line for name in ("body", "url", "custom_id")):
        own = line.get("id")
        if own is not None and (isinstance(own, bool) or not isinstance(own, (str, int))):
            raise InvalidParameterError(f"id must be text or an integer, not {own!r:.60}")
        return parse_body({name: value for name, value in line.items() if name != "id"})
    if unknown := sorted(set(line) - {"custom_id", "method", "url", "body"}):
        raise InvalidParameterError(f"unknown field {unknown[0]!r} beside body")
    if not isinstance(line.get("custom_id"), str):
        raise InvalidParameterError("custom_id must be text")
    if line.get("method", "POST") != "POST":
        raise InvalidParameterError(f"method must be POST, not {line['method']!r:.60}")
    if line.get("url") not in (CHAT, COMPLETIONS):
        raise InvalidParameterError(f"url must be {CHAT} or {COMPLETIONS}, not {line.get('url')!r:.60}")
    if not isinstance(line.get("body"), Mapping):
        raise InvalidParameterError("body must be an object")
    return parse_body(line["body"], is_chat=line["url"] == CHAT)


def parse_body(body: Mapping[str, Any], is_chat: bool | None = None) -> Request:
    """The request of an OpenAI body. is_chat: whether it must hold messages or a prompt; None takes what there is.

    Raises InvalidParameterError for what is missing, unknown, of the wrong type, or not offered.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    is_raw = is_chat is False
    if is_chat is None:
        if ("messages" in given) == ("prompt" in given):
            raise InvalidParameterError("a request has either a prompt or messages")
        is_chat = "messages" in given
    content = _messages(given) if is_chat else _prompt(given)
    settings = _fusion(given.pop("edge_dlf", {}))
    for name, kind in _SAMPLING.items():
        if name in given:
            settings[name] = _typed(name, given.pop(name), kind)
    if "logit_bias" in settings:
        settings["logit_bias"] = _logit_bias(settings["logit_bias"])
    for name in _LIMITS:
        if name in given:
            settings["max_tokens"] = _typed(name, given.pop(name), _INTEGER)
    if "response_format" in given:
        settings["json_schema"] = schema_of(given.pop("response_format"))
    if "grammar" in given:
        settings["grammar"] = _typed("grammar", given.pop("grammar"), _TEXT)
    if "stop" in given:
        settings["stop"] = _stop(given.pop("stop"))
    if "logprobs" in given:
        settings["logprobs"] = _typed("logprobs", given.pop("logprobs"), (bool,) if is_chat else _INTEGER)
    if is_chat and "top_logprobs" in given:
        settings["top_logprobs"] = _typed("top_logprobs", given.pop("top_logprobs"), _INTEGER)
    if given.pop("n", 1) != 1:
        raise InvalidParameterError("n must be 1: write the request several times, with a seed each")
    if given.pop("stream", False) is not False:
        raise InvalidParameterError("stream must be false")
    if misplaced := sorted(_FUSION.keys() & given.keys()):
        raise InvalidParameterError(f'{misplaced[0]} belongs under "edge_dlf"')
    if given:
        raise InvalidParameterError(f"unknown field {min(given)!r}")
    return Request(is_chat, content, settings, is_raw)


def schema_of(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that OpenAI's `response_format` asks for. Raises InvalidParameterError."""
    if not isinstance(response_format, Mapping):
        raise InvalidParameterError("response_format must be an object")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":  # llama-cpp-python takes a schema here
        return _typed("schema", response_format.get("schema") or {"type": "object"}, _OBJECT)  # type: ignore[no-any-return]
    if kind == "json_schema":
        wrapped = _typed("json_schema", response_format.get("json_schema"), _OBJECT)
        return _typed("json_schema.schema", wrapped.get("schema"), _OBJECT)  # type: ignore[no-any-return]
    raise InvalidParameterError(f"response_format must be text, json_object or json_schema, not {kind!r:.60}")


def _messages(given: dict[str, Any]) -> Any:
    messages = given.pop("messages", None)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidParameterError("messages must be a list of one message or more")
    if not all(isinstance(message, Mapping) for message in messages):
        raise InvalidParameterError("each message must be an object with role and content")
    return messages


def _prompt(given: dict[str, Any]) -> Any:
    prompt = given.pop("prompt", None)
    is_ids = isinstance(prompt, Sequence) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise InvalidParameterError("prompt must be one text, or a list of token ids")
    return prompt


def _fusion(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise InvalidParameterError("edge_dlf must be an object")
    if unknown := sorted(fields.keys() - _FUSION.keys()):
        raise InvalidParameterError(f"unknown field {unknown[0]!r} under edge_dlf; it takes {', '.join(_FUSION)}")
    settings = {name: _typed(name, value, _FUSION[name]) for name, value in fields.items() if value is not None}
    alpha = settings.get("alpha")
    if isinstance(alpha, Mapping):
        settings["alpha"] = {str(name): _typed(f"alpha of {name}", value, _NUMBER) for name, value in alpha.items()}
    return settings


def _typed(name: str, value: Any, kind: _Kind) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind != (bool,)):
        raise InvalidParameterError(f"{name} must be {_WORDS.get(kind, 'a number or an object')}, not {value!r:.60}")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise InvalidParameterError(f"{name} is out of range")
    return value


def _logit_bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    try:
        return {int(token): float(_typed("logit_bias", value, _NUMBER)) for token, value in bias.items()}
    except ValueError as error:
        raise InvalidParameterError(f"logit_bias must map token ids to numbers: {error}") from None


def _stop(stop: Any) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) for string in strings):
        raise InvalidParameterError("stop must be text or a list of texts")
    return list(strings)
