"""`edge-dlf batch`."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from itertools import chain
from json import dumps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..batch.outputs import Outputs, Targets, has_descriptor, open_outputs
from ..errors import InvalidParameterError
from .interrupts import Stop, interruptible
from .opening import open_family
from .options import DEFAULT_N_CTX, EPILOG, Options, Parallel, form_options, method_option, shared_options
from .progress import Progress
from .screen import Screen
from .settings import DEFAULTS
from .tracing import Tracer, trace_option, tracing

if TYPE_CHECKING:
    from ..api import FusedLlama
    from ..batch.intake import Intake
    from ..families.manifest import Manifest
    from ..system.jsonl import Line, Pipe


@click.command(
    context_settings={"auto_envvar_prefix": "EDGE_DLF"}, epilog=EPILOG, short_help="Answer a file of prompts."
)
@click.argument("input", metavar="INPUT|-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--output", "-o", metavar="FILE|-", required=True, help="Where the answers go, one line a row.")
@click.option("--errors", metavar="FILE", help="Where rows that failed go, in place of the output.")
@click.option("--ordered", is_flag=True, help="Write rows in the order of the input, not as they finish.")
@click.option("--parallel", type=Parallel(), default="auto", help="Rows at once [auto: 16, or 32 on a GPU].")
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
    options, screen, progress = Options.of(ctx, shared), Screen(), Progress()
    if raw and options.system:
        raise InvalidParameterError("a system prompt needs the chat template: leave out --raw or --system")
    settings = {**options.settings, "seed": _seed(options), "system": options.system, "raw": raw, "ordered": ordered}
    file = ctx.with_resource(click.open_file(input, "rb"))
    targets, status = Targets.of(output, errors, file), "failed"
    try:
        with (
            tracing(trace, options.spec.name) as tracer,
            open_outputs(
                targets,
                file,
                lambda: _manifest(options, raw),
                restart=restart,
                retry_errors=retry_errors,
                notice=lambda what: None if quiet else screen.say(f"note: {what}"),
            ) as outputs,
        ):
            progress.begin(outputs.n_rows, outputs.ledger.n_rows, outputs.ledger.n_failed)
            _run(options, settings | tracer.settings, file, outputs, tracer, progress, screen, quiet)
        status = "completed"
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        if progress.has_begun:
            goes_on = "; the same command goes on from here" if targets.can_resume else ""
            screen.say(f"stopped: {progress.summary()}{goes_on}")
        raise
    finally:
        if json and progress.has_begun:
            names = {"output": str(targets.output or output), "errors": targets.errors and str(targets.errors)}
            click.echo(dumps({**progress.report(status), **names}, ensure_ascii=False), err=targets.output is None)
    if not quiet:
        again = "; --retry-errors runs what failed again" if progress.n_failed and targets.can_resume else ""
        screen.say(f"done: {progress.summary()}{again}")
    if progress.n_failed:
        ctx.exit(1)


def _run(
    options: Options,
    settings: Mapping[str, Any],
    input: IO[bytes],
    outputs: Outputs,
    tracer: Tracer,
    progress: Progress,
    screen: Screen,
    quiet: bool,
) -> None:
    """Run every row that is not finished; nothing is loaded where there is none."""
    from ..batch.intake import Intake
    from ..system.jsonl import Pipe, read_lines

    llm: FusedLlama | None = None

    def interrupt() -> None:
        if llm:
            llm.interrupt()

    def finish(row: Mapping[str, Any]) -> None:
        if row["response"]:
            tracer.add_result(row["custom_id"], row["response"]["body"])
        outputs.ledger.write(row)
        progress.add(row)

    with ExitStack() as stack:
        stop = stack.enter_context(interruptible(screen, interrupt, (signal.SIGINT, signal.SIGTERM)))
        pipe = Pipe(input.fileno()) if outputs.n_rows is None and has_descriptor(input) else None
        intake = Intake(_until(stop, read_lines(pipe or input)), outputs.ledger.ids, finish)
        requests = _as_they_come(intake, pipe) if pipe and not options.ray else iter(intake)
        first = next(requests, None)
        if first is None:
            return
        with stop.at_once():
            llm = stack.enter_context(open_family(options, screen))
        progress.n_picked = llm.n_picked
        stack.enter_context(nullcontext() if quiet else progress.shown(screen))
        for row in llm.batch(chain([first], requests), **settings):
            finish(intake.finished(row))
            stop.check()


def _until(stop: Stop, lines: Iterator[Line]) -> Iterator[Line]:
    """`lines`, until a signal comes: also while the next one is waited for."""
    while True:
        with stop.at_once():
            line = next(lines, None)
        if line is None:
            return
        yield line


def _as_they_come(intake: Intake, pipe: Pipe) -> Iterator[Any]:
    """The requests in `pipe`; while the next one is waited for, those that run go on."""
    from ..answers.batch import LATER

    requests = iter(intake)
    while True:
        if intake.n_running and pipe.would_wait():
            yield LATER
        elif request := next(requests, None):
            yield request
        else:
            return


def _seed(options: Options) -> int:
    """What the seeds of sampled rows are made from, with their ids."""
    return int(options.settings.get("seed", options.spec.defaults.get("seed", 0)))


def _manifest(options: Options, raw: bool) -> Manifest:
    """The family, and every parameter that can change an answer."""
    from ..families.manifest import Manifest

    loading = options.loading
    parameters = {
        **DEFAULTS,
        "logit_bias": None,
        **options.spec.defaults,
        **options.settings,
        "seed": _seed(options),
        "system": options.system,
        "raw": raw,
        "n_ctx": loading.get("n_ctx", DEFAULT_N_CTX),
        "type_k": loading.get("type_k", "f16"),
        "type_v": loading.get("type_v", "f16"),
    }
    del parameters["draft"]
    return Manifest.of(options.files, parameters)
