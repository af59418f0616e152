"""The command `edge-dlf`. Each command imports the engine when it runs, so that `--help` stays fast."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from .. import __version__
from ..errors import CapacityError, EdgeDLFError
from ..system.durable import file_error
from ..system.machine import require_platform
from .batch import batch
from .bench import bench
from .chat import chat
from .compare import compare
from .doctor import doctor
from .evaluate import evaluate
from .generate import generate
from .models import list_, show
from .new import new
from .pull import pull, rm
from .screen import one_line
from .serve import serve
from .streams import close_streams, open_streams
from .trace import trace
from .train import train
from .tune import tune


class _Group(click.Group):
    """Group whose commands end with one line and an exit code when they raise."""

    def main(self, *args: Any, **extra: Any) -> Any:
        open_streams()
        try:
            try:
                return super().main(*args, **extra)
            finally:
                close_streams()
        except OSError as error:
            found = file_error(error.filename or "input or output", error)
            if not isinstance(error, BrokenPipeError):  # a reader that leaves, such as `head`, wants no more lines
                click.echo(f"edge-dlf: {one_line(found)}", err=True)
            sys.exit(found.exit_code)
        except ImportError as error:  # also where memory does not suffice for a library
            click.echo(f"edge-dlf: a part of this installation cannot be loaded: {one_line(_origin(error))}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            require_platform()
            with _sigterm_as_exit():
                return super().invoke(ctx)
        except EdgeDLFError as error:
            click.echo(f"edge-dlf: {one_line(error)}", err=True)
            ctx.exit(error.exit_code)
        except MemoryError:
            click.echo("edge-dlf: not enough memory", err=True)
            ctx.exit(CapacityError.exit_code)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(command.name), command.get_short_help_str()) for command in commands])


def _origin(error: BaseException) -> BaseException:
    """The error that others were raised from; NumPy's own is a page of advice."""
    return _origin(error.__cause__) if error.__cause__ else error


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM unwind the command, so that the terminal and open files are left in order. If whoever started this
    process wants it to be ignored, it stays so."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    def leave(_signal: int, _frame: object) -> NoReturn:
        raise SystemExit(143)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _version(ctx: click.Context, _option: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        from ..llama import versions

        click.echo(f"edge-dlf {__version__}, {versions()}")
        ctx.exit()


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Three things to try: edge-dlf compare, edge-dlf chat demo, edge-dlf list.",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show versions.")
def main() -> None:
    """Dynamic Logits Fusion for GGUF models: a large local model answers with the skill of small fine-tuned experts."""


@main.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a script that completes commands.

    In bash: source <(edge-dlf completion bash). In zsh: source <(edge-dlf completion zsh). In fish: edge-dlf completion
    fish | source. Put that line into the shell's start-up file to keep it.
    """
    made = get_completion_class(shell)
    assert made
    click.echo(made(main, {}, "edge-dlf", "_EDGE_DLF_COMPLETE").source())


_SECTIONS = {
    "Answers": (chat, generate, compare, batch, serve),
    "Choose and measure": (tune, evaluate, trace, bench, doctor),
    "Families and experts": (list_, show, pull, new, rm, train),
    "The shell": (completion,),
}
for _command in (command for commands in _SECTIONS.values() for command in commands):
    main.add_command(_command)
