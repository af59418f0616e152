"""Where text goes: answers to stdout as they come, everything else to stderr; colour only where a terminal shows it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ..answers.stream import Report

_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIM, _PLAIN, _ERASE_LINE, _SHOW_CURSOR = "\x1b[2m", "\x1b[0m", "\r\x1b[K", "\x1b[?25h"


def one_line(message: object) -> str:
    """Text of an error or a notice, with no line breaks and nothing that would steer a terminal."""
    return printable(" ".join(str(message).split()))


def printable(text: str) -> str:
    """`text` without the characters that would steer a terminal."""
    return _UNSAFE.sub(lambda match: "" if match[0] == "\r" else "\ufffd", text)


def may_style(stream: TextIO) -> bool:
    """Whether colours and other attributes are wanted on `stream`."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _dim(text: str) -> str:
    return f"{_DIM}{text}{_PLAIN}" if may_style(sys.stderr) else text


class Screen:
    """The two streams of a command, looked up when they are used."""

    def __init__(self) -> None:
        self._waiting = ""
        self._restore: Callable[[], None] = lambda: None

    @property
    def is_terminal(self) -> bool:
        """Whether a person both types and reads."""
        return sys.stdin.isatty() and sys.stdout.isatty()

    def write(self, text: str, paint: Callable[[str], str] | None = None) -> None:
        """Part of an answer, at once; on a terminal without what would steer it, and through `paint`."""
        if not text:
            return
        self.end_wait()
        shown = printable(text) if sys.stdout.isatty() else text
        sys.stdout.write(paint(shown) if paint else shown)
        sys.stdout.flush()

    def show(self, line: str) -> None:
        """One line that carries its own colours."""
        print(line, flush=True)

    def say(self, message: str) -> None:
        """One dim line beside the answers; a wait goes on below it."""
        waiting = self._waiting
        self.end_wait()
        text = printable(message) if sys.stderr.isatty() else message
        print(_dim(text), file=sys.stderr, flush=True)
        if waiting:
            self.begin_wait(waiting)

    def complain(self, message: object) -> None:
        """One line about something that failed."""
        self.end_wait()
        print(f"edge-dlf: {one_line(message)}", file=sys.stderr, flush=True)

    def begin_wait(self, message: str) -> None:
        """Show `message` on a terminal, in place of an earlier one, until anything else is shown."""
        self.end_wait()
        if sys.stderr.isatty():
            self._waiting = message[: shutil.get_terminal_size().columns - 1]
            print(_dim(self._waiting), end="", file=sys.stderr, flush=True)

    def end_wait(self) -> None:
        """Take back what `begin_wait` showed."""
        if self._waiting:
            self._waiting = ""
            print(_ERASE_LINE, end="", file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """The end of an answer."""
        self.end_wait()
        sys.stdout.write("\n")
        sys.stdout.flush()

    @contextmanager
    def keys_kept_back(self) -> Iterator[None]:
        """Keep what is typed during an answer out of it; it waits for the next prompt."""
        if not self.is_terminal:
            yield
            return
        import termios

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
        quiet = [*before]
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        self._restore = lambda: termios.tcsetattr(stdin, termios.TCSANOW, before)
        termios.tcsetattr(stdin, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            self._restore()

    def leave(self) -> None:
        """Leave the terminal in order, from whatever thread, before the process ends."""
        self._restore()
        stderr = sys.__stderr__  # itself, not what shows a progress bar
        if stderr and stderr.isatty():
            print(_SHOW_CURSOR, end="" if sys.stdout.isatty() else "\n", file=stderr, flush=True)
        if may_style(sys.stdout):
            sys.stdout.write(_PLAIN)
        if sys.stdout.isatty():
            self.end_line()


def summary(report: Report) -> str:
    """Speed, mean α and each expert's share of the steps, on one line."""
    parts = [f"{report.generation_tps:.1f} tokens/s"] if report.generation_tps else []
    if report.experts:
        parts.append(f"mean α {report.alpha_mean:.2f}")
        parts += [f"{name} {share:.0%}" for name, share in report.expert_share.items()]
    return " · ".join(parts)


def cut_short(report: Report, n_ctx: int) -> str | None:
    """What to say of an answer that the end of the context cut short."""
    is_full = report.finish_reason == "length" and report.n_prompt + report.n_generated >= n_ctx
    return f"cut short: the context of {n_ctx} tokens is full" if is_full else None
