"""The ids of a batch, which are finished and which the input has shown."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal


class Ids:
    """Which rows are finished, and which ids the input has shown so far. An id is a text, or the number of a line that
    has no id of its own.

    Only 64 bits of a digest are kept of each: among n ids the odds that any two are taken for one are n² / 2⁶⁵, which
    is 3 in a million for n = 10⁷.
    """

    def __init__(self) -> None:
        self._finished: set[int] = set()
        self._shown: dict[int, int] = {}

    def finish(self, id: str | int) -> bool:
        """Enter the id of a row that is finished; returns whether it is new."""
        n_before = len(self._finished)
        self._finished.add(_digest(id))
        return len(self._finished) > n_before

    def meet(self, id: str | int) -> Literal["new", "finished", "repeated"]:
        """Classify the next id of the input: to be run, finished by an earlier run, or repeated in the input."""
        digest = _digest(id)
        if digest in self._shown:
            return "repeated"
        self._shown[digest] = len(self._shown)
        return "finished" if digest in self._finished else "new"

    def place(self, id: str | int) -> int:
        """Return where the input has shown an id; -1 for one that it has not."""
        return self._shown.get(_digest(id), -1)


def _digest(id: str | int) -> int:
    kind = b"line" if isinstance(id, int) else b"id"
    digest = blake2b(str(id).encode("utf-8", "surrogatepass"), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little")
