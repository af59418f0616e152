"""`--trace`: what the commands that answer write down of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..answers.stream import Report
    from ..answers.token import Token
    from ..evidence.trace import TraceFile

_MAX_LABEL = 200

trace_option = click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Add to FILE why each token was chosen; `edge-dlf trace` shows it.",
)


class Tracer:
    """Writes answers of one family. Without a file it does nothing.

    settings: what asks a request for its trace.
    """

    def __init__(self, file: TraceFile | None, family: str) -> None:
        self.settings: dict[str, Any] = {"trace": True} if file else {}
        self._file = file
        self._family = family

    def begin(self, label: str, report: Report) -> None:
        """An answer begins. label: what it answers."""
        if self._file:
            self._file.write(self._head(label, report.method, report.experts, report.alpha_max))

    def add(self, token: Token, name: Callable[[int], str]) -> None:
        """The next token of the answer. name: token id -> its text."""
        if self._file and token.trace:
            from ..answers.trace_entry import token_entry

            self._file.write(token_entry(token, name))

    def add_result(self, label: str, body: Mapping[str, Any]) -> None:
        """A whole answer; its trace is taken out of `body`."""
        if self._file and (trace := body["edge_dlf"].pop("trace", None)):
            method, experts = body["edge_dlf"]["method"], tuple(body["edge_dlf"]["expert_share"])
            self._file.write(self._head(label, method, experts, trace["alpha_max"]), *trace["tokens"])

    def _head(self, label: str, method: str, experts: tuple[str, ...], alpha_max: float) -> dict[str, Any]:
        from ..answers.trace_entry import answer_entry

        return answer_entry(" ".join(label.split())[:_MAX_LABEL], self._family, method, experts, alpha_max)


@contextmanager
def tracing(path: Path | None, family: str) -> Iterator[Tracer]:
    """A tracer of answers into the file `path`, if there is one. Raises as TraceFile."""
    if path is None:
        yield Tracer(None, family)
        return
    from ..evidence.trace import TraceFile

    with TraceFile(path) as file:
        yield Tracer(file, family)
