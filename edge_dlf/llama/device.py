"""How fast a device moves bytes, by ggml's own copies."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from ..errors import OutOfMemoryError
from .ggml import InitParams, call, owned
from .runtime import initialise

_I8 = 24  # GGML_TYPE_I8
_N_PASSES = 5


def copy_bytes_s(name: str, n_bytes: int) -> float:
    """Bytes a second that a device of ggml, such as "CUDA0" or "CPU", reads and writes while it copies `n_bytes` from
    one of its buffers to another: the best of a few passes. Raises OutOfMemoryError where it has no room."""
    with _tensors(name, n_bytes, 2) as (backend, (source, target)):

        def copy() -> None:
            call("ggml_backend_tensor_copy_async", None, backend, backend, source, target)
            call("ggml_backend_synchronize", None, backend)

        return 2 * n_bytes / _best_s(copy)


def fetch_s(name: str, n_bytes: int) -> float:
    """Seconds in which `n_bytes` come from a device to the host."""
    with _tensors(name, n_bytes, 1) as (_, (source,)):
        target = np.empty(n_bytes, np.int8)
        place = ctypes.c_void_p(target.ctypes.data)
        none, size = ctypes.c_size_t(0), ctypes.c_size_t(n_bytes)
        return _best_s(lambda: call("ggml_backend_tensor_get", None, source, place, none, size))


@contextmanager
def _tensors(name: str, n_bytes: int, n: int) -> Iterator[tuple[ctypes.c_void_p, list[ctypes.c_void_p]]]:
    """A backend of the device, and `n` tensors of `n_bytes` on it, filled."""
    initialise()
    with ExitStack() as stack:
        device = ctypes.c_void_p(call("ggml_backend_dev_by_name", ctypes.c_void_p, name.encode()))
        backend = owned(stack, "ggml_backend_free", call("ggml_backend_dev_init", ctypes.c_void_p, device, None))
        room = InitParams(n * (call("ggml_tensor_overhead", ctypes.c_size_t) + 64), None, True)
        context = owned(stack, "ggml_free", call("ggml_init", ctypes.c_void_p, room))
        made = [
            ctypes.c_void_p(call("ggml_new_tensor_1d", ctypes.c_void_p, context, _I8, ctypes.c_int64(n_bytes)))
            for _ in range(n)
        ]
        buffer = call("ggml_backend_alloc_ctx_tensors", ctypes.c_void_p, context, backend)
        if not buffer:
            raise OutOfMemoryError(f"{name}: no room for {n * n_bytes} bytes to copy")
        call("ggml_backend_buffer_clear", None, owned(stack, "ggml_backend_buffer_free", buffer), ctypes.c_uint8(1))
        yield backend, made


def _best_s(work: Callable[[], None]) -> float:
    seconds = []
    work()
    for _ in range(_N_PASSES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
