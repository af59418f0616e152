"""Speed at which a device moves bytes, measured by ggml's own copies."""

from __future__ import annotations

import ctypes
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ..errors import OutOfMemoryError
from .ggml import InitParams, call, handle, owned
from .runtime import initialise

_I8 = 24  # GGML_TYPE_I8
_N_PASSES = 5


def copy_bytes_s(name: str, n_bytes: int) -> float:
    """Bytes that a device of ggml reads and writes in a second: the best of a few copies between two of its buffers.

    name: the device, such as "CUDA0" or "CPU".
    n_bytes: size of each buffer.
    Raises OutOfMemoryError where the device has no room.
    """
    with tensors(name, n_bytes, 2) as (backend, (source, target)):

        def copy() -> None:
            call("ggml_backend_tensor_copy_async", None, backend, backend, source, target)
            call("ggml_backend_synchronize", None, backend)

        return 2 * n_bytes / best_s(copy)


@contextmanager
def tensors(name: str, n_bytes: int, n: int) -> Iterator[tuple[ctypes.c_void_p, list[ctypes.c_void_p]]]:
    """Make a backend of the device, and `n` filled tensors of `n_bytes` on it, for as long as the context lasts."""
    initialise()
    with ExitStack() as stack:
        device = handle("ggml_backend_dev_by_name", name.encode())
        backend = owned(stack, "ggml_backend_free", handle("ggml_backend_dev_init", device, None))
        room = InitParams(n * (call("ggml_tensor_overhead", ctypes.c_size_t) + 64), None, True)
        context = owned(stack, "ggml_free", handle("ggml_init", room))
        made = [handle("ggml_new_tensor_1d", context, _I8, ctypes.c_int64(n_bytes)) for _ in range(n)]
        buffer = handle("ggml_backend_alloc_ctx_tensors", context, backend)
        if not buffer:
            raise OutOfMemoryError(f"{name}: no room for {n * n_bytes} bytes to copy")
        call("ggml_backend_buffer_clear", None, owned(stack, "ggml_backend_buffer_free", buffer), ctypes.c_uint8(1))
        yield backend, made


def best_s(work: Callable[[], None]) -> float:
    """Seconds of the quickest of a few runs of `work`, after one that is not timed."""
    return min(timeit.repeat(work, repeat=1 + _N_PASSES, number=1)[1:])
