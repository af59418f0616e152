"""How far a batch is, on stderr: a line that moves on a terminal, elsewhere a line a minute, and a summary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..batch.progress import Progress
from .screen import Screen, may_move

if TYPE_CHECKING:
    from rich.console import RenderableType

_LINE_EVERY_S = 60.0
_BAR_WIDTH = 30


class ProgressLine(Progress):
    """Progress as lines of text."""

    unit = "rows"
    _say: Callable[[str], None] | None = None
    _said_s = 0.0
    first_failure = ""

    def figures(self) -> str:
        """Rows, failures, speed and time left, on one line."""
        parts = [f"{self.n_done:,}" if self.n_total is None else f"{self.n_done:,}/{self.n_total:,}"]
        parts[0] += f" {self.unit}"
        if self.n_failed:
            parts.append(f"{self.n_failed:,} failed")
        if n_tokens := self.n_tokens + self.n_picked():
            parts.append(f"{n_tokens / self.elapsed_s:.1f} tokens/s")
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} left")
        elif self.n_done == self.n_before:
            parts.append(f"{duration(self.elapsed_s)} so far")
        return " · ".join(parts)

    def summary(self) -> str:
        """What was done, on one line."""
        is_part = self.n_total is not None and self.n_done < self.n_total
        parts = [f"{self.n_done:,} of {self.n_total:,} rows" if is_part else f"{self.n_done:,} rows"]
        if self.n_before:
            parts[0] += f", {self.n_before:,} of them before"
        if self.n_failed:
            parts.append(f"{self.n_failed:,} failed")
        if self.n_tokens:
            parts.append(f"{self.n_tokens:,} tokens in {duration(self.elapsed_s)} ({self.generation_tps:.1f} tokens/s)")
        return " · ".join(parts)

    def add(self, row: Mapping[str, Any]) -> None:
        super().add(row)
        if row["error"] and not self.first_failure:
            self.first_failure = f"line {row['error']['line']} failed first: {row['error']['message']}"
        self.tell()

    def tell(self) -> None:
        """Say the figures, once a minute, where they are no line that moves."""
        if self._say and self.elapsed_s >= self._said_s + _LINE_EVERY_S:
            self._said_s = self.elapsed_s
            self._say(self.figures())

    def counter(self, check: Callable[[], None]) -> Callable[[int], None]:
        """Return what takes the number that are done so far, of which the first were done by an earlier run.

        check: called each time, and may raise.
        """

        def tell(n_done: int) -> None:
            if self.n_done == 0:
                self.n_before = n_done
            self.n_done = n_done
            self.tell()
            check()

        return tell

    @contextmanager
    def shown(self, screen: Screen) -> Iterator[None]:
        """Show the figures while this lasts; time counts from here."""
        from rich.console import Console
        from rich.live import Live

        self.start_clock()
        if not may_move(sys.stderr):
            self._say = screen.say
            yield
            return
        console = Console(stderr=True, highlight=False)
        with Live(console=console, get_renderable=self._line, transient=True, refresh_per_second=4):
            yield

    def _line(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        figures = Text(self.figures(), overflow="ellipsis", no_wrap=True)
        if not self.n_total:
            return figures
        line = Table.grid(padding=(0, 1))  # not the whole width: the terminal's ^C must not break it
        line.add_row(ProgressBar(total=self.n_total, completed=self.n_done, width=_BAR_WIDTH), figures)
        return line


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, of a second or more."""
    return str(timedelta(seconds=max(round(seconds), 1)))
