"""One context over a model: a member of the ensemble."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ..engine.backend import N_BATCH, N_LENT, N_ROLLBACK, N_ROWS, Logits, Run, State
from ..errors import (
    ContextOverflowError,
    DecodeError,
    InvalidParameterError,
    LoadError,
    OutOfMemoryError,
    RequestInterruptedError,
)
from ..gguf.header import cache_type
from ..system.machine import this_machine
from .model import Model
from .runtime import Interrupt, default_n_threads, gpus, initialise
from .states import States, address

_FAILURES = {
    1: (ContextOverflowError, "no free KV cells for {} more tokens"),
    2: (RequestInterruptedError, "interrupted while it evaluated {} tokens"),
    -2: (OutOfMemoryError, "no memory to evaluate {} tokens"),
}
"""Errors by the code that llama_decode returns."""
_MAX_POSITIONS = 2**31 - 1
_BYTES_PER_THREAD = 4 * 2**20
"""Bytes of weights for each thread; with less, waiting for the other threads takes longer than multiplying."""


class LlamaBackend:
    """One context over a model: a `Backend` whose rows lie in llama.cpp's own output buffer.

    name: role of the member, for errors.
    n_ctx: positions that each of n_seq_max sequences may hold.
    n_cells: positions of the KV cache that the sequences share, by default n_ctx for each.
    streams: whether each sequence has a cache of n_ctx positions of its own, a multiple of 256, and shares nothing.
    n_ubatch: tokens that plain attention evaluates at a time; None for flash attention, where the device has it, over
        whole batches.
    n_rows: rows of logits that one `decode` may ask for; llama.cpp reserves memory for so many.
    n_threads: None for the physical cores, or fewer for a small model.
    type_k, type_v: types of the KV cache, from CACHE_TYPES of gguf/header.py.
    loras: (file, scale) pairs that are added to the weights.
    interrupt: stops the evaluation.
    Raises ModelFileError for an adapter that does not fit, OutOfMemoryError where memory does not suffice, LoadError
    where llama.cpp refuses the settings for this model.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        n_ctx: int,
        n_seq_max: int = 1,
        n_cells: int | None = None,
        streams: bool = False,
        n_ubatch: int | None = None,
        n_rows: int = N_ROWS,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        loras: Sequence[tuple[Path, float]] = (),
        interrupt: Interrupt | None = None,
    ) -> None:
        if not 1 <= n_ctx <= _MAX_POSITIONS // n_seq_max:
            raise InvalidParameterError(f"n_ctx must lie in 1 to {_MAX_POSITIONS // n_seq_max}, not {n_ctx}")
        self.n_cells = n_cells or n_ctx * n_seq_max
        self.name = name
        self.model = model
        self.loras = tuple(loras)
        self.n_ctx = n_ctx
        self.n_seq_max = n_seq_max
        self.n_batch = N_BATCH
        self.n_ubatch = n_ubatch
        self.n_bytes = model.n_bytes
        self.can_trim = model.can_trim
        self.can_cut = model.can_trim and not model.has_window
        self.has_streams = streams
        self._n_rows = max(n_rows, n_seq_max)
        self._interrupt = interrupt or Interrupt()
        self._ctx = self._open(n_threads, cache_type(type_k), cache_type(type_v))
        self._memory = lib.llama_get_memory(self._ctx)
        self._n_past = [0] * n_seq_max
        self._n_whole = [0] * n_seq_max  # first tokens of each sequence that can only be kept or forgotten together
        self._states = None if self.can_trim else States(self._ctx, name, self._n_past)
        self.n_rollback = self._states.n_rollback if self._states else 0
        self._n_logits = 0
        self._order: npt.NDArray[np.int64] | None = None
        self._rows: Logits | None = None
        self._output: tuple[int, int] | None = None
        self._allocate_batch()

    def _open(self, n_threads: int | None, type_k: int, type_v: int) -> Any:
        """Make the context, with its adapters."""
        log, model = initialise(), self.model
        params = lib.llama_context_default_params()
        params.n_ctx = self.n_cells
        params.n_batch, params.n_ubatch = N_BATCH, self.n_ubatch or N_BATCH
        params.kv_unified = not self.has_streams
        params.n_seq_max = self.n_seq_max
        params.n_rs_seq = N_ROLLBACK if self.n_seq_max == 1 else 0
        params.n_outputs_max = self._n_rows
        n_threads = n_threads or min(default_n_threads(), max(1, model.n_bytes // _BYTES_PER_THREAD))
        params.n_threads = params.n_threads_batch = n_threads
        # Auto: on wherever the device that holds a layer can; forced, it would run beside it, on the CPU.
        flash, plain = lib.LLAMA_FLASH_ATTN_TYPE_AUTO, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = plain if self.n_ubatch else flash
        params.offload_kqv = params.op_offload = True
        params.type_k, params.type_v = type_k, type_v
        params.no_perf = True
        params.abort_callback = self._interrupt.asked
        params.abort_callback_data = self._interrupt.address
        if params.flash_attn_type == flash and self.n_seq_max >= N_LENT and gpus() and self._has_flash(params):
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        adapters = [(model.adapter(path), scale) for path, scale in self.loras]
        with log.listening():
            context = lib.llama_init_from_model(model.handle, params)
        if not context:
            if log.says_memory():
                raise OutOfMemoryError(f"{self.name}: no memory for a context of {self.n_ctx} tokens ({log.reason()})")
            raise LoadError(f"{self.name}: llama.cpp cannot make a context of {self.n_ctx} tokens ({log.reason()})")
        if adapters:
            handles: Any = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*[handle for handle, _ in adapters])
            scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
            lib.llama_set_adapters_lora(context, handles, len(adapters), scales)
        return context

    def _has_flash(self, params: Any) -> bool:
        """Whether every device that holds a layer has flash attention.

        llama.cpp's own choice looks at a step of all sequences. From `N_LENT` of them on, a GPU computes it for layers
        on the host too, which llama.cpp takes for a device that lacks it. So it is asked for one sequence.
        """
        one = type(params).from_buffer_copy(params)
        one.n_ctx, one.n_batch, one.n_ubatch, one.n_seq_max, one.n_outputs_max = 256, 1, 1, 1, 1
        log = initialise()
        with log.listening():
            context = lib.llama_init_from_model(self.model.handle, one)
        if context:
            lib.llama_free(context)
        return bool(context) and not log.says("Flash Attention not supported")

    def _allocate_batch(self) -> None:
        """Make one `llama_batch` over NumPy arrays, which every call reuses."""
        size = N_BATCH
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._seq_id = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._n_seq_id = np.ones(size, np.int32)
        self._seq_ids = self._seq_id.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=None,
            pos=self._pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._n_seq_id.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._seq_ids.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, runs: Sequence[Run]) -> None:
        n_tokens = sum(len(run.tokens) for run in runs)
        n_rows = sum(run.n_rows for run in runs)
        if n_tokens > N_BATCH or n_rows > self._n_rows:
            raise InvalidParameterError(
                f"{self.name}: {n_tokens} tokens and {n_rows} rows in a batch, {N_BATCH} and {self._n_rows} reserved"
            )
        for run in runs:
            n_past = self._n_past[run.seq]
            if n_past + len(run.tokens) > self.n_ctx:
                raise ContextOverflowError(
                    f"{self.name}: {n_past} tokens and {len(run.tokens)} more exceed its context of {self.n_ctx}"
                )
        # llama.cpp evaluates streams together only where they come in order and without gaps.
        self._fill(sorted(runs) if self.has_streams else runs, n_tokens)
        if self._interrupt.text.value:
            raise RequestInterruptedError("the request was interrupted")
        self._n_logits, self._rows = 0, None
        self._batch.n_tokens = n_tokens
        if self._states:
            self._states.decoding(runs)
        code = lib.llama_decode(self._ctx, self._batch)
        if code:
            kind, what = _FAILURES.get(code, (DecodeError, f"llama_decode failed with code {code}"))
            raise kind(f"{self.name}: {what.format(n_tokens)}")
        self._n_logits = n_rows
        self._order = _restoring(runs) if self.has_streams else None
        for run in runs:
            self._n_past[run.seq] += len(run.tokens)
        if self._states:
            self._states.decoded(runs)

    def _fill(self, runs: Sequence[Run], n_tokens: int) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        seqs: list[int] = []
        wanted: list[int] = []
        for seq, added, n_rows in runs:
            n_past, n = self._n_past[seq], len(added)
            tokens += added
            positions += range(n_past, n_past + n)
            seqs += [seq] * n
            wanted += [0] * (n - n_rows) + [1] * n_rows
        self._token[:n_tokens] = tokens
        self._pos[:n_tokens] = positions
        self._seq_id[:n_tokens] = seqs
        self._wanted[:n_tokens] = wanted

    def wait(self) -> None:
        lib.llama_synchronize(self._ctx)

    def logits(self) -> Logits:
        if self._rows is None:
            # Rows lie one after the other in batch order; asking for any of them waits for the GPU.
            first = lib.llama_get_logits_ith(self._ctx, -self._n_logits)
            output = ctypes.addressof(first.contents), self._n_logits
            if output != self._output:
                self._output, self._logits = output, np.ctypeslib.as_array(first, (self._n_logits, self.model.n_vocab))
            self._rows = self._logits if self._order is None else self._logits[self._order]
        return self._rows

    def n_past(self, seq: int) -> int:
        return self._n_past[seq]

    def reach(self, seq: int, n_past: int) -> int:
        if self._states:
            return self._states.reach(seq, n_past)
        return n_past if n_past >= self._n_whole[seq] else 0

    def checkpoint(self, seq: int, *, lasting: bool) -> None:
        if self._states:
            self._states.checkpoint(seq, lasting=lasting)

    def trim(self, seq: int, n_past: int) -> None:
        if self._states:
            self._states.trim(seq, n_past)
        elif not lib.llama_memory_seq_rm(self._memory, seq, n_past, -1):
            raise DecodeError(f"{self.name}: this model cannot forget part of a text")
        self._n_past[seq] = n_past
        self._n_whole[seq] = min(self._n_whole[seq], n_past)

    def copy(self, source: int, target: int, n_past: int) -> None:
        if self.has_streams:
            # llama_memory_seq_cp would copy the whole stream, and not before the next decode.
            self._restore(target, self._n_past[source], self.save(source))
            self.trim(target, n_past)
        else:
            if self._states:
                self._states.copy(source, target, n_past)
            else:
                lib.llama_memory_seq_cp(self._memory, source, target, 0, n_past)
            self._n_past[target], self._n_whole[target] = n_past, self._n_whole[source]

    def swap(self, a: int, b: int) -> None:
        saved = [(self._n_past[seq], self.save(seq)) for seq in (a, b)]
        for seq, (n_past, state) in zip((b, a), saved, strict=True):
            self.trim(seq, 0)
            self._restore(seq, n_past, state)

    def _restore(self, seq: int, n_past: int, state: State) -> None:
        if n_past and not self.load(seq, n_past, state):
            raise DecodeError(f"{self.name}: llama.cpp does not take back what its KV cache held")

    def save(self, seq: int) -> State:
        n_bytes = lib.llama_state_seq_get_size(self._ctx, seq)
        if n_bytes > this_machine().free_bytes // 2:
            raise OutOfMemoryError(f"{self.name}: no memory for a copy of what its KV cache holds")
        state = np.empty(n_bytes, np.uint8)
        if lib.llama_state_seq_get_data(self._ctx, address(state), state.size, seq) != state.size:
            raise DecodeError(f"{self.name}: llama.cpp does not give what its KV cache holds")
        return state

    def load(self, seq: int, n_past: int, state: State) -> bool:
        # llama.cpp returns the bytes that it has read, and 0 where it could not use them.
        if lib.llama_state_seq_set_data(self._ctx, address(state), state.size, seq) != state.size:
            lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
            return False
        self._n_past[seq], self._n_whole[seq] = n_past, 0 if self.can_cut else n_past
        return True

    def close(self) -> None:
        if self._ctx:
            lib.llama_free(self._ctx)
            self._ctx = None


def _restoring(runs: Sequence[Run]) -> npt.NDArray[np.int64] | None:
    """Index of each row of `runs` in a batch ordered by sequence; None where both orders are the same."""
    by_seq = np.argsort([run.seq for run in runs for _ in range(run.n_rows)], kind="stable")
    return None if np.array_equal(by_seq, np.arange(len(by_seq))) else np.argsort(by_seq)
