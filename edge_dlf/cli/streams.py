"""The standard streams of a command, which may be closed, lead to a reader that has gone, or to a full disk."""

from __future__ import annotations

import atexit
import io
import os
import select
import sys
from typing import IO, TYPE_CHECKING

from ..errors import require
from ..system.jsonl import MAX_LINE_BYTES

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDERR = 2


def open_streams() -> None:
    """Give this process every standard stream, also those that it was started without.

    Nothing can be read from a stdin that was closed. Writing to a stdout that was closed is an error, so that no answer
    vanishes. What stderr cannot take is dropped, so that no answer is lost for a notice. A descriptor below 3 that
    stayed free would be given to the next file or socket, and libuv aborts on such a socket.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free descriptor is this one
    if os.name != "posix":
        return
    os.environ.setdefault("TERM", "dumb")  # an unknown terminal may show escapes as text
    os.set_blocking(0, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    for fd, name in ((1, "stdout"), (_STDERR, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not one that a test has put there
            setattr(sys, name, _writer(fd, stream))
            setattr(sys, f"__{name}__", getattr(sys, name))


def close_streams() -> None:
    """Write what is left for stdout. Raises OSError."""
    if numbas := sys.modules.get("colorama.initialise"):  # it would write an escape to every terminal at the end
        atexit.unregister(numbas.reset_all)
    sys.stdout.flush()


def _writer(fd: int, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A stream of text over a descriptor, encoded as the one that Python opened."""
    encoding, is_line_buffered = (before.encoding, before.line_buffering) if before else ("utf-8", fd == _STDERR)
    return io.TextIOWrapper(io.BufferedWriter(_Output(fd)), encoding, errors="replace", line_buffering=is_line_buffered)


class _Output(io.FileIO):
    """A standard descriptor for output. On stdout the first write that fails is an error, and later ones are dropped;
    on stderr all that fail are dropped."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._drops = fd == _STDERR

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of the data, or as much as there is room for; waits where the descriptor is not blocking."""
        try:
            while (n_written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            if not self._drops:
                self._drops = True
                error.filename = "stdout"
                raise
            return memoryview(data).nbytes
        return n_written


def read_all(file: IO[bytes], name: str) -> bytes:
    """Read a file or stdin to its end. Raises InvalidParameterError where it is larger than any prompt or form is."""
    content = file.read(MAX_LINE_BYTES + 1)
    require(len(content) <= MAX_LINE_BYTES, f"{name}: has more than {MAX_LINE_BYTES >> 20} MiB")
    return content
