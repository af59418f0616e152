"""Models, contexts and LoRA adapters of llama.cpp, through its low-level API. Every return code becomes an error.

No other room imports `llama_cpp`. A `Model` holds weights and vocabulary. A `LlamaBackend` is one context over a model,
with its own KV cache and LoRA adapters, so that a base and its LoRA experts share one `Model`.
"""

from ..engine.backend import N_BATCH
from .amx import amx_crashes
from .context import LlamaBackend
from .device import copy_bytes_s
from .grammar import Grammar
from .model import Model
from .runtime import AMX_REBUILD, Interrupt, default_n_threads, gpus, repacks_weights, system_info

__all__ = [
    "AMX_REBUILD",
    "N_BATCH",
    "Grammar",
    "Interrupt",
    "LlamaBackend",
    "Model",
    "amx_crashes",
    "copy_bytes_s",
    "default_n_threads",
    "gpus",
    "repacks_weights",
    "system_info",
]
