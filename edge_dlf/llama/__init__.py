"""Models, contexts and LoRA adapters of llama.cpp, through its low-level API. Every return code becomes an error.

No other room imports `llama_cpp`. A `Model` holds weights and vocabulary. A `LlamaBackend` is one context over a model,
with its own KV cache and LoRA adapters, so that a base and its LoRA experts share one `Model`.
"""

from ..engine.backend import N_BATCH as N_BATCH
from ..system.machine import MAX_THREADS as MAX_THREADS
from .adapters import applied_tensors as applied_tensors
from .amx import amx_crashes as amx_crashes
from .context import LlamaBackend as LlamaBackend
from .device import copy_bytes_s as copy_bytes_s
from .model import Model as Model
from .runtime import Interrupt as Interrupt
from .runtime import backends as backends
from .runtime import default_n_threads as default_n_threads
from .runtime import gpus as gpus
from .runtime import repacks_weights as repacks_weights
from .runtime import system_info as system_info
from .runtime import versions as versions
