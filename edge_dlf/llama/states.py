"""The states of a recurrent or hybrid model, kept so that a sequence can go back to them.

Such a model has a state that each token overwrites, beside or in place of a KV cache. So a sequence can be cut back
only to where its state was kept: at a checkpoint, which is a copy of the state on the host, or, where llama.cpp itself
keeps the states of the last tokens of a batch, to one of these.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ..engine.backend import N_CHECKPOINTS, Run
from ..errors import DecodeError

_STATE = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


@dataclass
class _Checkpoint:
    """The state after `n_past` tokens, which all of `seqs` begin with."""

    n_past: int
    state: npt.NDArray[np.uint8]
    seqs: set[int]


class States:
    """The states that the sequences of one context have now, and the checkpoints that they can go back to.

    name: of the member, for errors. n_past: tokens that each sequence holds, as the context counts them.
    n_rollback: tokens of a batch whose states llama.cpp keeps.
    """

    def __init__(self, context: Any, name: str, n_past: Sequence[int]) -> None:
        self.n_rollback: int = lib.llama_n_rs_seq(context)
        self._ctx, self._name, self._n_past = context, name, n_past
        self._memory = lib.llama_get_memory(context)
        self._lasting: list[_Checkpoint] = []  # that used last at the end
        self._passing: list[_Checkpoint] = []  # one, or none
        self._kept = [0] * len(n_past)  # states before the present one that llama.cpp has
        self._unsure: set[int] = set()  # sequences that a decode which failed may have left at any length

    def decoding(self, runs: Iterable[Run]) -> None:
        """Note that llama.cpp is about to change the states of these sequences."""
        self._unsure.update(run.seq for run in runs)

    def decoded(self, runs: Iterable[Run]) -> None:
        """Note that it did."""
        for run in runs:
            self._unsure.discard(run.seq)
            self._kept[run.seq] = min(self.n_rollback, len(run.tokens) - 1)

    def reach(self, seq: int, n_past: int) -> int:
        """As `Backend.reach`."""
        if self._is_kept(seq, n_past):
            return n_past
        return max((each.n_past for each in self._of(seq) if each.n_past <= n_past), default=0)

    def checkpoint(self, seq: int, *, lasting: bool) -> None:
        """As `Backend.checkpoint`."""
        n_past = self._n_past[seq]
        if any(each.n_past == n_past for each in (self._lasting if lasting else self._of(seq)) if seq in each.seqs):
            return
        made = _Checkpoint(n_past, self._read(seq), {seq})
        if lasting:
            self._lasting = [*self._lasting, made][-N_CHECKPOINTS:]
        else:
            self._passing = [made]

    def trim(self, seq: int, n_past: int) -> None:
        """As `Backend.trim`."""
        if n_past and n_past == self._n_past[seq] and seq not in self._unsure:
            return
        if n_past and not self._is_kept(seq, n_past):
            (found,) = [each for each in self._of(seq) if each.n_past == n_past][-1:]
            self._write(seq, found.state)
            self._use(found)
        if not lib.llama_memory_seq_rm(self._memory, seq, n_past, -1):
            raise DecodeError(f"{self._name}: llama.cpp does not go back to the state after {n_past} tokens")
        self._unsure.discard(seq)
        self._kept[seq] = 0
        for each in self._of(seq):
            if each.n_past > n_past:
                each.seqs.discard(seq)
        self._lasting, self._passing = ([each for each in kept if each.seqs] for kept in (self._lasting, self._passing))

    def copy(self, source: int, target: int, n_past: int) -> None:
        """As `Backend.copy`."""
        found = next((each for each in self._of(source) if each.n_past == n_past), None)
        state = found.state if found else self._read(source)
        lib.llama_memory_seq_cp(self._memory, source, target, 0, n_past)
        self._write(target, state)
        for each in self._of(source):
            if each.n_past <= n_past:
                each.seqs.add(target)
        if found:
            self._use(found)

    def _is_kept(self, seq: int, n_past: int) -> bool:
        """Whether llama.cpp has the state after `n_past` tokens of this sequence."""
        return seq not in self._unsure and self._n_past[seq] - self._kept[seq] <= n_past

    def _of(self, seq: int) -> list[_Checkpoint]:
        return [each for each in (*self._lasting, *self._passing) if seq in each.seqs]

    def _use(self, found: _Checkpoint) -> None:
        """Let a checkpoint be the last to be given up."""
        self._lasting.sort(key=lambda each: each is found)

    def _read(self, seq: int) -> npt.NDArray[np.uint8]:
        state = np.empty(lib.llama_state_seq_get_size_ext(self._ctx, seq, _STATE), np.uint8)
        if lib.llama_state_seq_get_data_ext(self._ctx, address(state), state.size, seq, _STATE) != state.size:
            raise DecodeError(f"{self._name}: llama.cpp does not give its state")
        return state

    def _write(self, seq: int, state: npt.NDArray[np.uint8]) -> None:
        if not lib.llama_state_seq_set_data_ext(self._ctx, address(state), state.size, seq, _STATE):
            raise DecodeError(f"{self._name}: llama.cpp does not take its state back")


def address(state: npt.NDArray[np.uint8]) -> Any:
    """Return a state as llama.cpp takes it."""
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
