"""The chat for browsers: one file, and a content security policy that allows no other code."""

from __future__ import annotations

from functools import lru_cache

from ..system.page import read_page


@lru_cache
def page() -> tuple[bytes, dict[str, str]]:
    """Content of the page, and its headers."""
    text, policy = read_page("edge_dlf.server", "page.html")
    policy += "; connect-src 'self'; img-src data:; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return text.encode(), headers
