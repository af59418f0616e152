"""Repacking of weights for ggml's kernels without AMX, where AMX is off because it crashes.

llama.cpp either uses all special buffers of a CPU, AMX's first, or none of them; without them a batch takes a large
model nearly as long as its tokens one by one. A parameter can name a buffer for single tensors: here every weight that
the other kernels can use gets the buffer that repacks it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import llama_cpp as lib

from ..gguf.header import Tensor
from .ggml import InitParams, call, handle, owned

_BUFFER = b"CPU_REPACK"
_IN_PRODUCTS = re.compile(r"blk\.(\d+)\.(attn_(?:q|k|v|qkv|output)|ffn_(?:up|gate|down))\.weight")
"""Weights that are only used in matrix products."""
_N_TOKENS = 512
_F32: int = lib.GGML_TYPE_F32
_BUFFER_OFFSET = 8
"""Offset of `buffer` in `struct ggml_tensor`, behind an enum and its padding."""


class _Override(ctypes.Structure):
    """`struct llama_model_tensor_buft_override`."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def overrides(weights: Mapping[str, Tensor]) -> Any:
    """Value of `llama_model_params.tensor_buft_overrides` that repacks all weights that can be; None where none can.

    The array must live until the model is loaded.
    """
    buffer = _buffer_type()
    if buffer is None:
        return None
    layers: dict[str, list[str]] = defaultdict(list)
    for name, tensor in weights.items():
        match = _IN_PRODUCTS.fullmatch(name)
        if match and len(tensor.shape) == 2 and _takes(buffer, tensor.type, *tensor.shape):
            layers[match[2]].append(match[1])
    if not layers:
        return None
    found = (_Override * (len(layers) + 1))()  # the last one, empty, ends the list
    # One pattern for each kind: llama.cpp compiles all of them anew for each tensor.
    for override, (kind, numbers) in zip(found, layers.items(), strict=False):
        override.pattern = rf"^blk\.({'|'.join(numbers)})\.{kind}\.weight$".encode()
        override.buft = buffer
    return found


@functools.cache
def _buffer_type() -> int | None:
    """Type of the buffers that repack weights; None where this build has none."""
    device = handle("ggml_backend_dev_by_name", b"CPU")
    registry = handle("ggml_backend_dev_backend_reg", device)
    name = b"ggml_backend_dev_get_extra_bufts"
    address = call("ggml_backend_reg_get_proc_address", ctypes.c_void_p, registry, name)
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    for kind in map(kinds.__getitem__, itertools.count()):
        if kind is None or call("ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p(kind)) == _BUFFER:
            return int(kind) if kind else None
    return None


@functools.cache
def _takes(buffer: int, kind: str, n_in: int, n_out: int) -> bool:
    """Whether weights of this type and shape can be used from such a buffer.

    llama.cpp is asked as it asks itself: by a product with a tensor in an empty buffer.
    """
    number = getattr(lib, f"GGML_TYPE_{kind}", None)
    if number is None:
        return False
    device = handle("ggml_backend_dev_by_name", b"CPU")
    with ExitStack() as stack:
        room = InitParams(4 * call("ggml_tensor_overhead", ctypes.c_size_t), None, True)
        context = owned(stack, "ggml_free", handle("ggml_init", room))
        weight = handle("ggml_new_tensor_2d", context, number, ctypes.c_int64(n_in), ctypes.c_int64(n_out))
        batch = handle("ggml_new_tensor_2d", context, _F32, ctypes.c_int64(n_in), ctypes.c_int64(_N_TOKENS))
        product = handle("ggml_mul_mat", context, weight, batch)
        empty = handle("ggml_backend_buft_alloc_buffer", ctypes.c_void_p(buffer), ctypes.c_size_t(0))
        field = ctypes.c_void_p.from_address((weight.value or 0) + _BUFFER_OFFSET)
        field.value = owned(stack, "ggml_backend_buffer_free", empty).value
        return bool(call("ggml_backend_dev_supports_op", ctypes.c_bool, device, product))
