"""Lines of JSON, one object each: read in bounded memory, written as one line whatever they hold."""

from __future__ import annotations

import json
import math
import os
import re
import select
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple, NoReturn

from ..errors import require

MAX_LINE_BYTES = 64 << 20
_ENDLESS_BYTES = 1 << 30
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\3\4": "zip",
}
"""The first bytes of a compressed file -> its kind."""
_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")  # for readers that split lines as Python's str.splitlines does


class Line(NamedTuple):
    """One line of a file.

    number: from 1. start, n_bytes: where it lies, its line break included. content: None where it is longer than
    MAX_LINE_BYTES. is_whole: whether a line break ends it.
    """

    number: int
    start: int
    n_bytes: int
    content: bytes | None
    is_whole: bool


class Pipe:
    """A pipe or terminal to read lines from, which tells whether there is anything to read."""

    def __init__(self, fd: int, name: str = "stdin") -> None:
        self._fd = fd
        self.name = name
        self._held = bytearray()

    def would_wait(self) -> bool:
        """Whether `readline` would have to wait for whoever writes."""
        return not self._held and not select.select([self._fd], [], [], 0)[0]

    def readline(self, limit: int, /) -> bytes:
        """A line with its line break, or as much of it as `limit` allows; nothing at the end."""
        n_seen = 0
        while (end := self._held.find(b"\n", n_seen, limit)) < 0 and len(self._held) < limit:
            n_seen = len(self._held)
            block = os.read(self._fd, 1 << 16)
            if not block:
                break
            self._held += block
        n_bytes = end + 1 if end >= 0 else min(limit, len(self._held))
        line = bytes(self._held[:n_bytes])
        del self._held[:n_bytes]
        return line


def read_lines(file: IO[bytes] | Pipe) -> Iterator[Line]:
    """The lines of `file` that are not blank, holding no more than one of them; a byte order mark is left out.

    Raises InvalidParameterError for a file that is UTF-16, or compressed, or a line that may never end.
    """
    number = start = 0
    while content := file.readline(MAX_LINE_BYTES):
        number += 1
        n_bytes, last, is_short = len(content), content, True
        while not last.endswith(b"\n") and (last := file.readline(MAX_LINE_BYTES)):
            n_bytes += len(last)
            is_short = False
            content = b""
            name = getattr(file, "name", "the input")
            require(n_bytes <= _ENDLESS_BYTES, f"{name}: line {number} has more than 1 GiB")  # as that of /dev/zero
        if number == 1:
            _require_text(content, getattr(file, "name", "the input"))
            content = content.removeprefix(BOM)
        if content.strip() or not is_short:
            yield Line(number, start, n_bytes, content if is_short else None, (last or content).endswith(b"\n"))
        start += n_bytes


def _require_text(beginning: bytes, name: object) -> None:
    """Raise InvalidParameterError for what is no text in UTF-8 as a whole, so that no line of it is worth an error."""
    for magic, kind in _COMPRESSED.items():
        require(not beginning.startswith(magic), f"{name}: is compressed ({kind}); unpack it first")
    require(not beginning.startswith(_UTF16), f"{name}: is UTF-16, not UTF-8; `iconv -f UTF-16 -t UTF-8` converts it")


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`, which may begin with a byte order mark. Raises ValueError, which says in one line
    what it is instead."""
    try:
        value = json.loads(content.removeprefix(BOM).decode("utf-8"), parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # of one number, which has thousands of digits
        raise ValueError(f"not usable: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def no_number(name: str) -> NoReturn:
    """Refuse NaN and the infinities, which Python's reader of JSON takes."""
    raise ValueError(f"{name} is no number of JSON")


def dump_line(row: Mapping[str, Any]) -> bytes:
    """`row` as one line of UTF-8 with its line break. Numbers that JSON does not have become null."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(row), ensure_ascii=False)
    text = _LINE_BREAKS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return f"{json.dumps(finite(row))}\n".encode()


def finite(value: Any) -> Any:
    """`value` with None for each number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
