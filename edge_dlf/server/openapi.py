"""The OpenAPI document: what can be asked, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..answers.requests import CHAT, COMPLETIONS, IGNORED, OTHER_NAMES
from ..params import SETTINGS, settable
from .calls import MAX_CHOICES, MAX_TOP_LOGPROBS

Dict = dict[str, Any]

PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", CHAT, COMPLETIONS)
"""Every path but those of single models."""
_STATUSES = {
    400: "The body cannot be used.",
    401: "The API key is missing or wrong.",
    403: "Asked by an unknown name, or from a page of another site.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    500: "A model failed.",
    503: "As many requests wait as may, or the server stops; Retry-After tells when to try again.",
    504: "The answer took longer than the server allows.",
}


def _object(**properties: Dict) -> Dict:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def _or_null(schema: Dict) -> Dict:
    return {"anyOf": [schema, {"type": "null"}]}


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXT: Dict = {"type": "string"}
_INTEGER: Dict = {"type": "integer"}
_TEXT_PART = _object(type={"const": "text"}, text=_TEXT)
_MESSAGE = _object(
    role={"type": "string", "description": "system, user, assistant, or another that the chat template knows."},
    content={"anyOf": [_TEXT, {"type": "array", "items": _TEXT_PART}]},
)
_SHARED: Dict = {
    **{name: setting.schema() for name, setting in settable("body").items()},
    **{
        other: {**SETTINGS[name].schema(), "description": f"Another name of {name}."}
        for other, name in OTHER_NAMES.items()
    },
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES, "description": "Choices, each with its own seed."},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": _or_null({"type": "boolean"})}},
    "response_format": {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
            "json_schema": _or_null(_object(schema={"type": "object"})),
        },
        "required": ["type"],
    },
    "grammar": {"type": "string", "description": "Text of a GBNF grammar."},
    **{name: {"description": "Ignored."} for name in IGNORED},
    "edge_dlf": {
        "type": "object",
        "description": "How the members are fused.",
        "properties": {
            **{name: _or_null(setting.schema()) for name, setting in settable("edge_dlf").items()},
            "trace": _or_null({"type": "boolean", "description": "Tell α and expert of each token."}),
        },
        "additionalProperties": False,
    },
}
_CHAT: Dict = {
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
    "logprobs": {"type": "boolean"},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
}
_COMPLETION: Dict = {
    "prompt": {
        "anyOf": [
            {"type": "string"},
            _TOKENS,
            {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKENS]}, "minItems": 1},
        ]
    },
    "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
}


def document(models: Sequence[str]) -> Dict:
    """The document of a server that offers `models`."""
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge-dlf", "version": __version__, "description": "OpenAI's API over one fused family."},
        "components": {
            "schemas": {"Error": _ERROR, "Answer": _ANSWER, "Model": _MODEL},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": {
            CHAT: {"post": _asking("chat", models, _CHAT, "messages")},
            COMPLETIONS: {"post": _asking("complete", models, _COMPLETION, "prompt")},
            "/v1/models": {"get": _reading("models", _object(data={"type": "array", "items": _ref("Model")}))},
            "/v1/models/{model}": {"get": {**_reading("model", _ref("Model"), 404), "parameters": [name]}},
            "/health": {"get": _reading("health", _object(status={"const": "ok"}))},
        },
    }


def _ref(name: str) -> Dict:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Dict, about: str) -> Dict:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _refusals(*statuses: int) -> Dict:
    return {str(status): _json(_ref("Error"), _STATUSES[status]) for status in statuses}


def _reading(name: str, schema: Dict, *statuses: int) -> Dict:
    return {"operationId": name, "responses": {"200": _json(schema, "Found."), **_refusals(401, 403, *statuses)}}


def _asking(name: str, models: Sequence[str], own: Dict, required: str) -> Dict:
    fields = {"model": {"type": "string", "enum": list(models)}, **own, **_SHARED}
    properties = {name: schema if name == required else _or_null(schema) for name, schema in fields.items()}
    body = {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}
    answer = _json(_ref("Answer"), "The answer, whole or as server-sent events.")
    answer["content"]["text/event-stream"] = {}
    return {
        "operationId": name,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": answer, **_refusals(*_STATUSES)},
    }


_ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param={"type": "null"}, code={"type": ["string", "null"]}),
)
_ANSWER = _object(
    id=_TEXT,
    object=_TEXT,
    created=_INTEGER,
    model=_TEXT,
    choices={"type": "array", "items": {"type": "object"}},
    usage={"type": "object"},
    edge_dlf={"type": "object"},
)
_MODEL = _object(id=_TEXT, object=_TEXT, created=_INTEGER, owned_by=_TEXT)
