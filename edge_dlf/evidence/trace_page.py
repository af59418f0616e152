"""A trace as one HTML file, which needs no network and unpacks a page of tokens only when it is shown."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, Any, BinaryIO

from ..system.page import read_page
from .trace import Entry, Totals

PAGE_TOKENS = 2000
"""Tokens that the page shows at once."""


def write_page(entries: Iterable[Entry], title: str, file: BinaryIO) -> Totals:
    """Write the HTML file of a trace. Returns its sums. Holds one page of tokens in memory; the rest is on disk."""
    totals, overview = Totals(), list[list[float]]()
    with tempfile.TemporaryFile() as rest:
        first = b""
        for number, page in enumerate(_pages(entries)):
            n_before, alpha_before = totals.n_tokens, totals.alpha_sum
            for entry in page:
                if "goes_on" not in entry:
                    totals.add(entry)
            n_tokens = totals.n_tokens - n_before
            overview.append([n_before, n_tokens, round((totals.alpha_sum - alpha_before) / max(n_tokens, 1), 4)])
            packed = base64.b64encode(zlib.compress(json.dumps(page, separators=(",", ":")).encode()))
            block = b'<script type="text/plain" id="page%d">%b</script>\n' % (number, packed)
            if number:
                rest.write(block)
            else:
                first = block
        _write(file, title, totals, overview, first, rest)
    return totals


def is_page(beginning: bytes) -> bool:
    """Whether a file that begins so is the page of a trace."""
    return " · edge-dlf trace</title>".encode() in beginning


def _write(
    file: BinaryIO, title: str, totals: Totals, overview: list[list[float]], first: bytes, rest: IO[bytes]
) -> None:
    """Fill in the template. Pages that are not shown first come after the script that shows them."""
    template, policy = read_page("edge_dlf.evidence", "trace_page.html")
    sums = {name: value for name, value in asdict(totals).items() if not name.startswith("_")}
    meta = {"title": title, "totals": sums, "pages": overview}
    head, tail = template.split("{{rest}}")
    values = {
        "title": html.escape(title),
        "policy": policy,
        "meta": json.dumps(meta).replace("<", "\\u003c"),
        "first": first.decode("ascii"),
    }
    file.write(re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], head).encode("utf-8", "replace"))
    rest.seek(0)
    shutil.copyfileobj(rest, file)
    file.write(tail.encode())


def _pages(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    """Yield the trace in pages, one at least. A page that goes on with an answer begins with that answer's entry."""
    page, head, n_tokens = list[Entry](), dict[str, Any](), 0
    for entry in entries:
        begins = "format" in entry
        if n_tokens == PAGE_TOKENS or len(page) >= 2 * PAGE_TOKENS:
            yield page
            page, n_tokens = [] if begins else [{**head, "goes_on": True}], 0
        if begins:
            head = {**entry}
        n_tokens += not begins
        page.append(entry)
    yield page
