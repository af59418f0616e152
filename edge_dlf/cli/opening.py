"""A family in memory while a command runs, and what the user is told meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import click

from .interrupts import interruptible
from .options import EPILOG, Options
from .screen import Screen, one_line

if TYPE_CHECKING:
    from ..api import FusedLlama
    from ..families.spec import FamilySpec

family_command = partial(click.command, context_settings={"auto_envvar_prefix": "EDGE_DLF"}, epilog=EPILOG)
"""Decorator of a command over a family, whose options can also be environment variables."""


@contextmanager
def open_family(options: Options, screen: Screen) -> Iterator[FusedLlama]:
    """Load the family, and close it at the end. The library's warnings become lines on stderr.

    With `options.ray` it is a RayLlama, which has only the methods of FusedLlama that a batch needs.
    """
    with notices("edge_dlf", Notices(screen)):
        if not options.is_named:
            screen.say(f"no family is named: this is {options.spec.name}, the small one that ships with edge-dlf")
        begun = "joining Ray for" if options.ray else "loading"
        screen.begin_wait(f"{begun} {options.spec.name}{_sizes(options.spec)} …")
        try:
            with interruptible(screen, lambda: None):
                llm = cast("FusedLlama", options.load_on_ray()) if options.ray else options.load()
        finally:
            screen.end_wait()
        with llm:
            yield llm


def _sizes(spec: FamilySpec) -> str:
    """Sizes of the family's files; a file that is missing is reported when it is loaded."""
    paths = dict.fromkeys(path for path in spec.local_files if path and path.is_file())
    return f" ({' + '.join(size(path.stat().st_size) for path in paths)})" if paths else ""


def size(n_bytes: float | None) -> str:
    """A number of bytes, in words for a person; a question mark where it is not known."""
    if not n_bytes:
        return "?"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


@contextmanager
def notices(library: str, handler: logging.Handler) -> Iterator[None]:
    """Let nothing but `handler` show what a library logs."""
    logger = logging.getLogger(library)
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield
    finally:
        logger.handlers = before


class Notices(logging.Handler):
    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.say(f"note: {one_line(record.getMessage())}")
