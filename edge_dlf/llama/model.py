"""Weights and vocabulary of one GGUF."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp as lib

from ..errors import EdgeDLFError, ModelFileError, OutOfMemoryError, require
from ..gguf.header import Tensor
from ..system.locks import ForkSafeLock
from .amx import amx_crashes
from .long_text import SHORT, check_runs, on_deep_stack, piece_pattern
from .repack import overrides
from .runtime import gpus, initialise

_NAMED = lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
"""Tokens that are found in a text by their names."""


class Model:
    """Weights and vocabulary of one GGUF, memory-mapped where the system can.

    path: the file; of a split model its first shard.
    n_gpu_layers: layers to offload, -1 for all.
    split: share of these layers for each GPU of `gpus()`; empty leaves the choice to llama.cpp. A GPU with a share also
        computes long batches whose weights are on the host; where no GPU has one, none is used at all.
    weights: tensors of the file, which are needed to repack them where AMX is off.
    vocab_only: whether to leave the weights out; such a model can have no context.
    Raises ModelFileError or OutOfMemoryError.
    """

    def __init__(
        self,
        path: Path,
        n_gpu_layers: int = -1,
        split: Sequence[float] = (),
        weights: Mapping[str, Tensor] | None = None,
        *,
        vocab_only: bool = False,
    ) -> None:
        log = initialise()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        used = [number for number, share in enumerate(split) if share > 0]
        if split and not used:
            params.split_mode, params.main_gpu = lib.LLAMA_SPLIT_MODE_NONE, -1
        elif len(used) == 1 < len(split):
            params.split_mode, params.main_gpu = lib.LLAMA_SPLIT_MODE_NONE, used[0]
        elif used:
            shares = (ctypes.c_float * max(lib.llama_max_devices(), len(split)))(*split)
            params.split_mode, params.tensor_split = lib.LLAMA_SPLIT_MODE_LAYER, shares
        params.use_extra_bufts = not amx_crashes()
        overridden = None
        if not params.use_extra_bufts and weights and (n_gpu_layers == 0 or not gpus()):
            overridden = overrides(weights)
            params.tensor_buft_overrides = ctypes.cast(overridden, ctypes.c_void_p)
        self.path = path
        self._adapters: dict[Path, Any] = {}
        self._lock, self._pid = ForkSafeLock(), os.getpid()
        # Kept, because they are needed for every token, and a call into C may have to wait for the GIL afterwards.
        self._pieces: dict[tuple[int, bool], bytes] = {}
        with log.listening():
            self._handle: Any = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._handle:
            if log.says_memory():
                raise OutOfMemoryError(f"{path}: not enough memory for its weights ({log.reason()})")
            raise ModelFileError(path, f"llama.cpp cannot load it ({log.reason()})")
        self._vocab = vocab = lib.llama_model_get_vocab(self._handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(vocab)
        self.n_bytes: int = lib.llama_model_size(self._handle)
        self.can_trim = not (lib.llama_model_is_recurrent(self._handle) or lib.llama_model_is_hybrid(self._handle))
        self.has_window = bool(lib.llama_model_n_swa(self._handle))
        self.bos, self.eos, self.eot = (
            _present(get(vocab)) for get in (lib.llama_vocab_bos, lib.llama_vocab_eos, lib.llama_vocab_eot)
        )
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(vocab)) and self.bos is not None
        self._kind = lib.llama_vocab_type(vocab)
        pre = ctypes.create_string_buffer(64)
        lib.llama_model_meta_val_str(self._handle, b"tokenizer.ggml.pre", pre, len(pre))
        self._pre_tokenizer = pre.value.decode("utf-8", "replace")
        template = lib.llama_model_chat_template(self._handle, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None

    @property
    def handle(self) -> Any:
        """llama.cpp's model. Raises EdgeDLFError where it has been closed."""
        with self._open():
            return self._handle

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Keep the vocabulary from being freed by another thread meanwhile. Raises EdgeDLFError where it has been."""
        with self._lock:
            if self._handle is None:
                raise EdgeDLFError("this model has been closed")
            yield self._vocab

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends generation."""
        with self._open() as vocab:
            return bool(lib.llama_vocab_is_eog(vocab, token))

    def control_tokens(self) -> list[int]:
        """Every control token. Text of a user must never become one."""
        with self._open() as vocab:
            return [token for token in range(self.n_vocab) if lib.llama_vocab_is_control(vocab, token)]

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Token ids of `text`, with no BOS added; `special` reads the names of control tokens as these tokens.

        Raises InvalidParameterError or OutOfMemoryError for a text that is too long for this vocabulary's tokenizer.
        """
        if len(text) <= SHORT:
            return self._tokens(text, special)
        if self._kind == lib.LLAMA_VOCAB_TYPE_BPE:
            read = text.decode("utf-8", "replace")
            check_runs(read, self._pre_tokenizer)
            return on_deep_stack(read, lambda: self._tokens(text, special))
        if self._kind != lib.LLAMA_VOCAB_TYPE_SPM:
            return self._tokens(text, special)
        with suppress(UnicodeDecodeError):
            first, *rest = self._piece.findall(text.decode())
            tokens = self._tokens(first.encode(), special)
            for piece in rest:
                tokens += self._tokens(piece.encode(), special)[self._n_leading(piece) :]
            return tokens
        return self._tokens(text, special)

    def _tokens(self, text: bytes, special: bool) -> list[int]:
        size = len(text) + 8
        with self._open() as vocab:
            while True:
                tokens = (lib.llama_token * size)()
                n_tokens = lib.llama_tokenize(vocab, text, len(text), tokens, size, False, special)
                if n_tokens >= 0:
                    return list(tokens[:n_tokens])
                require(n_tokens != -(2**31), "the text has more tokens than llama.cpp can count")
                size = -n_tokens

    def _n_leading(self, piece: str) -> int:
        """Tokens that llama.cpp puts before a piece that begins with an unknown character, which is its bytes."""
        first = piece[0].encode()
        return len(self._tokens(first, False)) - len(first)

    @cached_property
    def _piece(self) -> re.Pattern[str]:
        """Pattern of the pieces of a long text."""
        with self._open() as vocab:
            names = [
                (lib.llama_vocab_get_text(vocab, n), lib.llama_vocab_get_attr(vocab, n)) for n in range(self.n_vocab)
            ]
        texts = [(name.decode("utf-8", "replace"), attributes) for name, attributes in names]
        ends = {name[-1] for name, attributes in texts if name and attributes & _NAMED}
        # A space stands in the tokens as another character.
        return piece_pattern("".join({" "}.union(*(name for name, _ in texts))), "".join(ends | {" "}))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of `token`; control tokens are empty unless `special`."""
        size = 64
        while (token, special) not in self._pieces:
            buffer = ctypes.create_string_buffer(size)
            with self._open() as vocab:
                n_bytes = lib.llama_token_to_piece(vocab, token, buffer, size, 0, special)
            if n_bytes >= 0:
                self._pieces[token, special] = buffer.raw[:n_bytes]
            size = -n_bytes
        return self._pieces[token, special]

    def adapter(self, path: Path) -> Any:
        """Handle of the LoRA adapter in `path`, which is loaded once and freed with the model."""
        if path not in self._adapters:
            log = initialise()
            with log.listening():
                handle = lib.llama_adapter_lora_init(self.handle, os.fsencode(path))
            if not handle:
                raise ModelFileError(path, f"not a LoRA adapter for {self.path.name} ({log.reason()})")
            self._adapters[path] = handle
        return self._adapters[path]

    def close(self) -> None:
        """Free weights and adapters; every context over the model must be closed before."""
        if os.getpid() != self._pid:  # what a forked child has belongs to its parent
            return
        with self._lock:
            if self._handle is not None:
                lib.llama_model_free(self._handle)
                self._handle = None


def _present(token: int) -> int | None:
    """The token, or None for what stands for a token that the vocabulary does not have."""
    return token if token >= 0 else None
