"""`edge-dlf bench`."""

from __future__ import annotations

import sys
from typing import Any

import click

from .interrupts import interruptible
from .opening import family_command, open_family, size
from .options import Options, family_argument, measuring_options
from .screen import Screen

_WIDTH = 100
"""Columns of the table where stdout is no terminal."""


@family_command(short_help="Measure how fast a family runs on this machine.")
@family_argument
@click.option("--json", is_flag=True, help="Print one JSON object.")
@measuring_options
@click.pass_context
def bench(ctx: click.Context, /, json: bool, **values: Any) -> None:
    """Measure a FAMILY on this machine, in a minute or two: each member alone; the fusion with and without drafts and
    the large model alone, in turn; many sequences at once; and how much of the memory's bandwidth the weights take.

    In parentheses: the least and the greatest measurement. What else the machine does meanwhile slows it down.
    """
    options, screen = Options.of(ctx, values), Screen()
    from ..evidence.bench import N_CTX, PARALLEL, measure
    from ..llama import default_n_threads

    n_threads = options.loading.get("n_threads") or default_n_threads()
    options.loading.update(n_ctx=N_CTX, n_parallel=max(PARALLEL))
    cache_types = options.loading.get("type_k"), options.loading.get("type_v")
    files = options.files

    def tell(what: str) -> None:
        screen.begin_wait(f"measuring: {what} …")

    with open_family(options, screen) as llm, interruptible(screen, llm.interrupt):
        speeds = measure(llm, files, n_threads=n_threads, cache_types=cache_types, tell=tell)
        screen.end_wait()
    if json:
        screen.show_json({"family": options.spec.name, **speeds})
    else:
        _show(screen, speeds)


def _show(screen: Screen, speeds: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tokens/s", no_wrap=True)
    for heading in ("decoding", "prompt", "read a token", "read a second"):
        table.add_column(heading, justify="right", no_wrap=True)
    memory = speeds["memory_bytes_s"]
    for name, speed in speeds["members"].items():
        read_s = speed["read_bytes_s"]
        reading = f"{size(read_s)} ({read_s / memory:.0%})" if memory else size(read_s)
        spreads = _spread(speed["decode_tps"]), _spread(speed["prefill_tps"])
        table.add_row(f"{name} alone", *spreads, size(speed["token_bytes"]), reading)
    table.add_section()
    for label, kind in (("fused, plain", "plain"), ("fused, drafted", "drafted"), ("large, answering too", "large")):
        table.add_row(label, _spread(speeds[kind]))
    table.add_section()
    for n, tps in speeds["parallel"].items():
        table.add_row(f"fused, {n} at once", _number(tps))
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    if memory:
        how = f"moved in a copy on {speeds['gpu']}" if speeds["gpu"] else f"read on {speeds['n_threads']} threads"
        screen.show(f"memory: {size(memory)} a second are {how}")
    screen.show(f"search, fusion and choice: {speeds['search_share']:.1%} of a plain step")
    if n_drafted := speeds["n_drafted"]:
        a_step = n_drafted / max(speeds["n_steps"], 1)
        screen.show(f"drafts: {a_step:.1f} tokens a step, {speeds['n_accepted'] / n_drafted:.0%} of them accepted")
    else:
        screen.show("drafts: none paid on this machine")
    for line in (*speeds["notes"], speeds["verdict"]):
        screen.show(line)


def _spread(spread: dict[str, float]) -> str:
    return f"{_number(spread['median'])} ({_number(spread['least'])}–{_number(spread['greatest'])})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
