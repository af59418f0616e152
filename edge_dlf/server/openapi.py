"""The OpenAPI document: what can be asked, and what comes back. `openapi.json` holds all but models and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from .. import __version__
from ..answers.requests import CHAT, COMPLETIONS, IGNORED, NOTHING, OTHER_NAMES
from ..params import SETTINGS, settable

Dict = dict[str, Any]

PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", CHAT, COMPLETIONS)
"""Every path but those of single models."""


_LISTED = (CHAT, COMPLETIONS, "/v1/models")


def whereabouts(method: str, path: str) -> str:
    """Return the message to a client that asks for what is not there."""
    if path in PATHS:
        return f"{path} is not for {method:.20}"
    meant = next((known for known in _LISTED if path.rstrip("/").endswith(known.removeprefix("/v1"))), None)
    hint = f"there is {meant}: clients need a base URL that ends in /v1" if meant else f"there are {', '.join(_LISTED)}"
    return f"there is no {path:.80}; {hint}"


def document(models: Sequence[str]) -> Dict:
    """Return the document of a server that offers `models`."""
    document: Dict = json.loads(files(__package__).joinpath("openapi.json").read_text("utf-8"))
    schemas = document["components"]["schemas"]
    document["info"]["version"] = __version__
    schemas["ModelName"]["enum"] = list(models)
    shared = {**_settings(), **schemas.pop("Shared")["properties"], "model": schemas["ModelName"]}
    for path in (CHAT, COMPLETIONS):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = {**body["properties"], **shared}
        body["properties"] = {
            name: field if name in body["required"] else _or_null(field) for name, field in fields.items()
        }
    return document


def _settings() -> Dict:
    """Return the fields of a request that are rows of the table of settings."""
    fusion = {name: _or_null(setting.schema()) for name, setting in settable("edge_dlf").items()}
    told = "Tell α, expert and log-probability of each token, and what the large model alone would have chosen."
    fusion["trace"] = _or_null({"type": "boolean", "description": told})
    return {
        **{name: setting.schema() for name, setting in settable("body").items()},
        **{
            other: {**SETTINGS[name].schema(), "description": f"Another name of {name}."}
            for other, name in OTHER_NAMES.items()
        },
        **{name: {"description": "Ignored."} for name in IGNORED},
        **{name: {"const": value, "description": "Not offered but for this."} for name, value in NOTHING.items()},
        "edge_dlf": {
            "type": "object",
            "description": "How the members are fused.",
            "properties": fusion,
            "additionalProperties": False,
        },
    }


def _or_null(schema: Dict) -> Dict:
    return {"anyOf": [schema, {"type": "null"}]}
