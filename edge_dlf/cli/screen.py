"""Output of the commands: answers to stdout as they come, all else to stderr, colours only on terminals."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..system.jsonl import finite

if TYPE_CHECKING:
    from ..answers.stream import Report

_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PLAIN, _ERASE_LINE, _SHOW_CURSOR = "\x1b[0m", "\r\x1b[K", "\x1b[?25h"


def one_line(message: object) -> str:
    """Text of an error or a notice without line breaks and control characters."""
    return printable(" ".join(str(message).split()))


def printable(text: str) -> str:
    """`text` without the control characters that would steer a terminal."""
    return _UNSAFE.sub(lambda match: "" if match[0] == "\r" else "\ufffd", text)


def may_style(stream: TextIO) -> bool:
    """Whether the user wants colours and other attributes on `stream`."""
    return may_move(stream) and not os.environ.get("NO_COLOR")


def may_move(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can erase what it shows."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Screen:
    """The stdout and stderr of a command, looked up when they are used."""

    def __init__(self) -> None:
        self._waiting = ""
        self._is_thinking = False
        self._restore: Callable[[], None] = lambda: None

    @property
    def is_terminal(self) -> bool:
        """Whether a person both types and reads."""
        return sys.stdin.isatty() and sys.stdout.isatty()

    def write(self, text: str, paint: Callable[[str], str] | None = None) -> None:
        """Write part of an answer at once; on a terminal without control characters, and coloured by `paint`."""
        if not text:
            return
        if self._is_thinking:
            self.end_line()
        self.end_wait()
        shown = printable(text) if sys.stdout.isatty() else text
        print(paint(shown) if paint else shown, end="", flush=True)

    def think(self, text: str) -> None:
        """Write part of the thinking before an answer, dim, and on a terminal alone: it is no part of the answer."""
        if text and sys.stdout.isatty():
            self._is_thinking = False
            self.write(text, partial(click.style, dim=True) if may_style(sys.stdout) else None)
            self._is_thinking = True

    def end_thinking(self) -> None:
        """Write the line break after thinking that no answer has followed."""
        if self._is_thinking:
            self.end_line()

    def end_line(self) -> None:
        """Write the line break after an answer."""
        self._is_thinking = False
        self.end_wait()
        print(flush=True)

    def show(self, line: str) -> None:
        """Write one line, which carries its own colours."""
        print(line, flush=True)

    def show_json(self, content: Any) -> None:
        """Write what `--json` asks for: one line of JSON, with paths as text, and null for numbers that it lacks."""
        self.show(json.dumps(finite(content), ensure_ascii=False, default=str))

    def say(self, message: str) -> None:
        """Write one dim line to stderr; a wait goes on below it."""
        waiting = self._waiting
        self.end_wait()
        self._note(printable(message) if sys.stderr.isatty() else message, end="\n")
        if waiting:
            self.begin_wait(waiting)

    def complain(self, message: object) -> None:
        """Write one line to stderr about a failure."""
        self.end_wait()
        print(f"edge-dlf: {one_line(message)}", file=sys.stderr, flush=True)

    def begin_wait(self, message: str) -> None:
        """Show `message` on a terminal, in place of an earlier one, until anything else is shown."""
        self.end_wait()
        if may_move(sys.stderr):
            self._waiting = message[: shutil.get_terminal_size().columns - 1]
            self._note(self._waiting)

    def end_wait(self) -> None:
        """Erase the message of `begin_wait`."""
        if self._waiting:
            self._waiting = ""
            print(_ERASE_LINE, end="", file=sys.stderr, flush=True)

    def _note(self, text: str, end: str = "") -> None:
        print(click.style(text, dim=True) if may_style(sys.stderr) else text, end=end, file=sys.stderr, flush=True)

    @contextmanager
    def keys_kept_back(self) -> Iterator[None]:
        """Keep the keys typed during an answer off the screen; the next prompt reads them."""
        if not self.is_terminal:
            yield
            return
        import termios
        import tty

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
        self._restore = lambda: termios.tcsetattr(stdin, termios.TCSANOW, before)
        tty.setcbreak(stdin, termios.TCSANOW)
        try:
            yield
        finally:
            self._restore()

    def leave(self) -> None:
        """Put the terminal in order before the process ends. May be called from any thread."""
        self._restore()
        stderr = sys.__stderr__  # the stream itself, not a progress bar's wrapper
        if stderr and may_move(stderr):
            print(_SHOW_CURSOR, end="" if sys.stdout.isatty() else "\n", file=stderr, flush=True)
        if may_style(sys.stdout):
            sys.stdout.write(_PLAIN)
        if sys.stdout.isatty():
            self.end_line()


def summary(report: Report) -> str:
    """One line with speed, mean α and each expert's share of the steps."""
    parts = [f"{report.generation_tps:.1f} tokens/s"] if report.generation_tps else []
    if report.experts:
        parts.append(f"mean α {report.alpha_mean:.2f}")
        parts += [f"{name} {share:.0%}" for name, share in report.expert_share.items()]
    return " · ".join(parts)


def cut_short(report: Report, n_ctx: int) -> str | None:
    """A notice about an answer that the end of the context cut short; None for others."""
    is_full = report.finish_reason == "length" and report.n_prompt + report.n_generated >= n_ctx
    return f"cut short: the context of {n_ctx} tokens is full" if is_full else None


def show(value: Any) -> str:
    """Return a setting's value on one line, as `parse` reads it."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number:g}" for name, number in value.items())
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
