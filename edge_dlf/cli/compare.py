"""`edge-dlf compare`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import dumps
from typing import TYPE_CHECKING, Any

import click

from .interrupts import interruptible
from .opening import family_command, open_family
from .options import Options, shared_options
from .prompts import Prompt, raw_option, read_prompt
from .screen import Screen, one_line, printable, summary

if TYPE_CHECKING:
    from rich.table import Table

    from ..answers.stream import Report
    from ..api import FusedLlama

_LEAST_COLUMN = 28


@family_command(short_help="Answer one prompt by every method.")
@click.argument("prompt", metavar="PROMPT|-", required=False)
@raw_option
@click.option("--json", is_flag=True, help="Print one JSON object: the answer of each method.")
@shared_options
@click.pass_context
def compare(ctx: click.Context, /, prompt: str | None, raw: bool, json: bool, **shared: Any) -> None:
    """Answer one PROMPT, or the text on stdin, by every method in turn: large, each expert, static and dynamic.

    Side by side on a terminal that is wide enough. With no prompt at all, the family's own examples, where it has any.
    """
    options, screen = Options.of(ctx, shared), Screen()
    questions = _questions(prompt, options, raw=raw)
    with open_family(options, screen) as llm, interruptible(screen, llm.interrupt):
        methods = ("large", *llm.experts, "static", "dynamic")
        # One seed for all: methods that agree then draw the same token.
        settings = {"seed": secrets.randbits(32), **options.settings}
        if json:
            results = {
                question.text: {m: question.complete(llm, {**settings, "method": m}) for m in methods}
                for question in questions
            }
            screen.show(dumps(results if len(questions) > 1 else results[questions[0].text], ensure_ascii=False))
        elif len(questions) > 1:
            for question in questions:
                answers = [Answer(method) for method in methods]
                show_lines(screen, question.text, answers, _run(llm, question, settings, answers))
        else:
            answers = [Answer(method) for method in methods]
            steps = _run(llm, questions[0], settings, answers)
            if _is_wide(screen, len(methods)):
                show_columns(answers, steps)
            else:
                show_in_turn(screen, answers, steps)


def _questions(prompt: str | None, options: Options, *, raw: bool) -> list[Prompt]:
    """What was asked, or the family's examples where that is nothing."""
    examples = [Prompt(example, raw, options.system) for example in options.spec.examples]
    if prompt is None and examples and sys.stdin.isatty():
        return examples
    question = read_prompt(prompt, raw=raw, system=options.system)
    return examples if prompt is None and examples and not question.text else [question]


@dataclass
class Answer:
    """What one method has answered so far; `report` is there once it began."""

    method: str
    text: str = ""
    report: Report | None = None
    is_done: bool = False


def _run(
    llm: FusedLlama, question: Prompt, settings: Mapping[str, Any], answers: list[Answer]
) -> Iterator[tuple[Answer, str]]:
    """Answer by one method after the other; yields whose turn it is and what text it adds."""
    for answer in answers:
        stream = llm.stream(question.tokens(llm), **{**settings, "method": answer.method})
        answer.report = stream.report
        for token in stream:
            answer.text += token.text
            yield answer, token.text
        answer.is_done = True
        yield answer, ""


def _is_wide(screen: Screen, n_columns: int) -> bool:
    from rich.console import Console

    return screen.is_terminal and Console().width >= n_columns * _LEAST_COLUMN


def show_columns(answers: list[Answer], steps: Iterator[tuple[Answer, str]]) -> None:
    """A table that grows while the answers come."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    try:
        with Live(console=console, get_renderable=lambda: _table(answers), transient=True, refresh_per_second=8):
            for _ in steps:
                pass
    finally:
        console.print(_table(answers))


def _table(answers: list[Answer]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_footer=True, padding=(0, 1))
    for answer in answers:
        footer = summary(answer.report) if answer.report and answer.is_done else ""
        table.add_column(answer.method, Text(footer, style="dim"), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(answer.text)) for answer in answers))
    return table


def show_lines(screen: Screen, prompt: str, answers: list[Answer], steps: Iterator[tuple[Answer, str]]) -> None:
    """The prompt, and below it one line for each answer."""
    width = max(len(answer.method) for answer in answers)
    screen.show(f"> {printable(prompt)}")
    for answer, _ in steps:
        if answer.is_done:
            screen.show(f"  {answer.method:<{width}}  {one_line(answer.text)}")
    screen.end_line()


def show_in_turn(screen: Screen, answers: list[Answer], steps: Iterator[tuple[Answer, str]]) -> None:
    """One answer below the other, each under its method's name."""
    shown: Answer | None = None
    try:
        for answer, text in steps:
            if answer is not shown:
                screen.write(f"== {answer.method}\n")
            shown = answer
            screen.write(text)
            if answer.report and answer.is_done:
                screen.write(f"\n[{summary(answer.report)}]\n" + ("" if answer is answers[-1] else "\n"))
    finally:
        if shown and not shown.is_done:
            screen.end_line()
