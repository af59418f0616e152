"""`edge-dlf doctor`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from .opening import family_command, notices
from .options import Options, family_argument, names_a_family, placing_options
from .screen import Screen, may_style, one_line

if TYPE_CHECKING:
    from ..evidence.doctor import Check
    from ..families.spec import FamilySpec

_INDENT = " " * 9
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@family_command(short_help="Look at this machine, and at a family down to a decode.")
@family_argument
@click.option("--json", is_flag=True, help="Print one JSON object.")
@placing_options
@click.pass_context
def doctor(ctx: click.Context, /, json: bool, **values: Any) -> None:
    """Look at this machine and this build of llama.cpp; and, given a FAMILY, at its files, its tokenizer, the memory it
    takes, its chat template, and a real decode of every member in a process that may crash.

    Each line is ok, a note (it works, and could be better) or a problem, with one next step. The exit code is 0 only if
    there is no problem.
    """
    screen = Screen()
    ctx.with_resource(notices("edge_dlf", logging.NullHandler()))  # what the library notes has a line here
    screen.begin_wait("looking …")
    found = []
    for check in _checks(ctx, values):
        found.append(check)
        if not json:
            _show(screen, check)
            screen.begin_wait("looking …")
    screen.end_wait()
    n_problems = sum(check["verdict"] == "problem" for check in found)
    if json:
        screen.show_json({"ok": n_problems == 0, "checks": found})
    else:
        screen.show("all is well" if not n_problems else f"{n_problems} problem{'s' if n_problems > 1 else ''}")
    if n_problems:
        ctx.exit(1)


def _checks(ctx: click.Context, values: dict[str, Any]) -> Iterator[Check]:
    from ..evidence.doctor import examine_family, examine_machine

    def load() -> tuple[FamilySpec, dict[str, Any]]:
        options = Options.of(ctx, values)
        return options.spec, options.loading

    return chain(examine_machine(), examine_family(load) if names_a_family(values) else ())


def _show(screen: Screen, check: Check) -> None:
    screen.end_wait()
    verdict = f"{check['verdict']:<{len(_INDENT)}}"
    if may_style(sys.stdout):
        verdict = click.style(verdict, fg=_COLOURS[check["verdict"]])
    screen.show(f"{verdict}{check['name']}: {one_line(check['text'])}")
    if check["next_step"]:
        screen.show(f"{_INDENT}→ {one_line(check['next_step'])}")
