"""Runs a batch from a file of requests to a file of results, which a later run continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..answers.batch import LATER
from ..families.files import FamilyFiles
from ..families.manifest import Manifest
from ..params import DEFAULTS, FUSION, SAMPLING
from ..system.jsonl import Line, Pipe, read_lines
from .files import Targets, open_outputs, status_of
from .intake import Intake
from .ledger import Ledger, Row
from .progress import Progress

if TYPE_CHECKING:
    from ..api import FusedLlama

logger = logging.getLogger(__name__)

_TOLD = FUSION | SAMPLING | {"max_tokens", "stop"}
"""Settings that a manifest tells where nobody gave them, too."""


def run_file(
    llm: FusedLlama,
    input: str | Path,
    output: str | Path,
    *,
    errors: str | Path | None = None,
    restart: bool = False,
    retry_errors: bool = False,
    keep: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Progress:
    """Answer every row of the file `input` into the file `output`, as `edge-dlf batch` does.

    Called again with the same arguments, it continues where an earlier run stopped, whatever stopped it: rows that are
    finished are kept, and `output` is only continued by the family, parameters and input that it was begun with.
    `FusedLlama` has no method for this, because files lie above it: it answers requests and knows nothing of disks.

    input: JSON lines, each a request of OpenAI's batches or the short form, as in `FusedLlama.batch`.
    output: one line a row, written as the row finishes. The manifest is beside it.
    errors: a file for rows that failed, in place of the output.
    restart: begin anew; earlier files are kept under a number.
    retry_errors: run rows again that failed in an earlier run.
    keep: copy columns that no request uses, such as an expected answer, to the output.
    on_progress: called after each row.
    settings: arguments of `FusedLlama.batch`, such as `raw`, `ordered` or `seed`; without a seed the family's own is
        taken, else 0.

    Returns how much was done. Raises InvalidParameterError if the output belongs to something else, EdgeDLFError if it
    cannot be written or another run writes to it, and what `FusedLlama.batch` raises; what is finished stays.
    """
    spec = llm.files.spec
    settings = {"seed": spec.settings(settings.get("profile")).get("seed", 0), "raw": True, "system": None, **settings}
    type_k, type_v = llm.cache_types
    with (
        Path(input).open("rb") as file,
        open_outputs(
            Targets.of(str(output), str(errors) if errors else None, file),
            file,
            lambda: manifest_of(llm.files, settings, n_ctx=llm.n_ctx, type_k=type_k, type_v=type_v),
            restart=restart,
            retry_errors=retry_errors,
            ordered=settings.get("ordered", False),
            notice=logger.warning,
        ) as (ledger, n_rows),
    ):
        progress = Progress(n_rows, ledger.n_rows, ledger.n_failed)
        progress.n_picked = llm.n_picked

        def finish(row: Row) -> None:
            ledger.write(row)
            progress.add(row)
            if on_progress:
                on_progress(progress)

        run_rows(file, ledger, finish, lambda: nullcontext(llm), settings, is_stream=n_rows is None, keep=keep)
    return progress


def run_rows(
    input: IO[bytes],
    ledger: Ledger,
    finish: Callable[[Row], None],
    load: Callable[[], AbstractContextManager[FusedLlama]],
    settings: Mapping[str, Any],
    *,
    is_stream: bool = False,
    takes_later: bool = True,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    keep: bool = False,
) -> None:
    """Answer every request of `input` that `ledger` has no row for.

    finish: takes each finished row, those of lines that are no requests too.
    load: makes the engine; not called if nothing is left to answer.
    is_stream: whether lines of `input` may come one by one.
    takes_later: whether the engine goes on with running rows while the next line is waited for (`LATER`).
    waiting: entered while a line is waited for.
    keep: whether rows get the columns of their line that no request uses.
    """
    pipe = Pipe(input.fileno()) if is_stream and status_of(input) else None
    lines, ordered = _each(waiting, read_lines(pipe or input)), settings.get("ordered", False)
    intake = Intake(lines, ledger.ids, finish, ordered=ordered, keep=keep)
    requests = _as_they_come(intake, pipe) if pipe and takes_later else iter(intake)
    first = next(requests, None)
    if first is None:
        return
    with load() as llm:
        for row in llm.batch(chain([first], requests), **settings):
            intake.finished(row)


def manifest_of(files: FamilyFiles, settings: Mapping[str, Any], *, n_ctx: int, type_k: str, type_v: str) -> Manifest:
    """The family, and every parameter that can change an answer."""
    given = {name: value for name, value in settings.items() if name not in ("draft", "ordered", "trace")}
    own = files.spec.settings(given.get("profile"))
    defaults = {name: value for name, value in DEFAULTS.items() if name in _TOLD}
    parameters = {**defaults, **own, **given, "profiles": files.spec.profiles or None}
    return Manifest.of(files, {**parameters, "n_ctx": n_ctx, "type_k": type_k, "type_v": type_v})


def _each(waiting: Callable[[], AbstractContextManager[object]], items: Iterator[Line]) -> Iterator[Line]:
    """`items`, each waited for inside `waiting`."""
    while True:
        with waiting():
            item = next(items, None)
        if item is None:
            return
        yield item


def _as_they_come(intake: Intake, pipe: Pipe) -> Iterator[Any]:
    """The requests in `pipe`, and LATER whenever the next one has not come and others are running."""
    requests = iter(intake)
    while True:
        if intake.n_running and pipe.would_wait():
            yield LATER
        elif request := next(requests, None):
            yield request
        else:
            return
