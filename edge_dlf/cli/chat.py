"""`edge-dlf chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import EdgeDLFError, require
from ..system.jsonl import MAX_LINE_BYTES, read_lines
from .opening import family_command, open_family
from .options import Options, family_argument, method_option, prompt_cache_option, shared_options
from .screen import Screen, one_line
from .tracing import trace_option, tracing

if TYPE_CHECKING:
    from .editor import Editor
    from .session import Session


@family_command(short_help="Talk with a family.")
@family_argument
@click.option("--continue", "-c", "continues", is_flag=True, help="Go on with the last conversation of this family.")
@prompt_cache_option
@trace_option
@method_option
@shared_options
@click.pass_context
def chat(ctx: click.Context, /, trace: Path | None, continues: bool, **shared: Any) -> None:
    """Talk with a family: the one named by FAMILY or by --family, or one made of files.

    /help in the chat lists its commands. Where input or output is no terminal, each line of stdin is a message,
    and only the answers go to stdout.
    """
    from .conversation import Conversation
    from .kept import Kept
    from .session import Session

    options, screen = Options.of(ctx, shared), Screen()
    with tracing(trace, options.spec.name) as tracer, open_family(options, screen) as llm:
        kept = Kept(llm.name, screen.say) if screen.is_terminal or continues else None
        session = Session(
            llm, screen, dict(options.settings), llm.files.spec, Conversation(options.system), tracer, kept
        )
        if continues:
            go_on(session)
        if screen.is_terminal:
            from .editor import Editor

            exit_code = converse(session, Editor(llm.files.methods, screen.say))
        else:
            exit_code = answer_lines(session)
        if kept:
            llm.driver.keep()
        ctx.exit(exit_code)


def go_on(session: Session) -> None:
    """Go on with the last kept conversation of the family; what was chosen for this chat goes before what was kept."""
    from .commands import reopen

    assert session.kept
    system = session.conversation.system
    for path in session.kept.recent():
        try:
            reopen(session, path, session.settings)
        except EdgeDLFError as error:
            session.screen.say(f"note: {one_line(error)}")
        else:
            session.conversation.system = session.conversation.system if system is None else system
            return
    session.screen.say(f"no conversation with {session.llm.name} is kept yet: this is a new one")


def converse(session: Session, editor: Editor) -> int:
    """Read and answer messages until the user leaves. Returns the exit code."""
    screen, llm = session.screen, session.llm
    screen.say(f"{llm.name} · method {session.value('method')} · /help lists the commands")
    n_interrupts = 0
    while n_interrupts < 2:
        try:
            line = editor.read()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            n_interrupts = n_interrupts + 1 if editor.was_empty else 0
            if n_interrupts == 1:
                screen.say("Ctrl-C again leaves, as Ctrl-D does")
            continue
        n_interrupts = 0
        try:
            with screen.keys_kept_back():
                goes_on = handle(session, line)
        except EdgeDLFError as error:
            screen.complain(error)
        except KeyboardInterrupt:
            screen.say("stopped")
        else:
            if not goes_on:
                return 0
    return 130


def answer_lines(session: Session) -> int:
    """Answer each line of stdin. Returns the exit code. Raises InvalidParameterError for what is no text in lines."""
    exit_code = 0
    for line in read_lines(sys.stdin.buffer):
        try:
            require(line.content is not None, f"line {line.number} has more than {MAX_LINE_BYTES >> 20} MiB")
            text = (line.content or b"").decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            if not handle(session, text):
                break
        except EdgeDLFError as error:
            session.screen.complain(error)
            exit_code = EdgeDLFError.exit_code
    return exit_code


def handle(session: Session, line: str) -> bool:
    """Send a message, or run a command. Returns whether the chat goes on. Raises EdgeDLFError."""
    from .commands import run

    try:
        if line.startswith("/") and not line.startswith("//"):
            return run(session, line.rstrip())
        if line.strip():
            session.ask(line.removeprefix("/"))
        return True
    finally:
        session.keep()
