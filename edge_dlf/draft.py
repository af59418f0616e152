"""Drafters: sequence → drafted tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .backend import Logits
from .params import MAX_DRAFT

NGRAM = 3
"""Tokens that must match for what followed them earlier to be drafted."""


class Drafter(Protocol):
    """member: the one whose own decoding the draft is; None where a draft costs nothing."""

    @property
    def member(self) -> str | None: ...


class NgramDrafter:
    """What followed the last occurrence of the last tokens: quotations, code and lists repeat themselves."""

    member = None

    def draft(self, tokens: Sequence[int], n_draft: int) -> list[int]:
        """Up to `n_draft` tokens that may follow `tokens`."""
        text = array("i", tokens)
        width = text.itemsize
        raw = text.tobytes()
        pattern, end = raw[-NGRAM * width :], len(raw) - width
        while len(tokens) > NGRAM and (found := raw.rfind(pattern, 0, end)) >= 0:
            if found % width == 0:
                start = found // width + NGRAM
                return list(tokens[start : start + n_draft])
            end = found + len(pattern) - 1
        return []


class MemberDrafter:
    """A member that decodes ahead on its own. It has then evaluated all guesses but the last.

    rows: its logits at each guess, (MAX_DRAFT, width), kept for the search for α.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: Logits = np.empty((0, 0), np.float32)

    @property
    def member(self) -> str:
        return self.name

    def keep(self, n: int, row: Logits) -> Logits:
        """Keep the row of guess `n`; a backend's own is gone with its next call."""
        if self.rows.shape != (MAX_DRAFT, len(row)):
            self.rows = np.empty((MAX_DRAFT, len(row)), np.float32)
        self.rows[n] = row
        kept: Logits = self.rows[n]
        return kept
