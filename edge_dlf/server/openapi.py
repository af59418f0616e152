"""The OpenAPI document: what can be asked, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..answers.requests import CHAT, COMPLETIONS
from ..params import SEARCHES
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
_TOKEN_ID = {"type": "integer", "minimum": 0}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
    "required": ["role", "content"],
}
_SAMPLING: Dict = {
    "max_tokens": {"type": "integer", "minimum": 1, "description": "None goes on to the end of the context."},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "description": "Another name of max_tokens."},
    "temperature": {"type": "number", "minimum": 0, "description": "0 takes the most likely token."},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repeat_penalty": {"type": "number", "exclusiveMinimum": 0},
    "repeat_last_n": {"type": "integer", "minimum": -1},
    "frequency_penalty": {"type": "number"},
    "presence_penalty": {"type": "number"},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}, "description": "By token id."},
    "seed": {"type": "integer", "minimum": 0, "description": "Makes an answer repeat."},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES, "description": "Choices, each with its own seed."},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "response_format": {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}}, "required": ["schema"]},
        },
        "required": ["type"],
    },
    "grammar": {"type": "string", "description": "Text of a GBNF grammar."},
    "user": {"type": "string"},
    "edge_dlf": {
        "type": "object",
        "description": "How the members are fused.",
        "properties": {
            "method": {"type": "string", "description": "dynamic, static, large, base, or the name of an expert."},
            "search": {"type": "string", "enum": list(SEARCHES)},
            "alpha": {"anyOf": [{"type": "number"}, {"type": "object", "additionalProperties": {"type": "number"}}]},
            "alpha_max": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
            "alpha_step": {"type": "number", "exclusiveMinimum": 0},
            "trace": {"type": "boolean", "description": "Tell α and expert of each token."},
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
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            {"type": "array", "items": _TOKEN_ID, "minItems": 1},
            {"type": "array", "items": {"type": "array", "items": _TOKEN_ID, "minItems": 1}, "minItems": 1},
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
            "/v1/models": {"get": _reading("models", _object("data", {"type": "array", "items": _ref("Model")}))},
            "/v1/models/{model}": {"get": {**_reading("model", _ref("Model"), 404), "parameters": [name]}},
            "/health": {"get": _reading("health", _object("status", {"const": "ok"}))},
        },
    }


def _ref(name: str) -> Dict:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(name: str, schema: Dict) -> Dict:
    return {"type": "object", "properties": {name: schema}, "required": [name]}


def _json(schema: Dict, about: str) -> Dict:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _refusals(*statuses: int) -> Dict:
    return {str(status): _json(_ref("Error"), _STATUSES[status]) for status in statuses}


def _reading(name: str, schema: Dict, *statuses: int) -> Dict:
    return {"operationId": name, "responses": {"200": _json(schema, "Found."), **_refusals(401, 403, *statuses)}}


def _asking(name: str, models: Sequence[str], own: Dict, required: str) -> Dict:
    properties = {"model": {"type": "string", "enum": list(models)}, **own, **_SAMPLING}
    body = {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}
    answer = _json(_ref("Answer"), "The answer, whole or as server-sent events.")
    answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "operationId": name,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": answer, **_refusals(*_STATUSES)},
    }


_ERROR: Dict = _object(
    "error",
    {
        "type": "object",
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": "null"},
            "code": {"type": ["string", "null"]},
        },
        "required": ["message", "type", "param", "code"],
    },
)
_ANSWER: Dict = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
        "edge_dlf": {"type": "object"},
    },
    "required": ["id", "object", "created", "model", "choices", "usage", "edge_dlf"],
}
_MODEL: Dict = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "object", "owned_by")}
    | {"created": {"type": "integer"}},
    "required": ["id", "object", "created", "owned_by"],
}
