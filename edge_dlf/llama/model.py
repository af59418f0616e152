"""Weights and vocabulary of one GGUF."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib

from ..errors import InvalidParameterError, ModelFileError, OutOfMemoryError
from ..gguf.header import Tensor
from .amx import amx_crashes
from .repack import overrides
from .runtime import gpus, initialise


class Model:
    """Weights and vocabulary of one GGUF, memory-mapped where the system can.

    path: the file; of a split model its first shard.
    n_gpu_layers: layers to offload, -1 for all.
    split: share of these layers for each GPU of `gpus()`; empty leaves the choice to llama.cpp.
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
        if len(used) == 1 < len(split):
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
        # Kept, because they are needed for every token, and a call into C may have to wait for the GIL afterwards.
        self._eog: dict[int, bool] = {}
        self._pieces: dict[tuple[int, bool], bytes] = {}
        with log.listening():
            self.handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            if log.says_memory():
                raise OutOfMemoryError(f"{path}: not enough memory for its weights ({log.reason()})")
            raise ModelFileError(path, f"llama.cpp cannot load it ({log.reason()})")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
        self.n_bytes: int = lib.llama_model_size(self.handle)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self.handle)

    @property
    def can_trim(self) -> bool:
        """Whether the KV cache can be rolled back; recurrent and hybrid models keep a state that cannot."""
        return not (lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle))

    @property
    def has_window(self) -> bool:
        """Whether some layers use sliding-window attention."""
        return bool(lib.llama_model_n_swa(self.handle))

    @property
    def chat_template(self) -> str | None:
        """The jinja template of the model's file."""
        template = lib.llama_model_chat_template(self.handle, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def bos(self) -> int | None:
        """The token that begins a text, where the vocabulary has one."""
        token = lib.llama_vocab_bos(self.vocab)
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        """The token that ends a text, where the vocabulary has one."""
        token = lib.llama_vocab_eos(self.vocab)
        return token if token >= 0 else None

    @property
    def eot(self) -> int | None:
        """The token that ends a turn of a chat, where the vocabulary has one."""
        token = lib.llama_vocab_eot(self.vocab)
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects its BOS token before every text."""
        return bool(lib.llama_vocab_get_add_bos(self.vocab)) and self.bos is not None

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends generation."""
        if token not in self._eog:
            self._eog[token] = bool(lib.llama_vocab_is_eog(self.vocab, token))
        return self._eog[token]

    def control_tokens(self) -> list[int]:
        """Every control token. Text of a user must never become one."""
        is_control = lib.llama_vocab_is_control
        return [token for token in range(self.n_vocab) if is_control(self.vocab, token)]

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        """Token ids of `text`, with no BOS added; `special` reads the names of control tokens as these tokens."""
        size = len(text) + 8
        while True:
            tokens = (lib.llama_token * size)()
            n_tokens = lib.llama_tokenize(self.vocab, text, len(text), tokens, size, False, special)
            if n_tokens >= 0:
                return list(tokens[:n_tokens])
            if n_tokens == -(2**31):
                raise InvalidParameterError("the text has more tokens than llama.cpp can count")
            size = -n_tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of `token`; control tokens are empty unless `special`."""
        size = 64
        while (token, special) not in self._pieces:
            buffer = ctypes.create_string_buffer(size)
            n_bytes = lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
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
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None
