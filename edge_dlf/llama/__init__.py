"""llama.cpp through its low-level API: models, contexts and LoRA adapters, with every return code made an error.

The only importer of `llama_cpp`. A `Model` holds weights and vocabulary; a `LlamaBackend` is one context over a model,
with its own KV cache and its own LoRA adapters, so that a base and its LoRA experts share one `Model`.
"""

from ..backend import N_BATCH
from .context import CACHE_TYPES, LlamaBackend
from .model import Model
from .runtime import Interrupt, default_n_threads, gpus, repacks_weights

__all__ = [
    "CACHE_TYPES",
    "N_BATCH",
    "Interrupt",
    "LlamaBackend",
    "Model",
    "default_n_threads",
    "gpus",
    "repacks_weights",
]
