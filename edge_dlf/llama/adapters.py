"""Which matrices of a LoRA adapter take part in what a model computes: llama.cpp leaves some out without a word."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import llama_cpp as lib

from ..errors import DecodeError
from .ggml import call
from .model import Model
from .runtime import initialise

_SOURCES_OFFSET, _N_SOURCES = 152, 10
"""Where `src` lies in `struct ggml_tensor`, and its length."""
_COPY = re.compile(r"[^#]+#(.+)#\d+")
"""Name of the copy of a tensor on another device, as "CUDA0#blk.0.attn_q.weight.lora_a#0"."""


def applied_tensors(model: Model, lora: Path) -> set[str]:
    """Names of the tensors that the computation of one token reads, with the adapter in `lora` over `model`."""
    names: set[str] = set()

    def see(node: int, _ask: bool, _data: object) -> bool:
        sources = (ctypes.c_void_p * _N_SOURCES).from_address(node + _SOURCES_OFFSET)
        for name in (call("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p(s)).decode() for s in sources if s):
            copy = _COPY.fullmatch(name)
            names.add(copy[1] if copy else name)
        return False

    initialise()
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(see)
    adapter = model.adapter(lora)
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 32
    params.n_threads = params.n_threads_batch = 1
    params.cb_eval = ctypes.cast(callback, lib.ggml_backend_sched_eval_callback)
    context = lib.llama_init_from_model(model.handle, params)
    if not context:
        raise DecodeError("llama.cpp cannot make a context")
    try:
        handles = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        lib.llama_set_adapters_lora(context, handles, 1, (ctypes.c_float * 1)(1.0))
        if lib.llama_decode(context, lib.llama_batch_get_one((lib.llama_token * 1)(0), 1)):
            raise DecodeError("llama_decode failed")
    finally:
        lib.llama_free(context)
    return names
