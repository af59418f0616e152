"""What lies in one member's KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress, count
from operator import ne


class CacheIndex:
    """The content of one member's KV cache: the tokens of each sequence, and the cells they occupy.

    Sequences that share a prefix share its cells, so each position of a sequence names its cell.
    n_used: cells in use.
    unsure: sequences that an interrupted call may have left longer than recorded here.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.n_used = 0
        self.unsure: set[int] = set()
        self._cells: dict[int, list[int]] = {}
        self._sharers: Counter[int] = Counter()
        self._n_made = 0

    def append(self, seq: int, tokens: Sequence[int]) -> None:
        self.tokens.setdefault(seq, []).extend(tokens)
        self._cells.setdefault(seq, []).extend(range(self._n_made, self._n_made + len(tokens)))
        self._n_made += len(tokens)
        self.n_used += len(tokens)

    def shorten(self, seq: int, n_tokens: int) -> None:
        if seq in self.tokens:
            for cell in self._cells[seq][n_tokens:]:
                if cell not in self._sharers:
                    self.n_used -= 1
                elif self._sharers[cell] == 1:
                    del self._sharers[cell]
                else:
                    self._sharers[cell] -= 1
            del self.tokens[seq][n_tokens:], self._cells[seq][n_tokens:]

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        self.tokens[target] = self.tokens[source][:n_tokens]
        self._cells[target] = self._cells[source][:n_tokens]
        self._sharers.update(self._cells[target])

    def swap(self, a: int, b: int) -> None:
        for held in (self.tokens, self._cells):
            held[a], held[b] = held.get(b, []), held.get(a, [])

    def n_alone(self, seq: int) -> int:
        """Count the cells that no other sequence shares."""
        return sum(cell not in self._sharers for cell in self._cells.get(seq, ()))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next(compress(count(), map(ne, a, b)), min(len(a), len(b)))
