"""`edge-dlf tune`."""

from __future__ import annotations

import sys
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidParameterError
from ..params import show
from .interrupts import interruptible
from .opening import family_command, open_family
from .options import Options, reading_options
from .prompts import raw_option
from .screen import Screen

if TYPE_CHECKING:
    from ..evidence.held_out import Outcome
    from ..evidence.tune import TuneResult

_WIDTH = 110
"""Columns of the table where stdout is no terminal."""
_MOST_WEIGHTED = 6
"""Weighted fusions that the table has room for; of more, those that no other one outdoes."""


@family_command(short_help="Find what to run for a task, from examples.")
@click.argument("examples", metavar="EXAMPLES.jsonl", type=click.Path(path_type=Path))
@raw_option
@click.option("--system", help="System prompt.")
@click.option("--json", is_flag=True, help="Print one JSON object.")
@click.option("--write", is_flag=True, help="Put what is recommended into the family's family.toml, as its default.")
@click.option(
    "--profile",
    metavar="NAME",
    allow_from_autoenv=False,
    help="Let --write put it there as a profile, which other commands choose by --profile NAME.",
)
@click.option("--check", metavar="N", type=click.IntRange(min=1), help="Generate answers to N held-out examples too.")
@reading_options
@click.pass_context
def tune(
    ctx: click.Context,
    /,
    examples: Path,
    raw: bool,
    json: bool,
    write: bool,
    profile: str | None,
    check: int | None,
    **values: Any,
) -> None:
    """Find what to run for a task: one member alone, static or dynamic fusion, or fusion with fitted weights.

    EXAMPLES.jsonl has rows {"prompt": …, "answer": …}, or {"messages": […]} that end with the assistant's answer; 20 to
    100 of them are enough for most tasks. Every member reads them once, nothing is generated. Methods are compared by
    the probability that they give the answers, weights on examples that they were not fitted on. The cheapest method
    that is as good as the best is recommended.

    Examples that an expert was trained on flatter it: take others. Given again, a command that was stopped continues.
    """
    options, screen = _for_all_members(Options.of(ctx, {**values, "parallel": "auto"})), Screen()
    from ..evidence.examples import read_rows, tokenized
    from ..evidence.tune import check as generate_answers
    from ..evidence.tune import distinct, tune_examples
    from ..families.defaults import own_file, write_settings
    from ..families.spec import check_profile_name
    from .progress import ProgressLine

    if profile is not None:
        check_profile_name(profile)
        if not write:
            raise InvalidParameterError("--profile names what --write writes: give both")
    file = own_file(options.family) if write else None
    rows = list(read_rows(examples))
    with open_family(options, screen) as llm, interruptible(screen, llm.interrupt) as stop:
        read = distinct(tokenized(llm, rows, raw=raw, system=options.system))
        progress = ProgressLine(len(read))
        progress.unit = "examples"

        def tell(n_done: int) -> None:
            if progress.n_done == 0:
                progress.n_before = n_done
            progress.n_done = n_done
            progress.tell()
            stop.check()

        with progress.shown(screen):
            result = tune_examples(llm, read, n_threads=options.loading.get("n_threads"), tell=tell)
        if check:
            result = generate_answers(llm, result, check)
    if json:
        screen.show(dumps(result.as_json(), ensure_ascii=False))
    else:
        _show(screen, result)
        how = f"--profile {profile}" if profile else _flags(result.settings)
        screen.show(f"To use it: edge-dlf chat {_named(options)} {how}")
    if file:
        write_settings(file, {profile: result.settings})
        screen.say(f"written to {f'[profiles.{profile}]' if profile else '[defaults]'} of {file}")


def _for_all_members(options: Options) -> Options:
    """The options without the family's own method, for which some members need not be loaded."""
    defaults = {name: value for name, value in options.spec.defaults.items() if name not in ("method", "weights")}
    return replace(options, spec=replace(options.spec, defaults=defaults))


def _show(screen: Screen, result: TuneResult) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..evidence.tune import answers_right, nats

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "method", "weights"):
        table.add_column(heading, no_wrap=heading == "method")
    for heading in ("nats a token", "tokens right", "answers right", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in _shown(result):
        loss, right = outcome.loss, answers_right(outcome)
        table.add_row(
            "→" if outcome is result.recommended else "",
            outcome.name,
            " ".join(f"{name} {weight:.2f}" for name, weight in outcome.settings.get("weights", {}).items()),
            f"{nats(loss.mean)} ± {nats(loss.high - loss.mean)}",
            f"{outcome.share_right:.1%}",
            f"{right.mean:.0%} ({right.low:.0%}–{right.high:.0%})",
            f"{result.cost(outcome):.2f}",
            style="bold" if outcome is result.recommended else "",
        )
    n_tokens = sum(len(example.answer) for example in result.examples)
    screen.show(f"{result.family}, {len(result.examples):,} examples with {n_tokens:,} tokens; held out, 95% intervals")
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    screen.show("cost: bytes of weights read for a token, relative to the large model alone\n")
    for line in (result.verdict, *result.notes):
        screen.show(line)
    if result.check:
        counts = ", ".join(f"{name} {n}" for name, n in result.check.n_exact.items())
        screen.show(f"Of {result.check.n} held-out answers, generated, are exact: {counts}.")


def _shown(result: TuneResult) -> list[Outcome]:
    """The methods in the table."""
    weighted = [outcome for outcome in result.outcomes if outcome.prior]
    if len(weighted) <= _MOST_WEIGHTED:
        return list(result.outcomes)

    def is_outdone(one: Outcome) -> bool:
        others = (other for other in weighted if other is not one)
        return any(other.n_bytes <= one.n_bytes and other.losses.sum() < one.losses.sum() for other in others)

    return [one for one in result.outcomes if one is result.recommended or not (one.prior and is_outdone(one))]


def _flags(settings: dict[str, Any]) -> str:
    """The settings as options of a command."""
    return " ".join(f"--{name} {show(value)}" for name, value in sorted(settings.items()) if value is not None)


def _named(options: Options) -> str:
    return f"-f {options.family}" if options.family else "[your family]"
