"""`edge-dlf trace`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InvalidParameterError
from .screen import Screen, printable

if TYPE_CHECKING:
    from ..evidence.trace import Totals

_BLOCKS = " ▁▂▃▄▅▆▇█"


@click.command(short_help="Show why tokens were chosen.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", "-o", metavar="FILE.html", type=click.Path(path_type=Path), help="The page [FILE.html].")
def trace(file: Path, output: Path | None) -> None:
    """Make one HTML page of what --trace wrote to FILE, and sum it up here.

    The page holds everything that it needs: it opens from the disk, without a network.
    """
    from ..evidence.trace import read_trace
    from ..evidence.trace_page import is_page, write_page
    from ..system.durable import replacing, require_own
    from ..system.paths import expanded

    output = expanded(output or file.with_suffix(".html"))
    if os.path.exists(output) and output.samefile(file):  # noqa: PTH110  # a name that is too long is no error here
        raise InvalidParameterError(f"{output}: is the trace; write the page elsewhere with -o")
    require_own(output, is_page, "page of a trace")
    with replacing(output) as page:
        totals = write_page(read_trace(file), file.name, page)
    screen = Screen()
    for line in summary(totals):
        screen.show(printable(line))
    screen.say(f"page: {output}")


def summary(totals: Totals) -> list[str]:
    """The most important sums of a trace, in lines."""
    lines = [" · ".join([_count(totals.n_tokens, "token"), _count(totals.n_answers, "answer"), *totals.methods])]
    if totals.n_drafted:
        lines.append(f"drafted {_share(totals.n_drafted, totals.n_tokens)} of tokens")
    if not totals.n_fused:
        return lines
    n = totals.n_fused
    lines.append(
        f"mean α {totals.alpha_mean:.2f} · at the bound {totals.alpha_max:g} on {_share(totals.n_at_bound, n)} of steps"
        f" · at 0 on {_share(totals.n_at_zero, n)}"
    )
    if totals.n_compared:
        changed = _share(totals.n_changed, totals.n_tokens)
        lines.append(f"fusion changed the large model's choice of {_count(totals.n_changed, 'token')}, {changed}")
    most = max(totals.bins)
    bars = "".join(_BLOCKS[-(-8 * count // most)] for count in totals.bins)
    lines += [f"α from 0 |{bars}| to {totals.alpha_max:g}", ""]
    width = max(map(len, [*totals.experts, "expert"]))
    lines.append(f"{'expert':<{width}}  {'steps led':>9}  {'share':>6}  {'mean α':>6}")
    for name, own in totals.experts.items():
        n_led, alpha = own["n_led"], own["alpha_sum"] / n
        lines.append(f"{name:<{width}}  {n_led:>9,}  {_share(n_led, n):>6}  {alpha:>6.2f}")
    return lines


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _share(part: float, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"
