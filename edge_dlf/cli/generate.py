"""`edge-dlf generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .interrupts import interruptible
from .opening import family_command, open_family
from .options import Options, form_options, method_option, prompt_cache_option, shared_options
from .prompts import Prompt, raw_option, read_prompt
from .screen import Screen, cut_short
from .tracing import Tracer, trace_option, tracing

if TYPE_CHECKING:
    from ..api import FusedLlama


@family_command(short_help="Answer one prompt.")
@click.argument("prompt", metavar="PROMPT|-", required=False)
@raw_option
@click.option("--json", is_flag=True, help="Print one JSON object in place of the text.")
@prompt_cache_option
@trace_option
@method_option
@form_options
@shared_options
@click.pass_context
def generate(
    ctx: click.Context, /, prompt: str | None, raw: bool, json: bool, trace: Path | None, **shared: Any
) -> None:
    """Answer one PROMPT, or the text on stdin: the answer to stdout, all else to stderr."""
    options, screen = Options.of(ctx, shared), Screen()
    question = read_prompt(prompt, raw=raw, system=options.system)
    with tracing(trace, options.spec.name) as tracer, open_family(options, screen) as llm:
        if json:
            with interruptible(screen, llm.interrupt):
                answer = question.complete(llm, {**options.settings, **tracer.settings})
            tracer.add_result(question.text, answer)
            screen.show_json(answer)
        else:
            _stream(llm, question, options.settings, screen, tracer)


def _stream(llm: FusedLlama, question: Prompt, settings: dict[str, Any], screen: Screen, tracer: Tracer) -> None:
    """Write the answer as it comes. Its text ends with a line break, whatever ends the answer."""
    stream = llm.stream(question.tokens(llm, settings), **settings, **tracer.settings)
    text = ""
    try:
        with interruptible(screen, llm.interrupt):
            for token in tracer.tokens(stream, question.text, llm):
                text += token.text
                screen.think(token.reasoning)
                screen.write(token.text)
    finally:
        screen.end_thinking()
        if text and not text.endswith("\n"):
            screen.end_line()
    if note := cut_short(stream.report, llm.n_ctx):
        screen.say(f"note: {note}")
