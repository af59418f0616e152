"""Drafters: sequence → drafted tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..params import MAX_DRAFT
from .backend import Logits
from .pace import Way

NGRAM = 3
"""Tokens that must match for what followed them earlier to be drafted."""
_LONGEST_MATCH = 32
"""Tokens of a match beyond which its length says no more."""
QUOTES = "quotes"
"""By this name `quote` is known as a drafter."""


@dataclass
class Draft:
    """Tokens that may follow a text.

    probabilities: what the drafter gives to each. n: how many of them are to be verified. rows: logits, (K, width), of
    a drafting member that takes part in the fusion: of the text, and of each guess that it has evaluated.
    """

    way: Way
    guesses: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    n: int = 0
    rows: Logits | None = None


def quote(tokens: Sequence[int], n_draft: int, ends: Callable[[int], bool]) -> tuple[list[int], list[float]]:
    """Up to `n_draft` tokens that followed the last occurrence of the last tokens, up to one that ends an answer, and
    how likely each is, the more so the longer the match: quotations, code and lists repeat themselves."""
    text = array("i", tokens)
    width = text.itemsize
    raw = text.tobytes()
    pattern, end = raw[-NGRAM * width :], len(raw) - width
    while n_draft and len(tokens) > NGRAM and (found := raw.rfind(pattern, 0, end)) >= 0:
        if found % width == 0:
            start = found // width + NGRAM
            for n in range(n_draft):
                if ends(text[start + n]):
                    break
                text.append(text[start + n])
            guesses = list(text[len(tokens) :])
            n_match = NGRAM
            while n_match < min(start, _LONGEST_MATCH) and text[start - n_match - 1] == tokens[-n_match - 1]:
                n_match += 1
            return guesses, [1 - 1 / (n_match + n) for n in range(len(guesses))]
        end = found + len(pattern) - 1
    return [], []


class RowKeeper:
    """Keeps the drafting member's rows, (MAX_DRAFT + 1, width): a backend's own is gone with its next call."""

    def __init__(self) -> None:
        self.rows: Logits = np.empty((0, 0), np.float32)

    def keep(self, n: int, row: Logits) -> Logits:
        """Keep row `n`, (1, width)."""
        if self.rows.shape[1] != row.shape[1]:
            self.rows = np.empty((MAX_DRAFT + 1, row.shape[1]), np.float32)
        kept: Logits = self.rows[n : n + 1]
        kept[:] = row
        return kept
