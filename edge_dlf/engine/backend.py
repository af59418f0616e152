"""What the decoding loop asks of one member: a language model with a KV cache of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""Rows of logits, (K, width): C-contiguous, owned by the backend, valid until its next call."""

N_BATCH = 512
"""Tokens that one batch evaluates at most."""

PLAIN_TOKENS = 128, 64
"""Tokens to evaluate at a time with plain attention: their scores stay in the CPU's cache."""

N_ROWS = 16
"""Rows of logits that one batch may ask for at least; a member of more sequences, one for each."""


class Run(NamedTuple):
    """Tokens to append to a sequence; a row of logits is wanted after each of the last `n_rows` of them."""

    seq: int
    tokens: Sequence[int]
    n_rows: int


class Backend(Protocol):
    """One member. Sequences are numbered 0 … n_seq_max - 1; positions of a sequence are 0, 1, 2, … without gaps.

    n_ctx: positions that one sequence may hold. n_cells: positions that all sequences together may hold, a prefix that
    several share counted once. n_batch: tokens that one `decode` may append. n_bytes: of the weights.
    can_trim: whether `trim` to any length, and `copy`, work; recurrent and hybrid models can only be emptied.
    has_streams: whether each sequence has room of its own, which is quicker to read; then a batch is evaluated in
    parts, of sequences whose numbers follow each other and of as many tokens of each.
    """

    n_ctx: int
    n_seq_max: int
    n_cells: int
    n_batch: int
    n_bytes: int
    can_trim: bool
    has_streams: bool

    def decode(self, runs: Sequence[Run]) -> None:
        """Append all `runs`, each of another sequence and of one token or more, in one batch; `logits()` is then the
        rows wanted, in the order given."""

    def wait(self) -> None:
        """Return once what the last `decode` began is done: a GPU may still be at it when `decode` returns."""

    def logits(self) -> Logits:
        """Rows of the last `decode`; width is at least the family's n_vocab."""

    def n_past(self, seq: int) -> int:
        """Tokens held by `seq`."""

    def trim(self, seq: int, n_past: int) -> None:
        """Forget all of `seq` from position `n_past` on. 0 empties it; anything between needs `can_trim`."""

    def copy(self, source: int, target: int, n_past: int) -> None:
        """Let `target`, which must be empty, share the first `n_past` positions of `source`. Needs `can_trim`."""

    def swap(self, a: int, b: int) -> None:
        """Exchange what two sequences hold. Needs `has_streams`. An exception may leave either of them in part."""

    def close(self) -> None:
        """Free the context. Calling it twice is no error."""
