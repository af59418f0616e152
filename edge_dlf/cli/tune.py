"""`edge-dlf tune`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import EdgeDLFError, InvalidParameterError
from .interrupts import interruptible
from .opening import family_command, open_family
from .options import Options, reading_options
from .prompts import raw_option
from .screen import Screen, one_line, show

if TYPE_CHECKING:
    from ..evidence.examples import Row
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
@click.option(
    "--task-field",
    metavar="FIELD",
    help="Field of a row that names its task. Each task is compared by itself, and is the name of what --write writes.",
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
    task_field: str | None,
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
    from ..evidence.examples import by_task, read_rows
    from ..families.defaults import own_file, write_settings
    from ..families.spec import check_profile_name

    if profile is not None and (task_field or not write):
        given = "--task-field gives each task's profile its name: leave one out"
        raise InvalidParameterError(given if task_field else "--profile names what --write writes: give both")
    file = own_file(options.family) if write else None
    rows = list(read_rows(examples))
    tasks = by_task(rows, task_field) if task_field else {"": rows}
    profiles = {task: task or profile for task in tasks} if write else dict.fromkeys(tasks)
    for name in profiles.values():
        if name is not None:
            check_profile_name(name)
    results = _results(options, screen, tasks, raw=raw, n_checked=check)
    if json:
        found = {task: result.as_json() for task, result in results.items()}
        screen.show_json({"tasks": found} if task_field else found[""])
    else:
        for task, result in results.items():
            if task_field:
                screen.show(f"== {one_line(task)}")
            _show(screen, result)
            how = f"--profile {profiles[task]}" if profiles[task] else _flags(result.settings)
            if result.is_known:
                screen.show(f"To use it: edge-dlf {'generate --raw' if raw else 'chat'} {_named(options)} {how}")
    if file:
        known = {profiles[task]: result.settings for task, result in results.items() if result.is_known}
        write_settings(file, known)
        for name in known:
            screen.say(f"written to {f'[profiles.{name}]' if name else '[defaults]'} of {file}")
        if unknown := [task for task, result in results.items() if not result.is_known]:
            which = f"these tasks: {', '.join(map(one_line, unknown))}" if task_field else "this task"
            raise EdgeDLFError(f"nothing is written for a task that no member knows, and no member knows {which}")


def _results(
    options: Options, screen: Screen, tasks: Mapping[str, Sequence[Row]], *, raw: bool, n_checked: int | None
) -> dict[str, TuneResult]:
    """Compare the methods on the rows of each task, and show how far it is. n_checked: answers to generate."""
    from ..evidence.examples import tokenized
    from ..evidence.tune import check, tune_tasks
    from .progress import ProgressLine

    with open_family(options, screen) as llm, interruptible(screen, llm.interrupt) as stop:
        read = {name: tokenized(llm, rows, raw=raw, system=options.system) for name, rows in tasks.items()}
        progress = ProgressLine(len(set(chain(*read.values()))))
        progress.unit = "examples"
        with progress.shown(screen):
            tell = progress.counter(stop.check)
            results = tune_tasks(llm, read, n_threads=options.loading.get("n_threads"), tell=tell)
        if n_checked:
            results = {name: check(llm, result, n_checked) for name, result in results.items()}
        return results


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
    screen.show("cost: bytes of weights read for a token, relative to the large model alone; planned, not measured\n")
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
