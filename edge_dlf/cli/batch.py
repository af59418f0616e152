"""`edge-dlf batch`."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from json import dumps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..errors import InvalidParameterError, require
from .interrupts import interruptible
from .opening import family_command, open_family
from .options import PARALLEL, Options, form_options, method_option, prompt_cache_option, shared_options
from .screen import Screen
from .tracing import Tracer, trace_option, tracing

if TYPE_CHECKING:
    from ..api import FusedLlama
    from ..batch.ledger import Ledger, Row
    from .progress import ProgressLine


@family_command(short_help="Answer a file of prompts.")
@click.argument("input", metavar="INPUT|-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--output", "-o", metavar="FILE|-", required=True, help="Where the answers go, one line a row.")
@click.option("--errors", metavar="FILE", help="Where rows that failed go, in place of the output.")
@click.option("--ordered", is_flag=True, help="Write rows in the order of the input, not as they finish.")
@click.option("--exact", is_flag=True, help="Decode one row at a time, so that no other row changes its rounding.")
@click.option("--keep", is_flag=True, help="Copy columns that no request uses, such as an answer, to the output.")
@click.option("--parallel", type=PARALLEL, default="auto", help="Rows at once [auto: 16, or 32 on a GPU].")
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    help="Run on all machines of a Ray cluster: auto, or its address; alone, start Ray on this machine.",
)
@click.option("--retry-errors", is_flag=True, help="Run again the rows that failed in an earlier run.")
@click.option("--restart", is_flag=True, help="Begin anew; the earlier output is kept as FILE.1, FILE.2, …")
@click.option("--raw", is_flag=True, help="Take prompts as they are, without the chat template.")
@click.option("--quiet", is_flag=True, help="Show neither progress nor summary.")
@click.option("--json", is_flag=True, help="Print a summary as one JSON object.")
@prompt_cache_option
@trace_option
@method_option
@form_options
@shared_options
@click.pass_context
def batch(
    ctx: click.Context,
    /,
    input: str,
    output: str,
    errors: str | None,
    ordered: bool,
    exact: bool,
    keep: bool,
    retry_errors: bool,
    restart: bool,
    raw: bool,
    quiet: bool,
    json: bool,
    trace: Path | None,
    **shared: Any,
) -> None:
    """Answer every row of INPUT, a file of JSON lines, or of stdin.

    A row is a request as in OpenAI's batches, or {"prompt": …} or {"messages": …}, with an "id" if you like. Given
    again, the same command goes on where an earlier run was stopped, by whatever it was.
    """
    from ..batch.files import Targets, open_outputs
    from ..batch.run import manifest_of
    from .progress import ProgressLine

    options, screen = Options.of(ctx, shared), Screen()
    settings = _settings(options, raw=raw, ordered=ordered, exact=exact)
    file = ctx.with_resource(click.open_file(input, "rb"))
    targets, status, progress = Targets.of(output, errors, file, trace), "failed", None
    try:
        with (
            tracing(trace, options.spec.name) as tracer,
            open_outputs(
                targets,
                file,
                lambda: manifest_of(options.files, settings, **options.cache),
                restart=restart,
                retry_errors=retry_errors,
                ordered=ordered,
                notice=lambda what: None if quiet else screen.say(f"note: {what}"),
            ) as (ledger, n_rows),
        ):
            progress = ProgressLine(n_rows, ledger.n_rows, ledger.n_failed)
            _run(options, settings | tracer.settings, file, ledger, tracer, progress, screen, quiet, keep)
        status = "completed"
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        if progress:
            screen.say(f"stopped: {progress.summary()}{'; the same command goes on from here' * targets.can_resume}")
        raise
    finally:
        if json and progress:
            names = {"output": str(targets.output or output), "errors": targets.errors and str(targets.errors)}
            click.echo(dumps({**progress.report(status), **names}, ensure_ascii=False), err=targets.output is None)
    if not quiet:
        _say_done(screen, progress, targets.can_resume)
    if progress.n_failed:
        ctx.exit(1)


def _say_done(screen: Screen, progress: ProgressLine, can_resume: bool) -> None:
    if progress.first_failure:
        screen.say(progress.first_failure)
    again = "; --retry-errors runs what failed again" if progress.n_failed and can_resume else ""
    screen.say(f"done: {progress.summary()}{again}")


def _settings(options: Options, *, raw: bool, ordered: bool, exact: bool) -> dict[str, Any]:
    """Return the arguments of `FusedLlama.batch`."""
    require(not (raw and options.system), "a system prompt needs the chat template: leave out --raw or --system")
    seed = options.spec.settings().get("seed", 0)
    settings = {"seed": seed, **options.settings, "system": options.system, "raw": raw, "ordered": ordered}
    if not exact:
        return settings
    if options.ray or options.loading["n_parallel"] not in ("auto", 1):
        raise InvalidParameterError("--exact decodes one row at a time here: leave out --parallel and --ray")
    if "prompt_cache" in options.loading:
        raise InvalidParameterError("--exact reads every prompt anew: leave out --prompt-cache")
    options.loading["n_parallel"] = 1
    return {**settings, "exact": True}


def _run(
    options: Options,
    settings: Mapping[str, Any],
    input: IO[bytes],
    ledger: Ledger,
    tracer: Tracer,
    progress: ProgressLine,
    screen: Screen,
    quiet: bool,
    keep: bool,
) -> None:
    """Run every row that is not finished, until a signal comes; nothing is loaded if there is none."""
    from ..batch.run import run_rows

    llm: FusedLlama | None = None

    def finish(row: Row) -> None:
        if row["response"]:
            tracer.add_result(row["custom_id"], row["response"]["body"])
        ledger.write(row)
        progress.add(row)
        stop.check()

    @contextmanager
    def load() -> Iterator[FusedLlama]:
        nonlocal llm
        with ExitStack() as stack:
            with stop.at_once():
                llm = stack.enter_context(open_family(options, screen))
            progress.n_picked = llm.n_picked
            stack.enter_context(nullcontext() if quiet else progress.shown(screen))
            yield llm

    signals = (signal.SIGINT, signal.SIGTERM)
    with interruptible(screen, lambda: llm.interrupt() if llm else None, signals) as stop:
        run_rows(
            input,
            ledger,
            finish,
            load,
            settings,
            is_stream=progress.n_total is None,
            takes_later=options.ray is None,
            waiting=stop.at_once,
            keep=keep,
        )
