"""The ids of a batch, in 12 to 24 bytes each, so that ten million of them fit beside a model."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Literal

_SMALLEST = 1 << 10


class Ids:
    """Which rows are finished, and which ids the input has shown so far. An id is a text, or the number of a line that
    has no id of its own.

    Only 63 bits of a digest are kept of each: among n ids the odds that any two are taken for one are n² / 2⁶⁴, which
    is 5 in a million for n = 10⁷.
    """

    def __init__(self) -> None:
        # Open addressing: 0 is free, else the digest above one bit, which says whether the input has shown the id.
        self._slots = array("Q", bytes(8 * _SMALLEST))
        self._n_used = 0

    def __len__(self) -> int:
        return self._n_used

    def finish(self, id: str | int) -> bool:
        """Enter the id of a row that is finished; returns whether it is new."""
        digest = _digest(id)
        slot = self._find(digest)
        if self._slots[slot]:
            return False
        self._fill(slot, digest << 1)
        return True

    def meet(self, id: str | int) -> Literal["new", "finished", "repeated"]:
        """Classify the next id of the input: to be run, finished by an earlier run, or repeated in the input."""
        digest = _digest(id)
        slot = self._find(digest)
        found = self._slots[slot]
        if not found:
            self._fill(slot, digest << 1 | 1)
            return "new"
        self._slots[slot] = found | 1
        return "repeated" if found & 1 else "finished"

    def _find(self, digest: int) -> int:
        """The slot that holds `digest`, or the free one where it belongs."""
        slots, last = self._slots, len(self._slots) - 1
        slot = digest & last
        while (found := slots[slot]) and found >> 1 != digest:
            slot = slot + 1 & last
        return slot

    def _fill(self, slot: int, entry: int) -> None:
        self._slots[slot] = entry
        self._n_used += 1
        if 3 * self._n_used > 2 * len(self._slots):
            entries, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for entry in entries:
                if entry:
                    self._slots[self._find(entry >> 1)] = entry


def _digest(id: str | int) -> int:
    """63 bits, never 0."""
    kind = b"line" if isinstance(id, int) else b"id"
    digest = blake2b(str(id).encode("utf-8", "surrogatepass"), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little") >> 1 or 1
