"""A scripted `Backend`: logits are a function of all text before them, as of a real model; every call is checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_dlf.engine.backend import N_CHECKPOINTS, N_ROWS, Logits, Run, State


class FakeBackend:
    """A member whose row after a text is drawn from a generator keyed by (seed, text).

    Keeps `calls`, the runs of each `decode`, and fails on any use that llama.cpp would punish. fail_at: calls of
    `decode` until one raises KeyboardInterrupt after the cache has grown, as Ctrl-C does. poison: (token, value) puts
    `value` into every row after a text that ends in `token`. common: share of each row that all members have alike.
    swap_fails: calls of `swap` until one raises KeyboardInterrupt with one of the two lost. copy_fails: calls of `copy`
    until one raises it when all is copied. Without `can_trim` its memory is a state, which goes back to checkpoints
    and by n_rollback tokens of the last batch. Without `can_cut`, what was loaded is kept or forgotten as a whole.
    n_loaded: calls of `load`. refuses: whether `load` takes no state. load_fails: whether the next call of `load`
    raises KeyboardInterrupt when all is loaded.
    """

    def __init__(
        self,
        seed: int,
        n_vocab: int = 50,
        *,
        n_ctx: int = 256,
        n_seq_max: int = 4,
        n_cells: int | None = None,
        n_batch: int = 64,
        can_trim: bool = True,
        can_cut: bool = True,
        n_rollback: int = 0,
        has_streams: bool = False,
        scale: float = 3.0,
    ) -> None:
        self.seed, self.n_vocab, self.scale = seed, n_vocab, scale
        self.n_ctx, self.n_seq_max, self.can_trim = n_ctx, n_seq_max, can_trim
        self.n_cells, self.n_batch = n_cells or n_ctx * n_seq_max, n_batch
        self.can_cut = can_trim and can_cut
        self.n_rollback = n_rollback
        self.n_bytes = 1000
        self.has_streams, self.n_swapped = has_streams, 0
        self.swap_fails: int | None = None
        self.copy_fails: int | None = None
        self.n_loaded, self.refuses, self.load_fails = 0, False, False
        self.cache: dict[int, list[int]] = {seq: [] for seq in range(n_seq_max)}
        self.calls: list[list[Run]] = []
        self.fail_at: int | None = None
        self.poison: tuple[int, float] | None = None
        self.common = 0.0
        self.n_evaluated = 0
        self.closed = False
        self._cells: dict[int, list[object]] = {seq: [] for seq in self.cache}
        self._past = dict.fromkeys(self.cache, 0)
        self._whole = dict.fromkeys(self.cache, 0)
        self._rows: Logits | None = None
        self._states: dict[int, set[int]] = {
            seq: set() for seq in self.cache
        }  # by length: now and as llama.cpp has them
        self._lasting: list[tuple[int, int]] = []
        self._passing: tuple[int, int] | None = None

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

    def decode(self, runs: Sequence[Run]) -> None:
        self.calls.append([Run(run.seq, list(run.tokens), run.n_rows) for run in runs])
        assert len({run.seq for run in runs}) == len(runs) > 0
        assert sum(len(run.tokens) for run in runs) <= self.n_batch
        assert sum(run.n_rows for run in runs) <= max(N_ROWS, self.n_seq_max), "no room for the rows"
        self._rows = None
        for run in runs:
            self._states[run.seq] = set()
        rows = []
        for seq, tokens, n_rows in runs:
            assert len(self.cache[seq]) == self._past[seq], "appended after an interrupt, without a trim"
            assert tokens, "nothing to append"
            assert 0 <= n_rows <= len(tokens)
            assert len(self.cache[seq]) + len(tokens) <= self.n_ctx
            self.cache[seq] += [int(token) for token in tokens]
            self._cells[seq] += [object() for _ in tokens]
            self.n_evaluated += len(tokens)
            n_text = len(self.cache[seq])
            rows += [self.row(self.cache[seq][: n + 1]) for n in range(n_text - n_rows, n_text)]
        assert self.n_used() <= self.n_cells, "no room in the cache"
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise KeyboardInterrupt
        for run in runs:
            self._past[run.seq] = n_past = len(self.cache[run.seq])
            n_kept = min(self.n_rollback, len(run.tokens) - 1)
            self._states[run.seq] = set(range(n_past - n_kept, n_past + 1))
        self._rows = np.stack(rows) if rows else None

    def n_used(self) -> int:
        """Positions in use, each that several sequences share counted once."""
        return len({id(cell) for cells in self._cells.values() for cell in cells})

    def wait(self) -> None:
        """What `decode` began is done."""

    def logits(self) -> Logits:
        assert self._rows is not None, "no rows: the last call failed, or none was made"
        return self._rows

    def n_past(self, seq: int) -> int:
        return self._past[seq]

    def reach(self, seq: int, n_past: int) -> int:
        assert n_past <= len(self.cache[seq])
        if self.can_trim:
            return n_past if n_past >= self._whole[seq] else 0
        kept = {n for held, n in (*self._lasting, self._passing or (seq, 0)) if held == seq}
        return max(n for n in {0} | kept | self._states[seq] if n <= n_past)

    def checkpoint(self, seq: int, *, lasting: bool) -> None:
        n_past = self._past[seq]
        assert self.can_trim or n_past == 0 or n_past in self._states[seq], "the state is not sure"
        if lasting:
            self._lasting = [*self._lasting, (seq, n_past)][-N_CHECKPOINTS * self.n_seq_max :]
        else:
            self._passing = seq, n_past

    def trim(self, seq: int, n_past: int) -> None:
        assert n_past <= len(self.cache[seq])
        assert self.reach(seq, n_past) == n_past, "there is no state to go back to"
        del self.cache[seq][n_past:], self._cells[seq][n_past:]
        self._past[seq] = n_past
        self._whole[seq] = min(self._whole[seq], n_past)
        self._rows = None
        self._states[seq] = {n_past}
        self._lasting = [(held, n) for held, n in self._lasting if held != seq or n <= n_past]
        if self._passing and self._passing[0] == seq and self._passing[1] > n_past:
            self._passing = None

    def copy(self, source: int, target: int, n_past: int) -> None:
        assert self.reach(source, n_past) == n_past, "there is no state to share"
        assert source != target
        assert not self.cache[target]
        assert n_past <= self._past[source]
        self.cache[target] = self.cache[source][:n_past]
        self._cells[target] = self._cells[source][:n_past]
        self._past[target], self._whole[target] = n_past, self._whole[source]
        self._rows = None
        self._states[target] = {n_past}
        self._lasting += [(target, n) for held, n in self._lasting if held == source and n <= n_past]
        if self.copy_fails is not None:
            self.copy_fails -= 1
            if self.copy_fails < 0:
                self.copy_fails = None
                raise KeyboardInterrupt

    def swap(self, a: int, b: int) -> None:
        assert self.has_streams
        assert a != b
        self.n_swapped += 1
        self._rows = None
        for held in (self.cache, self._cells, self._past):
            held[a], held[b] = held[b], held[a]
        if self.swap_fails is not None:
            self.swap_fails -= 1
            if self.swap_fails < 0:
                self.swap_fails = None
                self.cache[a].clear()
                self._cells[a].clear()
                raise KeyboardInterrupt

    def save(self, seq: int) -> State:
        assert self.can_trim or self._past[seq] in self._states[seq], "the state is not sure"
        return np.array([self.seed, *self.cache[seq]], np.int32).view(np.uint8)

    def load(self, seq: int, n_past: int, state: State) -> bool:
        assert not self.cache[seq]
        seed, *tokens = state.copy().view(np.int32).tolist()
        assert (seed, len(tokens)) == (self.seed, n_past), "a state of another member, or of another text"
        self.n_loaded += 1
        if self.refuses:
            return False
        self.cache[seq], self._cells[seq] = tokens, [object() for _ in tokens]
        assert self.n_used() <= self.n_cells, "no room in the cache"
        self._past[seq], self._whole[seq] = n_past, 0 if self.can_cut else n_past
        self._states[seq] = {n_past}
        self._rows = None
        if self.load_fails:
            self.load_fails = False
            raise KeyboardInterrupt
        return True

    def close(self) -> None:
        self.closed = True
