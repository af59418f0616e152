"""Test whether the AMX kernels of this build of llama.cpp work.

GCC 12 assumes that `_tile_loadconfig` reads 8 of the 64 bytes of a tile configuration and removes the stores to the
others, so that the CPU faults (llama.cpp issue 20824). The same source works when it is built with -fno-tree-dse
-fno-dse. A build does not tell how it was made, so the kernels are tried once, in a process of their own.
"""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

import llama_cpp as lib

from ..system.child import python_command
from ..system.paths import shipped_dir
from ..system.remembered import recall, remember, states

_MODEL = Path("demo", "base-q8_0.gguf")
_PATIENCE_S = 60.0
_TRY = """
import ctypes, sys
import llama_cpp as lib
import numpy as np

def row(uses_amx):
    params = lib.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers = uses_amx, 0
    model = lib.llama_model_load_from_file(sys.argv[1].encode(), params)
    context = lib.llama_init_from_model(model, lib.llama_context_default_params())
    tokens = (lib.llama_token * 8)(*range(8))
    assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, 8)) == 0
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (n_vocab,)).copy()

plain, amx = row(False), row(True)
print("right" if np.abs(amx - plain).max() < 0.05 * np.abs(plain).max() else "wrong")
"""


@functools.cache
def amx_crashes() -> bool:
    """Whether this build holds AMX kernels that crash, or give wrong numbers, on quantized weights."""
    info = lib.llama_print_system_info().decode()
    if "AMX_INT8 = 1" not in info:
        return False
    libraries = sorted(Path(lib.__file__).parent.glob("lib/*ggml-cpu*"))
    key = json.dumps([info, *map(str, libraries), states(libraries)])
    found = recall("amx", key)
    if found is None:
        try:
            found = _try(shipped_dir() / _MODEL)
        except (OSError, subprocess.TimeoutExpired):
            return True
        remember("amx", key, found)
    return bool(found != "right")


def _try(model: Path) -> str:
    """Decode with and without AMX in another process. Returns "right", or what went wrong."""
    command = python_command(_TRY, str(model))
    process = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, start_new_session=True, text=True)
    return process.stdout.strip() or f"exit code {process.returncode}"
