"""A trace as one HTML file, which needs no network and unpacks a page of tokens only when it is shown."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from typing import IO, Any, BinaryIO

from .trace import Candidate, Head, Step, Totals

PAGE_TOKENS = 2000
"""Tokens that the page shows at once."""


def write_page(items: Iterable[Head | Step], title: str, file: BinaryIO) -> Totals:
    """Write the HTML file of a trace. Returns its sums. Holds one page of tokens in memory; the rest is on disk."""
    totals, overview = Totals(), list[list[Any]]()
    with tempfile.TemporaryFile() as rest:
        first = b""
        for page in _pages(items, totals):
            block = _block(len(overview), page.data())
            if overview:
                rest.write(block)
            else:
                first = block
            overview.append([page.n_before, page.n_tokens, round(page.alpha_mean, 4), page.n_changed])
        _write(file, title, totals, overview, first, rest)
    return totals


def _write(
    file: BinaryIO, title: str, totals: Totals, overview: list[list[Any]], first: bytes, rest: IO[bytes]
) -> None:
    """Fill in the template. Pages that are not shown first come after the script that shows them."""
    template = files("edge_dlf.evidence").joinpath("trace_page.html").read_text("utf-8")
    (style,), (script,) = (re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL) for tag in ("style", "script"))
    sums = {name: value for name, value in asdict(totals).items() if not name.startswith("_")}
    meta = {"title": title, "totals": sums, "pages": overview}
    head, tail = template.split("{{rest}}")
    values = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        "meta": json.dumps(meta).replace("<", "\\u003c"),
        "first": first.decode("ascii"),
    }
    file.write(re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], head).encode())
    rest.seek(0)
    shutil.copyfileobj(rest, file)
    file.write(tail.encode())


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _block(number: int, data: bytes) -> bytes:
    packed = base64.b64encode(zlib.compress(data, 6)).decode("ascii")
    return f'<script type="text/plain" id="page{number}">{packed}</script>\n'.encode()


class _Page:
    """Tokens that are shown together, as short lists. Texts and names of members are stored once and numbered."""

    def __init__(self, n_before: int, head: Head | None) -> None:
        self.n_before = n_before
        self.n_tokens = self.n_changed = 0
        self._alpha_sum = 0.0
        self._texts: dict[str, int] = {}
        self._members: dict[str, int] = {}
        self._items: list[Any] = []
        if head:
            self.begin(head, True)

    @property
    def alpha_mean(self) -> float:
        return self._alpha_sum / max(self.n_tokens, 1)

    @property
    def is_full(self) -> bool:
        return self.n_tokens == PAGE_TOKENS or len(self._items) >= 2 * PAGE_TOKENS

    def begin(self, head: Head, goes_on: bool) -> None:
        self._items.append({**head._asdict(), "goes_on": goes_on})

    def add(self, step: Step) -> None:
        members = [
            [self._members.setdefault(name, len(self._members)), self._text(chosen), *self._top(top)]
            for name, (_, chosen, top) in step.members.items()
        ]
        flags = step.is_changed + 2 * step.is_drafted
        expert = -1 if step.expert is None else step.expert
        search = [float(f"{value:.4g}") for value in step.search] if step.search else 0
        logprob, alphas = _short(step.logprob), [round(alpha, 4) for alpha in step.alphas]
        texts = self._text(step.text), self._text(step.name)
        self._items.append([*texts, logprob, alphas, expert, flags, search, self._top(step.fused), members])
        self.n_tokens += 1
        self.n_changed += step.is_changed
        self._alpha_sum += max(step.alphas, default=0.0)

    def data(self) -> bytes:
        page = {"texts": list(self._texts), "members": list(self._members), "items": self._items}
        return json.dumps(page, separators=(",", ":")).encode()

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def _top(self, top: Iterable[Candidate]) -> list[float]:
        return [value for _, name, logprob in top for value in (self._text(name), _short(logprob))]


def _pages(items: Iterable[Head | Step], totals: Totals) -> Iterable[_Page]:
    """Yield the trace in pages, one at least, and add it to `totals`."""
    page, head = _Page(0, None), None
    for item in items:
        totals.add(item)
        if page.is_full:
            yield page
            page = _Page(page.n_before + page.n_tokens, None if isinstance(item, Head) else head)
        if isinstance(item, Head):
            head = item
            page.begin(head, False)
        else:
            page.add(item)
    yield page


def _short(logprob: float) -> float:
    return max(round(logprob, 3), -999.0)
