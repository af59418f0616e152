"""How far a batch is: rows, failures, tokens and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


class Progress:
    """Counts the rows of a batch as they finish.

    n_total: rows of the input; None if the input is a stream.
    n_before: rows that earlier runs finished.
    n_done, n_failed: rows that are finished, and those of them with an error, by earlier runs and by this one.
    n_prompt_tokens, n_tokens: tokens read and generated for the rows that this run finished.
    n_picked: returns the tokens generated so far for rows that are not finished; they count in the time that is left.
    """

    def __init__(self, n_total: int | None = None, n_before: int = 0, n_failed: int = 0) -> None:
        self.n_picked: Callable[[], int] = lambda: 0
        self.n_total = n_total
        self.n_done = self.n_before = n_before
        self.n_failed = n_failed
        self.n_prompt_tokens = self.n_tokens = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Count time and speed from now on."""
        self._began_s = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row that has finished."""
        self.n_done += 1
        self.n_failed += bool(row["error"])
        usage = row["response"]["body"].get("usage", {}) if row["response"] else {}
        self.n_prompt_tokens += usage.get("prompt_tokens", 0)
        self.n_tokens += usage.get("completion_tokens", 0)

    @property
    def elapsed_s(self) -> float:
        """Time since this run began."""
        return time.monotonic() - self._began_s

    @property
    def generation_tps(self) -> float:
        """Generated tokens a second, of the rows that this run has finished."""
        return self.n_tokens / self.elapsed_s if self.n_tokens else 0.0

    @property
    def left_s(self) -> float | None:
        """Estimate the time that the rest takes at the speed so far; None if nothing can be said yet.

        Tokens of unfinished rows count as rows of average length, but as no more than half of what is left.
        """
        n_here = self.n_done - self.n_before
        if self.n_total is None or not n_here:
            return None
        n_left = self.n_total - self.n_done
        n_begun = min(self.n_picked() * n_here / self.n_tokens, n_left / 2) if self.n_tokens else 0.0
        return self.elapsed_s * (n_left - n_begun) / (n_here + n_begun)

    def report(self, status: str) -> dict[str, Any]:
        """Numbers for scripts; `request_counts` and `usage` are named as in OpenAI's batches."""
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
