"""Global state of llama.cpp in this process: initialisation, logger, features of the build, interrupts."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp as lib
import psutil
from llama_cpp import _utils

from ..system.machine import GPU, n_cores, require_platform
from .amx import amx_crashes
from .ggml import call, handle

logger = logging.getLogger(__name__)

AMX_NOTICE = (
    "AMX crashes in this build of llama.cpp and is off, which costs speed; `edge-dlf doctor` says how to rebuild"
)

_GPU, _INTEGRATED_GPU = 1, 2  # of enum ggml_backend_dev_type
require_platform()
_LIBC = ctypes.CDLL(None)
_ALLOCATION_FAILURES = ("alloc", "out of memory", "failed to fit", "cudaMalloc")


def _keep_null_files() -> None:
    """Make llama-cpp-python's files over /dev/null ones that may stay open to the end of this process. Of others that
    nobody has closed Python warns."""
    for name in ("outnull_file", "errnull_file"):
        with getattr(_utils, name) as file:
            fd = os.dup(file.fileno())
        setattr(_utils, name, open(fd, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


_keep_null_files()


class Log:
    """llama.cpp's global logger. While `listening`, warnings are kept, so that they can explain a failure.

    Otherwise they go to a C function that ignores them: in a Python callback a pending KeyboardInterrupt would be
    raised and lost.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=32)
        self._listen = lib.llama_log_callback(self._keep)
        self._ignore = ctypes.cast(_LIBC.abs, lib.llama_log_callback)
        lib.llama_log_set(self._ignore, ctypes.c_void_p(0))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the warnings that come in this context, in place of earlier ones."""
        self._lines.clear()
        lib.llama_log_set(self._listen, ctypes.c_void_p(0))
        try:
            yield
        finally:
            lib.llama_log_set(self._ignore, ctypes.c_void_p(0))

    def _keep(self, level: int, text: bytes, _: object) -> None:
        if level >= 3:  # GGML_LOG_LEVEL_WARN
            line = text.decode("utf-8", "replace").strip()
            if line.strip("."):
                self._lines.append(line)

    def reason(self) -> str:
        """The first warning, without the name of a C function: later ones only follow from it."""
        line = next(iter(self._lines), "llama.cpp gave no reason")
        head, _, tail = line.partition(": ")
        return " ".join((tail if tail and " " not in head else line).split())

    def says(self, *words: str) -> bool:
        """Whether a warning has any of these words."""
        return any(word in line for line in self._lines for word in words)

    def says_memory(self) -> bool:
        return self.says(*_ALLOCATION_FAILURES)


@functools.cache
def initialise() -> Log:
    """Initialise llama.cpp in this process and take over its logger."""
    log = Log()
    lib.llama_backend_init()
    if amx_crashes():
        logger.warning(AMX_NOTICE)
    return log


class Interrupt:
    """Flag that stops contexts while they evaluate: on the CPU within milliseconds, elsewhere before the next batch.

    llama.cpp asks at every node of a graph whether to abort. A Python callback would take the GIL a thousand times a
    step. The callback is libc's strlen of this buffer: 0 to go on, 1 to stop.
    """

    asked = ctypes.cast(_LIBC.strlen, lib.ggml_abort_callback)

    def __init__(self) -> None:
        self.text = ctypes.create_string_buffer(2)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.text)

    def set(self) -> None:
        """Stop the evaluation. May be called from any thread."""
        self.text[0] = b"\1"

    def clear(self) -> None:
        """Allow evaluation again."""
        self.text[0] = b"\0"


def gpus() -> list[GPU]:
    """GPUs that this build of llama.cpp offloads layers to, in its order, with their free memory.

    Integrated GPUs count only where there is no other.
    """
    initialise()
    found: dict[int, list[GPU]] = {_GPU: [], _INTEGRATED_GPU: []}
    for number in range(call("ggml_backend_dev_count", ctypes.c_size_t)):
        device = handle("ggml_backend_dev_get", ctypes.c_size_t(number))
        kind = call("ggml_backend_dev_type", ctypes.c_int, device)
        if kind in found:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            call("ggml_backend_dev_memory", None, device, ctypes.pointer(free), ctypes.pointer(total))
            name, about = (
                call(f"ggml_backend_dev_{what}", ctypes.c_char_p, device) for what in ("name", "description")
            )
            shares_host = kind == _INTEGRATED_GPU or sys.platform == "darwin"
            found[kind].append(GPU(name.decode(), about.decode(errors="replace"), free.value, total.value, shares_host))
    return found[_GPU] or found[_INTEGRATED_GPU]


def system_info() -> str:
    """Version of llama-cpp-python, and the CPU features that this build of llama.cpp uses."""
    return f"{lib.__version__} {lib.llama_print_system_info().decode()}".strip(" |")


def versions() -> str:
    """Versions of llama-cpp-python, and of the ggml inside it with the commit of llama.cpp that it was built from."""
    version, commit = (call(f"ggml_{what}", ctypes.c_char_p).decode() for what in ("version", "commit"))
    return f"llama-cpp-python {lib.__version__}, ggml {version} ({commit.removesuffix('-dirty')})"


def backends() -> list[str]:
    """Names of the backends that this build of llama.cpp holds, such as "CPU" and "CUDA"."""
    initialise()
    registered = (
        handle("ggml_backend_reg_get", ctypes.c_size_t(n))
        for n in range(call("ggml_backend_reg_count", ctypes.c_size_t))
    )
    return [call("ggml_backend_reg_name", ctypes.c_char_p, backend).decode() for backend in registered]


def repacks_weights() -> bool:
    """Whether weights on the CPU get a second copy, in another order."""
    info = system_info()
    return "REPACK = 1" in info or ("AMX_INT8 = 1" in info and not amx_crashes())


def default_n_threads() -> int:
    """Physical cores that this process may run on."""
    return max(1, min(psutil.cpu_count(logical=False) or n_cores(), n_cores()))
