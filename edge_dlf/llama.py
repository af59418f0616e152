"""llama.cpp through its low-level API: models, contexts and LoRA adapters, with every return code made an error.

The only module that imports `llama_cpp`. A `Model` holds weights and vocabulary; a `LlamaBackend` is one context over a
model, with its own KV cache and its own LoRA adapters, so that a base and its LoRA experts share one `Model`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import psutil

from .backend import Logits
from .errors import (
    ContextOverflowError,
    DecodeError,
    InvalidParameterError,
    LoadError,
    ModelFileError,
    OutOfMemoryError,
    RequestInterruptedError,
)

logger = logging.getLogger(__name__)

N_UBATCH = 512
"""Tokens that one prefill batch evaluates at most."""

AMX_NOTICE = (
    "AMX is off, for it crashes in this build of llama.cpp; that can cost a quarter of the speed. To rebuild: "
    "CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON "
    "-DGGML_AVX512_BF16=ON' pip install --force-reinstall --no-cache-dir --no-deps "
    f"llama-cpp-python=={lib.__version__}"
)

CACHE_TYPES: Mapping[str, tuple[int, float]] = {
    "f32": (lib.GGML_TYPE_F32, 4),
    "f16": (lib.GGML_TYPE_F16, 2),
    "bf16": (30, 2),  # GGML_TYPE_BF16, which llama_cpp does not name
    "q8_0": (lib.GGML_TYPE_Q8_0, 34 / 32),
    "q5_1": (lib.GGML_TYPE_Q5_1, 24 / 32),
    "q5_0": (lib.GGML_TYPE_Q5_0, 22 / 32),
    "q4_1": (lib.GGML_TYPE_Q4_1, 20 / 32),
    "q4_0": (lib.GGML_TYPE_Q4_0, 18 / 32),
    "iq4_nl": (lib.GGML_TYPE_IQ4_NL, 18 / 32),
}
"""Types of a KV cache: ggml's number, bytes a value."""

_LIBC = ctypes.CDLL(None)
_MAX_POSITIONS = 2**31 - 1
_ALLOCATION_FAILURES = ("alloc", "out of memory", "failed to fit", "cudaMalloc")


class _Log:
    """llama.cpp's one global logger. While `listening`, its complaints are kept to explain a failure; otherwise they go
    to a C function that ignores them: in a Python callback a pending KeyboardInterrupt would be raised, and lost.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=32)
        self._listen = lib.llama_log_callback(self._keep)
        self._ignore = ctypes.cast(_LIBC.abs, lib.llama_log_callback)
        lib.llama_log_set(self._ignore, ctypes.c_void_p(0))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what llama.cpp complains of meanwhile; what was kept before is dropped."""
        self._lines.clear()
        lib.llama_log_set(self._listen, ctypes.c_void_p(0))
        try:
            yield
        finally:
            lib.llama_log_set(self._ignore, ctypes.c_void_p(0))

    def _keep(self, level: int, text: bytes, _: object) -> None:
        if level >= 3:  # GGML_LOG_LEVEL_WARN
            line = text.decode("utf-8", "replace").strip()
            if line.strip("."):
                self._lines.append(line)

    def reason(self) -> str:
        """The first complaint, without the C function's name: later ones only follow from it."""
        line = next(iter(self._lines), "llama.cpp gave no reason")
        head, _, tail = line.partition(": ")
        return " ".join((tail if tail and " " not in head else line).split())

    def says_memory(self) -> bool:
        return any(word in line for line in self._lines for word in _ALLOCATION_FAILURES)


_log: _Log | None = None
_log_lock = threading.Lock()


def _start() -> _Log:
    """Initialise llama.cpp once in this process and take over its logger."""
    global _log
    with _log_lock:
        if _log is None:
            _log = _Log()
            lib.llama_backend_init()
            if amx_crashes():
                logger.warning(AMX_NOTICE)
        return _log


class Interrupt:
    """A flag that stops what contexts evaluate, on the CPU within milliseconds and elsewhere before the next batch.

    llama.cpp asks at every node of a graph whether to abort. Asking Python would take the GIL a thousand times a step,
    so it asks libc: strlen of this buffer is 0, "go on", or 1.
    """

    asked = ctypes.cast(_LIBC.strlen, lib.ggml_abort_callback)

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._text)

    def set(self) -> None:
        """Stop; may be called from any thread."""
        self._text[0] = b"\1"

    def clear(self) -> None:
        """Go on."""
        self._text[0] = b"\0"

    def check(self) -> None:
        """Raise RequestInterruptedError if set."""
        if self._text.value:
            raise RequestInterruptedError("the request was interrupted")


def amx_crashes() -> bool:
    """Whether this build of llama.cpp holds the AMX kernels that crash on quantized weights."""
    return b"AMX_INT8 = 1" in lib.llama_print_system_info()


def default_n_threads() -> int:
    """Physical cores that this process may run on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))


class Model:
    """Weights and vocabulary of one GGUF, memory-mapped where the system can.

    path: the first shard where the model is split. n_gpu_layers: layers to offload; -1 is all of them.
    Raises ModelFileError or OutOfMemoryError.
    """

    def __init__(self, path: Path, n_gpu_layers: int = -1) -> None:
        log = _start()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = not amx_crashes()
        self.path = path
        self._adapters: dict[Path, Any] = {}
        with log.listening():
            self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            if log.says_memory():
                raise OutOfMemoryError(f"{path}: not enough memory for its weights ({log.reason()})")
            raise ModelFileError(path, f"llama.cpp cannot load it ({log.reason()})")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)

    @property
    def can_trim(self) -> bool:
        """Whether the KV cache can be rolled back; recurrent and hybrid models keep a state that cannot."""
        return not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    @property
    def n_kv_values(self) -> int:
        """Keys (as many values again) that one position holds over all layers; 0 for a model without a KV cache."""
        n_head = max(lib.llama_model_n_head(self._model), 1)
        n_kv = lib.llama_model_n_head_kv(self._model) * lib.llama_model_n_embd(self._model) // n_head
        return int(n_kv * lib.llama_model_n_layer(self._model))

    @property
    def chat_template(self) -> str | None:
        """The jinja template of the model's file."""
        template = lib.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def bos(self) -> int | None:
        """The token that begins a text, where the vocabulary has one."""
        token = lib.llama_vocab_bos(self._vocab)
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        """The token that ends a text, where the vocabulary has one."""
        token = lib.llama_vocab_eos(self._vocab)
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects its BOS token before every text."""
        return bool(lib.llama_vocab_get_add_bos(self._vocab)) and self.bos is not None

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends generation."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def control_tokens(self) -> list[int]:
        """Every control token, which text from a user must never become."""
        is_control = lib.llama_vocab_is_control
        return [token for token in range(self.n_vocab) if is_control(self._vocab, token)]

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Token ids of `text`, with no BOS added; `special` reads the names of control tokens as these tokens."""
        size = len(text) + 8
        while True:
            tokens = (lib.llama_token * size)()
            n_tokens = lib.llama_tokenize(self._vocab, text, len(text), tokens, size, False, special)
            if n_tokens >= 0:
                return list(tokens[:n_tokens])
            if n_tokens == -(2**31):
                raise InvalidParameterError("the text has more tokens than llama.cpp can count")
            size = -n_tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of `token`; control tokens are empty unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n_bytes = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n_bytes >= 0:
                return buffer.raw[:n_bytes]
            size = -n_bytes

    def adapter(self, path: Path) -> Any:
        """Handle of the LoRA adapter in `path`, loaded once; it lives as long as the model."""
        if path not in self._adapters:
            log = _start()
            with log.listening():
                handle = lib.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not handle:
                raise ModelFileError(path, f"not a LoRA adapter for {self.path.name} ({log.reason()})")
            self._adapters[path] = handle
        return self._adapters[path]

    def close(self) -> None:
        """Free weights and adapters; every context over the model must be closed before."""
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


def _require_memory(model: Model, name: str, n_cells: int, type_k: str | None, type_v: str | None) -> None:
    """Raise OutOfMemoryError where a KV cache of `n_cells` cannot fit into the free memory: the process would be killed
    while it fills the cache. A GPU's memory is its backend's to check."""
    if lib.llama_supports_gpu_offload():
        return
    cell_bytes = model.n_kv_values * sum(CACHE_TYPES[kind or "f16"][1] for kind in (type_k, type_v))
    free = psutil.virtual_memory().available
    if n_cells * cell_bytes > free:
        raise OutOfMemoryError(
            f"{name}: a context of {n_cells} tokens needs {n_cells * cell_bytes / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; {int(free / cell_bytes)} tokens would fit"
        )


class LlamaBackend:
    """One context over a model: a `Backend` whose rows lie in llama.cpp's own output buffer.

    name: role of the member, for errors. n_ctx: positions for each of n_seq_max sequences. n_rows: rows of logits
    that one `decode` may ask for; llama.cpp reserves n_rows x width, never n_ctx x width.
    loras: (file, scale) pairs added to the weights. interrupt: stops what is evaluated. type_k, type_v: names from
    CACHE_TYPES.
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
        n_rows: int = 16,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        loras: Sequence[tuple[Path, float]] = (),
        interrupt: Interrupt | None = None,
    ) -> None:
        log = _start()
        for cache_type in (type_k, type_v):
            if cache_type is not None and cache_type not in CACHE_TYPES:
                raise InvalidParameterError(f"a KV cache can be of {', '.join(CACHE_TYPES)}, not {cache_type!r}")
        if not 1 <= n_ctx <= _MAX_POSITIONS // n_seq_max:
            raise InvalidParameterError(f"n_ctx must lie in 1 to {_MAX_POSITIONS // n_seq_max}, not {n_ctx}")
        _require_memory(model, name, n_ctx * n_seq_max, type_k, type_v)
        self.name = name
        self.model = model
        self.loras = tuple(loras)
        self.n_ctx = n_ctx
        self.n_seq_max = n_seq_max
        self.can_trim = model.can_trim
        self._n_rows = max(n_rows, n_seq_max)
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq_max
        params.n_batch = params.n_ubatch = N_UBATCH
        params.n_seq_max = n_seq_max
        params.n_outputs_max = self._n_rows
        params.n_threads = params.n_threads_batch = n_threads or default_n_threads()
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.type_k, _ = CACHE_TYPES[type_k or "f16"]
        params.type_v, _ = CACHE_TYPES[type_v or "f16"]
        params.no_perf = True
        self._interrupt = interrupt or Interrupt()
        params.abort_callback = self._interrupt.asked
        params.abort_callback_data = self._interrupt.address
        adapters = [(model.adapter(path), scale) for path, scale in loras]
        with log.listening():
            self._ctx = lib.llama_init_from_model(model._model, params)
        if not self._ctx:
            if log.says_memory():
                raise OutOfMemoryError(f"{name}: no memory for a context of {n_ctx} tokens ({log.reason()})")
            raise LoadError(f"{name}: llama.cpp cannot make a context of {n_ctx} tokens ({log.reason()})")
        if adapters:
            handles: Any = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*[handle for handle, _ in adapters])
            scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
            lib.llama_set_adapters_lora(self._ctx, handles, len(adapters), scales)
        self._memory = lib.llama_get_memory(self._ctx)
        self._n_past = [0] * n_seq_max
        self._n_logits = 0
        self._allocate_batch()

    def _allocate_batch(self) -> None:
        """One `llama_batch` over arrays of ours, reused for every call."""
        size = N_UBATCH
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

    def prefill(self, seq: int, tokens: Sequence[int]) -> None:
        self._require_room(seq, len(tokens))
        for start in range(0, len(tokens), N_UBATCH):
            chunk = tokens[start : start + N_UBATCH]
            self._fill(0, seq, chunk, wanted=0)
            last = start + len(chunk) == len(tokens)
            self._wanted[len(chunk) - 1] = last
            self._run(len(chunk), n_logits=int(last))
            self._n_past[seq] += len(chunk)

    def decode(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        n_rows = sum(len(ids) for _, ids in tokens)
        if n_rows > self._n_rows:
            raise InvalidParameterError(f"{self.name}: {n_rows} rows in one decode, {self._n_rows} were reserved")
        start = 0
        for seq, ids in tokens:
            self._require_room(seq, len(ids))
            self._fill(start, seq, ids, wanted=1)
            start += len(ids)
        self._run(n_rows, n_logits=n_rows)
        for seq, ids in tokens:
            self._n_past[seq] += len(ids)

    def _require_room(self, seq: int, n_tokens: int) -> None:
        if self._n_past[seq] + n_tokens > self.n_ctx:
            raise ContextOverflowError(
                f"{self.name}: {self._n_past[seq]} tokens and {n_tokens} more exceed its context of {self.n_ctx}"
            )

    def _fill(self, start: int, seq: int, tokens: Sequence[int], *, wanted: int) -> None:
        stop = start + len(tokens)
        self._token[start:stop] = tokens
        self._pos[start:stop] = range(self._n_past[seq], self._n_past[seq] + len(tokens))
        self._seq_id[start:stop] = seq
        self._wanted[start:stop] = wanted

    def _run(self, n_tokens: int, n_logits: int) -> None:
        self._interrupt.check()
        self._n_logits = 0
        self._batch.n_tokens = n_tokens
        code = lib.llama_decode(self._ctx, self._batch)
        if code == 1:
            raise ContextOverflowError(f"{self.name}: no free KV cells for {n_tokens} more tokens")
        if code == 2:
            raise RequestInterruptedError(f"{self.name}: interrupted while it evaluated {n_tokens} tokens")
        if code == -2:
            raise OutOfMemoryError(f"{self.name}: no memory to evaluate {n_tokens} tokens")
        if code != 0:
            raise DecodeError(f"{self.name}: llama_decode failed with code {code}")
        self._n_logits = n_logits

    def logits(self) -> Logits:
        # Rows lie one after the other in batch order; asking for any of them waits for the GPU.
        row = lib.llama_get_logits_ith(self._ctx, -self._n_logits)
        return np.ctypeslib.as_array(row, shape=(self._n_logits, self.model.n_vocab))

    def n_past(self, seq: int) -> int:
        return self._n_past[seq]

    def trim(self, seq: int, n_past: int) -> None:
        if not lib.llama_memory_seq_rm(self._memory, seq, n_past, -1):
            raise DecodeError(f"{self.name}: this model cannot forget part of a text")
        self._n_past[seq] = n_past

    def close(self) -> None:
        if self._ctx:
            lib.llama_free(self._ctx)
            self._ctx = None
