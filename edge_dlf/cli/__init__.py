"""The command `edge-dlf`. Each command imports the engine when it runs, so that `--help` stays fast."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import CapacityError, EdgeDLFError
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
from .trace import trace
from .train import train
from .tune import tune


class _Group(click.Group):
    """Group whose commands end with one line and an exit code when they raise."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
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


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM unwind the command, so that the terminal and open files are left in order."""

    def leave(_signal: int, _frame: object) -> NoReturn:
        raise SystemExit(143)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge-dlf")
def main() -> None:
    """Dynamic Logits Fusion for GGUF models: a large local model answers with the skill of small fine-tuned experts."""


for _command in (
    chat,
    generate,
    compare,
    batch,
    serve,
    tune,
    train,
    evaluate,
    trace,
    bench,
    doctor,
    list_,
    show,
    pull,
    new,
    rm,
):
    main.add_command(_command)
