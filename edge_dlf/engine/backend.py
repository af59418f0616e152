"""What the decoding loop asks of one member: a language model with a KV cache of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""Rows of logits, (K, width): C-contiguous, owned by the backend, valid until its next call."""

State = npt.NDArray[np.uint8]
"""What a member knows of a text that it has read, for it alone to understand."""

N_BATCH = 512
"""Tokens that one batch evaluates at most."""

PLAIN_TOKENS = 128, 64
"""Tokens to evaluate at a time with plain attention: their scores stay in the CPU's cache."""

N_CHECKPOINTS = 8
"""Lasting checkpoints that a member whose memory is a state keeps, of all its sequences together."""

N_ROLLBACK = 4
"""Tokens of a batch whose states llama.cpp keeps, where it can and a member has a single sequence: most drafts are no
longer, and each state is kept beside the present one."""

N_LENT = 32
"""Rows of a product, or tokens of a batch, from which llama.cpp computes on a GPU what lies on the host."""
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
    can_trim: whether `reach` gives any length. The memory of a recurrent or hybrid model is, in part, a state that each
        token overwrites: it can go back only to a length at which it was kept.
    can_cut: whether `reach` does so too within what was loaded. What is saved of attention to a window lacks what the
        window has left behind.
    n_rollback: tokens that such a model can take back of the last batch without a checkpoint, all but its first one.
    has_streams: whether each sequence has room of its own, which is quicker to read; then a batch is evaluated in
    parts, of sequences whose numbers follow each other and of as many tokens of each.
    """

    n_ctx: int
    n_seq_max: int
    n_cells: int
    n_batch: int
    n_bytes: int
    can_trim: bool
    can_cut: bool
    n_rollback: int
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

    def reach(self, seq: int, n_past: int) -> int:
        """Return the greatest length, up to `n_past`, that `seq` can be trimmed to and copied at."""

    def checkpoint(self, seq: int, *, lasting: bool) -> None:
        """Keep the state of `seq`, so that `reach` gives its present length later on: until the next checkpoint that is
        not `lasting`, or for as long as there is room. Does nothing where `can_trim`."""

    def trim(self, seq: int, n_past: int) -> None:
        """Forget all of `seq` from position `n_past` on, a length that `reach` gives. 0 empties it."""

    def copy(self, source: int, target: int, n_past: int) -> None:
        """Let `target`, which must be empty, share the first `n_past` positions of `source`, a length that `reach`
        gives, and the checkpoints among them."""

    def swap(self, a: int, b: int) -> None:
        """Exchange what two sequences hold. Needs `has_streams`. An exception may leave either of them in part."""

    def save(self, seq: int) -> State:
        """Return a copy of what `seq` holds, which `load` takes, in this process or in another one with the same model
        and settings. Raises OutOfMemoryError or DecodeError."""

    def load(self, seq: int, n_past: int, state: State) -> bool:
        """Let `seq`, which must be empty, hold the `n_past` tokens that were saved. Returns whether that was possible;
        if not, it stays empty."""

    def close(self) -> None:
        """Free the context. Calling it twice is no error."""
