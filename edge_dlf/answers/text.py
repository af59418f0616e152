"""Bytes from text that may be no valid Unicode."""

from __future__ import annotations


def to_bytes(text: str) -> bytes:
    """UTF-8 of `text`. Surrogates that stand for undecoded bytes become these bytes, other lone surrogates U+FFFD."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
