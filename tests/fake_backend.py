"""A scripted `Backend`: logits are a function of all text before them, as of a real model; every call is checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_dlf.backend import Logits


class FakeBackend:
    """A member whose row after a text is drawn from a generator keyed by (seed, text).

    Keeps `calls` as (name, arguments) and fails on any use that llama.cpp would punish. fail_at: calls of `prefill` or
    `decode` until one raises KeyboardInterrupt after the cache has grown, as Ctrl-C does. poison: (token, value) puts
    `value` into every row after a text that ends in `token`. common: share of each row that all members have alike.
    """

    def __init__(
        self,
        seed: int,
        n_vocab: int = 50,
        *,
        n_ctx: int = 256,
        n_seq_max: int = 4,
        can_trim: bool = True,
        scale: float = 3.0,
    ) -> None:
        self.seed, self.n_vocab, self.scale = seed, n_vocab, scale
        self.n_ctx, self.n_seq_max, self.can_trim = n_ctx, n_seq_max, can_trim
        self.cache: dict[int, list[int]] = {seq: [] for seq in range(n_seq_max)}
        self.calls: list[tuple[str, object]] = []
        self.fail_at: int | None = None
        self.poison: tuple[int, float] | None = None
        self.common = 0.0
        self.n_evaluated = 0
        self.closed = False
        self._past = dict.fromkeys(self.cache, 0)
        self._rows: Logits | None = None

    def row(self, text: Sequence[int]) -> Logits:
        """Logits after `text`, (n_vocab,)."""
        generator = np.random.default_rng([self.seed, *text])
        row = self.scale * generator.standard_normal(self.n_vocab)
        if self.common:
            shared = np.random.default_rng([7, *text]).standard_normal(1000)[: self.n_vocab]
            row = (1 - self.common) * row + self.common * self.scale * shared
        row = row.astype(np.float32)
        if self.poison and text and text[-1] == self.poison[0]:
            row[7] = self.poison[1]
        return row

    def prefill(self, seq: int, tokens: Sequence[int]) -> None:
        self.calls.append(("prefill", (seq, list(tokens))))
        self._append([(seq, tokens)])
        self._rows = self.row(self.cache[seq])[None]

    def decode(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.calls.append(("decode", [(seq, list(ids)) for seq, ids in tokens]))
        starts = [len(self.cache[seq]) for seq, _ in tokens]
        self._append(tokens)
        self._rows = np.stack(
            [
                self.row(self.cache[seq][: start + i + 1])
                for start, (seq, ids) in zip(starts, tokens, strict=True)
                for i in range(len(ids))
            ]
        )

    def _append(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        self._rows = None
        for seq, ids in tokens:
            assert len(self.cache[seq]) == self._past[seq], "appended after an interrupt, without a trim"
            assert ids, "nothing to append"
            assert len(self.cache[seq]) + len(ids) <= self.n_ctx
            self.cache[seq] += [int(token) for token in ids]
            self.n_evaluated += len(ids)
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise KeyboardInterrupt
        for seq, _ in tokens:
            self._past[seq] = len(self.cache[seq])

    def logits(self) -> Logits:
        assert self._rows is not None, "no rows: the last call failed, or none was made"
        return self._rows

    def n_past(self, seq: int) -> int:
        return self._past[seq]

    def trim(self, seq: int, n_past: int) -> None:
        assert n_past <= len(self.cache[seq])
        assert self.can_trim or n_past in (0, len(self.cache[seq])), "this model cannot roll back"
        del self.cache[seq][n_past:]
        self._past[seq] = n_past
        self._rows = None

    def close(self) -> None:
        self.closed = True
