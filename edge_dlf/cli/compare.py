"""`edge-dlf compare`."""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidParameterError
from .interrupts import interruptible
from .opening import family_command, open_family
from .options import Options, shared_options
from .prompts import Prompt, raw_option, read_prompt
from .screen import Screen, may_move, one_line, printable, summary

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
    """Answer one PROMPT, or the text on stdin, by every method in turn: large, each expert, static, blend, weighted
    (where the family has weights) and dynamic.

    Side by side on a terminal that is wide enough. With no prompt at all, the family's own examples, where it has any.
    """
    options, screen = Options.of(ctx, shared), Screen()
    questions = _questions(prompt, options, raw=raw)
    with open_family(options, screen) as llm, interruptible(screen, llm.interrupt):
        methods = options.methods(llm.files)
        is_wide = shutil.get_terminal_size().columns >= len(methods) * _LEAST_COLUMN
        # One seed for all: methods that agree then draw the same token.
        settings = {"seed": secrets.randbits(32), **options.settings}
        if json:
            results = {
                question.text: {m: question.complete(llm, {**settings, "method": m}) for m in methods}
                for question in questions
            }
            screen.show_json(results if len(questions) > 1 else results[questions[0].text])
            return
        for question in questions:
            answers, run = [Answer(method) for method in methods], partial(_run, llm, question, settings)
            if len(questions) > 1:
                show_lines(screen, question.text, answers, run)
            elif screen.is_terminal and may_move(sys.stdout) and is_wide:
                show_columns(answers, chain.from_iterable(map(run, answers)))
            else:
                show_in_turn(screen, answers, run)


def _questions(prompt: str | None, options: Options, *, raw: bool) -> list[Prompt]:
    """The prompt, or the family's examples where there is none."""
    try:
        return [read_prompt(prompt, raw=raw, system=options.system)]
    except InvalidParameterError:
        examples = [Prompt(example, raw, options.system) for example in options.spec.examples]
        if prompt is not None or not examples:
            raise
        return examples


@dataclass
class Answer:
    """The answer by one method, as far as it has come; `report` is None until it begins."""

    method: str
    text: str = ""
    report: Report | None = None

    @property
    def summary(self) -> str:
        """Speed and α of the answer, once it has ended."""
        return summary(self.report) if self.report and self.report.finish_reason else ""


def _run(llm: FusedLlama, question: Prompt, settings: Mapping[str, Any], answer: Answer) -> Iterator[str]:
    """Let a method answer. Yields the texts of its tokens."""
    stream = llm.stream(question.tokens(llm, settings), **{**settings, "method": answer.method})
    answer.report = stream.report
    for token in stream:
        answer.text += token.text
        yield token.text


def show_columns(answers: Sequence[Answer], texts: Iterable[str]) -> None:
    """Show a table of the answers, which grows as the `texts` of their tokens come."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    try:
        with Live(console=console, get_renderable=lambda: _table(answers), transient=True, refresh_per_second=8):
            for _ in texts:
                pass
    finally:
        console.print(_table(answers))


def _table(answers: Sequence[Answer]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_footer=True, padding=(0, 1))
    for answer in answers:
        table.add_column(answer.method, Text(answer.summary, style="dim"), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(answer.text)) for answer in answers))
    return table


def show_lines(screen: Screen, prompt: str, answers: Sequence[Answer], run: Callable[[Answer], Iterable[str]]) -> None:
    """Show the prompt, and below it one line for each answer."""
    width = max(len(answer.method) for answer in answers)
    screen.show(f"> {printable(prompt)}")
    for answer in answers:
        screen.show(f"  {answer.method:<{width}}  {one_line(''.join(run(answer)))}")
    screen.end_line()


def show_in_turn(screen: Screen, answers: Sequence[Answer], run: Callable[[Answer], Iterator[str]]) -> None:
    """Show the answers one below the other, each under its method's name."""
    for answer in answers:
        texts = run(answer)
        screen.write(f"== {answer.method}\n" + next(texts, ""))
        try:
            for text in texts:
                screen.write(text)
        finally:
            screen.end_line()
        screen.write(f"[{answer.summary}]\n" + ("" if answer is answers[-1] else "\n"))
