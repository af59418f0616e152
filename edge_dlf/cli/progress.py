"""How far a batch is, on stderr: a line that moves on a terminal, one line a minute elsewhere, and a summary."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from ..batch.progress import Progress
from .screen import Screen

if TYPE_CHECKING:
    from rich.console import RenderableType

_LINE_EVERY_S = 60.0
_BAR_WIDTH = 30


class ProgressLine(Progress):
    """Progress as lines of text."""

    def figures(self) -> str:
        """Rows, failures, speed and time left, on one line."""
        parts = [f"{self.n_done:,} rows" if self.n_total is None else f"{self.n_done:,}/{self.n_total:,} rows"]
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

    @contextmanager
    def shown(self, screen: Screen) -> Iterator[None]:
        """Show the figures while this lasts; time counts from here."""
        from rich.console import Console
        from rich.live import Live

        self.start_clock()
        console = Console(stderr=True, highlight=False)
        live = Live(console=console, get_renderable=self._line, transient=True, refresh_per_second=4)
        with live if sys.stderr.isatty() else self._each_minute(screen):
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

    @contextmanager
    def _each_minute(self, screen: Screen) -> Iterator[None]:
        is_over = threading.Event()

        def tell() -> None:
            while not is_over.wait(_LINE_EVERY_S):
                screen.say(self.figures())

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            is_over.set()
            teller.join()


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, of a second or more."""
    return str(timedelta(seconds=max(round(seconds), 1)))
