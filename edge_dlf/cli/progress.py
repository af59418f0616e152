"""How far a batch is, on stderr: a line that moves on a terminal, one line a minute elsewhere, and a summary."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .screen import Screen

if TYPE_CHECKING:
    from rich.console import RenderableType

_LINE_EVERY_S = 60.0
_BAR_WIDTH = 30


class Progress:
    """Counts rows as they finish; all is counted from the last `begin`. n_picked: asked for the tokens of rows that are
    not finished yet, which count in what is shown meanwhile."""

    def __init__(self) -> None:
        self.n_picked: Callable[[], int] = lambda: 0
        self.begin(None, 0, 0)
        self.has_begun = False

    def begin(self, n_total: int | None, n_before: int, n_failed: int) -> None:
        """n_total: rows of the input, None where it is a stream. n_before, n_failed: rows that earlier runs have
        finished, and those of them with an error."""
        self.has_begun = True
        self.n_total = n_total
        self.n_done = self.n_before = n_before
        self.n_failed = n_failed
        self.n_prompt_tokens = self.n_tokens = 0
        self.began_s = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        self.n_done += 1
        self.n_failed += bool(row["error"])
        usage = row["response"]["body"].get("usage", {}) if row["response"] else {}
        self.n_prompt_tokens += usage.get("prompt_tokens", 0)
        self.n_tokens += usage.get("completion_tokens", 0)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def generation_tps(self) -> float:
        """Generated tokens a second, of the rows that this run has finished."""
        return self.n_tokens / self.elapsed_s if self.n_tokens else 0.0

    @property
    def left_s(self) -> float | None:
        """Time that the rest takes at the rate so far. What is picked of rows that are not finished counts as rows as
        long as the finished ones, but as no more than half of what is left."""
        n_here = self.n_done - self.n_before
        if self.n_total is None or not n_here:
            return None
        n_left = self.n_total - self.n_done
        n_begun = min(self.n_picked() * n_here / self.n_tokens, n_left / 2) if self.n_tokens else 0.0
        return self.elapsed_s * (n_left - n_begun) / (n_here + n_begun)

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

    def report(self, status: str) -> dict[str, Any]:
        """What was done, for scripts; `request_counts` and `usage` as OpenAI's batches have them."""
        return {
            "status": status,
            "request_counts": {
                "total": self.n_done if self.n_total is None else self.n_total,
                "completed": self.n_done - self.n_failed,
                "failed": self.n_failed,
            },
            "n_before": self.n_before,
            "usage": {
                "prompt_tokens": self.n_prompt_tokens,
                "completion_tokens": self.n_tokens,
                "total_tokens": self.n_prompt_tokens + self.n_tokens,
            },
            "elapsed_s": round(self.elapsed_s, 3),
            "generation_tps": round(self.generation_tps, 3),
        }

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
        self.began_s = time.monotonic()
        with self._live() if sys.stderr.isatty() else self._each_minute(screen):
            yield

    @contextmanager
    def _live(self) -> Iterator[None]:
        from rich.console import Console
        from rich.live import Live

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
    """In the units that matter."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} days {hours % 24} h"
