"""Which characters of a rendered prompt the chat template itself wrote. A control token comes of those alone.

What a template does with a text cannot be foreseen: it trims, cuts, joins, replaces, lowers or reverses it. So texts
stay as they are, and the template's own names of control tokens are marked: each of their characters is written as a
stand-in that no text holds. After rendering, a name in stand-ins is the control token, and the same name in plain
characters is text.

A template may also put a name together, as in `<|{{ role }}|>`. So parts of names at the ends of its texts are marked
too, and so are the roles. Literals compare, split and replace as what they are, and are marked when they are written
out: `content.split('</think>')` finds what a text holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from ..errors import require

ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython", "model"))
"""Roles that may be part of a control token's name."""

_FIRST_STAND_IN = 0x100000  # a plane for private use
_UNASSIGNED = range(0x40000, 0xE0000)


class Literal(str):
    """A text of the template's own. It is itself to the template's code, and marked where it is written out."""

    marked: str

    @classmethod
    def of(cls, text: str, marked: str) -> Literal:
        """Make a literal that is written out as `marked`."""
        literal = cls(text)
        literal.marked = marked
        return literal

    def __str__(self) -> str:
        return self.marked

    def __format__(self, spec: str) -> str:
        return format(self.marked, spec)

    def __add__(self, other: Any) -> str:
        return str(self.marked + written(other))

    def __radd__(self, other: Any) -> str:
        return str(other + self.marked)

    def __mod__(self, other: Any) -> str:
        return str(self.marked % other)

    def __repr__(self) -> str:
        return f"environment.literal({str.__repr__(self)})"  # how a compiled template gets it


def written(value: Any) -> Any:
    """Return what a value is as part of a longer text."""
    return value.marked if isinstance(value, Literal) else value


class Marker:
    """Marks names of control tokens with stand-ins, and finds them again.

    names: those of all control tokens. Names of white space alone are not looked for.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(name for name in names if len(name) > 1 and name.strip())
        letters = sorted({char for name in self._names for char in name if not char.isspace()})
        self._marks = {ord(char): chr(_FIRST_STAND_IN + n) for n, char in enumerate(letters)}
        self._letters = {ord(mark): chr(code) for code, mark in self._marks.items()}
        stand_ins = f"{chr(_FIRST_STAND_IN)}-{chr(_FIRST_STAND_IN + max(len(letters) - 1, 0))}"
        spaces = "".join(sorted({char for name in self._names for char in name if char.isspace()}))
        self._stand_ins = re.compile(f"[{stand_ins}]")
        self._runs = re.compile(f"[{stand_ins}][{stand_ins}{re.escape(spaces)}]*")
        self._n_blanks = max((len(name) - len(name.lstrip()) for name in self._names), default=0)
        self._lengths: dict[str, list[int]] = {}
        for name in sorted(self._names, key=len, reverse=True):
            lengths = self._lengths.setdefault(name[0], [])
            if len(name) not in lengths[-1:]:
                lengths.append(len(name))
        self._beginnings = {name[:n] for name in self._names for n in range(1, len(name))}
        self._endings = {name[-n:] for name in self._names for n in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)
        self._all = "\0".join(self._names)

    def mark(self, text: str) -> str:
        """Return a text of the template with all names, and what may be parts of names, in stand-ins."""
        if text and text in self._all:
            return text.translate(self._marks)
        spans = [(start, start + len(name)) for start, name in self._found(text)]
        parts = range(min(self._longest, len(text)), 0, -1)
        spans += [(0, n) for n in parts if text[:n] in self._endings][:1]
        spans += [(len(text) - n, len(text)) for n in parts if text[-n:] in self._beginnings][:1]
        for start, end in spans:
            text = text[:start] + text[start:end].translate(self._marks) + text[end:]
        return text

    def plain(self, rendered: str) -> str:
        """Return a rendered text without marks."""
        return rendered.translate(self._letters)

    def split(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Yield the parts of a rendered prompt: a text, and whether it is the name of a control token."""
        start = 0
        for run in self._runs.finditer(rendered):
            blanks = rendered[max(start, run.start() - self._n_blanks) : run.start()]
            begin = run.start() - (len(blanks) - len(blanks.rstrip()))  # a name may begin with blanks
            letters = self.plain(rendered[begin : run.end()])
            yield rendered[start:begin], False
            start, done = run.end(), 0
            for at, name in self._found(letters):
                yield letters[done:at], False
                yield name, True
                done = at + len(name)
            yield letters[done:], False
        yield rendered[start:], False

    def escapes(self, text: str) -> dict[int, int]:
        """Return what to write in place of stand-ins that `text` itself holds: as many characters that it does not.

        Raises InvalidParameterError for a text of nearly all characters that there are.
        """
        held = set(map(ord, self._stand_ins.findall(text)))
        if not held:
            return {}
        used = set(map(ord, text))
        free = list(islice((code for code in _UNASSIGNED if code not in used), len(held)))
        require(len(free) == len(held), "the messages hold nearly all characters that Unicode has not assigned")
        return dict(zip(sorted(held), free, strict=True))

    def _found(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield names in `text` and where they begin: from left to right, the longest first."""
        at = 0
        while at < len(text):
            lengths = self._lengths.get(text[at], ())
            name = next((text[at : at + n] for n in lengths if text[at : at + n] in self._names), None)
            if name is not None:
                yield at, name
            at += len(name or "1")
