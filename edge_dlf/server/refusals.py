"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from ..errors import (
    ContextOverflowError,
    EdgeDLFError,
    InvalidParameterError,
    NonFiniteLogitsError,
    RequestInterruptedError,
)

logger = logging.getLogger(__name__)

_MEANINGS = (
    (ContextOverflowError, 400, "context_length_exceeded"),
    (InvalidParameterError, 400, "invalid_value"),
    (RequestInterruptedError, 503, "stopping"),
    (NonFiniteLogitsError, 500, "non_finite_logits"),
    (EdgeDLFError, 500, "failed"),
)
"""Status and code of each error of the engine; the first that fits."""


class HTTPError(HTTPException):
    """Refusal of a request. code: what OpenAI's clients know the reason by."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> HTTPError:
        """Return the refusal that an error means. The server's own failures are logged; no client is told about those
        that nobody foresaw."""
        if isinstance(error, cls):
            return error
        if isinstance(error, HTTPException):
            return cls(error.status_code, error.detail.lower(), headers=error.headers)
        if isinstance(error, RecursionError):
            return cls(400, "the body is nested too deeply", "invalid_value")
        found = cls(500, "the server failed; what it wrote to its terminal says why")
        for kind, status, code in _MEANINGS:
            if isinstance(error, kind):
                found = cls(status, str(error), code)
                break
        if found.status_code == 500:
            logger.error("a request failed: %r", error, exc_info=error)
        return found

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": None, "code": self.code}}


def stopping() -> HTTPError:
    """Return the refusal of a server that takes no more requests and ends those that it has."""
    return HTTPError(503, "the server is stopping", "stopping", {"Retry-After": "10"})
