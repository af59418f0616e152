"""`--trace`: writing down why each token of an answer was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..answers.stream import TokenStream
    from ..answers.token import Token
    from ..api import FusedLlama
    from ..evidence.trace import TraceFile

_MAX_LABEL = 200

trace_option = click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Add to FILE why each token was chosen; `edge-dlf trace` shows it.",
)


class Tracer:
    """Writer of the answers of one family. Without a file it writes nothing.

    settings: arguments that ask a request for its trace.
    """

    def __init__(self, file: TraceFile | None, family: str) -> None:
        self.settings: dict[str, Any] = {"trace": True} if file else {}
        self._file = file
        self._family = family

    def tokens(self, stream: TokenStream, label: str, llm: FusedLlama) -> Iterator[Token]:
        """Yield the tokens of an answer, each written down before.

        label: the question.
        """
        from ..answers.trace_entry import token_entry

        report = stream.report
        if self._file:
            self._file.write(self._head(label, report.method, report.experts, report.alpha_max))
        for token in stream:
            if self._file:
                self._file.write(token_entry(token, lambda id: llm.detokenize([id])))
            yield token

    def add_result(self, label: str, body: Mapping[str, Any]) -> None:
        """Write a whole answer, whose trace is taken out of `body`."""
        if self._file and (trace := body["edge_dlf"].pop("trace", None)):
            method, experts = body["edge_dlf"]["method"], tuple(body["edge_dlf"]["expert_share"])
            self._file.write(self._head(label, method, experts, trace["alpha_max"]), *trace["tokens"])

    def _head(self, label: str, method: str, experts: tuple[str, ...], alpha_max: float) -> dict[str, Any]:
        from ..answers.trace_entry import answer_entry

        return answer_entry(" ".join(label.split())[:_MAX_LABEL], self._family, method, experts, alpha_max)


@contextmanager
def tracing(path: Path | None, family: str) -> Iterator[Tracer]:
    """Make a tracer that adds to the file `path`, if there is one. Raises as TraceFile."""
    from ..evidence.trace import TraceFile

    file = TraceFile(path) if path else None
    with file or nullcontext():
        yield Tracer(file, family)
