"""What the decoding loop asks of one member: a language model with a KV cache of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""Rows of logits, (K, width): C-contiguous, owned by the backend, valid until its next call."""


class Backend(Protocol):
    """One member. Sequences are numbered 0 … n_seq_max - 1; positions of a sequence are 0, 1, 2, … without gaps.

    n_ctx: positions that one sequence may hold.
    can_trim: whether `trim` to any length works; recurrent and hybrid models can only be emptied.
    """

    n_ctx: int
    n_seq_max: int
    can_trim: bool

    def prefill(self, seq: int, tokens: Sequence[int]) -> None:
        """Append `tokens` (one or more) to `seq`, in batches; `logits()` is then the row after the last, (1, width)."""

    def decode(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Append to each `(seq, tokens)` in one batch; `logits()` is then a row for every token, in the order given."""

    def logits(self) -> Logits:
        """Rows of the last `prefill` or `decode`; width is at least the family's n_vocab."""

    def n_past(self, seq: int) -> int:
        """Tokens held by `seq`."""

    def trim(self, seq: int, n_past: int) -> None:
        """Forget all of `seq` from position `n_past` on. 0 empties it; anything between needs `can_trim`."""

    def close(self) -> None:
        """Free the context. Calling it twice is no error."""
