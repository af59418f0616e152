"""A fuser whose kernels are compiled: from the disk, or, at the first start on a machine, by two processes at once."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..params import FusionParams, SamplingParams
from ..system.child import python_command
from ..system.machine import n_cores
from .dispatch import Float32Array, Int64Array, Threads, row_addresses
from .fuser import AlphaSearch, Fuser
from .kernels.cache import is_ready
from .kernels.search import search_rows
from .records import Draw

logger = logging.getLogger(__name__)

_PATIENCE_S = 4.0
_WORTH_THREADS = 2**14
"""Tokens of a vocabulary whose search takes longer than it takes to wake a second thread."""
_COMPILE = f"from {__name__} import compile_search; compile_search()"
_NULL, _ROOT = subprocess.DEVNULL, "/"
_NAMES = "large", "base", "expert"
_ROWS = np.array([[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, 2.0]]], np.float32)
_MASKED = np.array([[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, -np.inf]]], np.float32)


def ready_fuser(n_vocab: int, n_threads: int, lacking: Mapping[str, Int64Array]) -> Fuser:
    """Load the kernels and return a fuser that uses up to `n_threads` threads. Compiling is announced in the log."""
    notice = "compiling kernels for this machine, for ten seconds or more; they are kept, so later starts are quick"
    timer = threading.Timer(_PATIENCE_S, logger.warning, [notice])
    timer.daemon = True
    timer.start()
    try:
        with working_folder():
            warm_up()
    finally:
        timer.cancel()
    return Fuser(n_vocab, n_threads if n_vocab >= _WORTH_THREADS else 1, lacking)


@contextmanager
def working_folder() -> Iterator[None]:
    """A working folder for numba, which asks for it while it compiles: where it has been removed, the root."""
    try:
        Path.cwd()
    except FileNotFoundError:
        removed = os.open(".", os.O_RDONLY)
        os.chdir(_ROOT)
        try:
            yield
        finally:
            os.fchdir(removed)
            os.close(removed)
    else:
        yield


def warm_up() -> None:
    """Load every kernel that a step may use, or compile it.

    Those of the choice are compiled here, and those of the search meanwhile by another process, which keeps them on the
    disk. If that fails, they are compiled here too.
    """
    other = None
    if not is_ready(search_rows) and n_cores() > 1:
        command = python_command(_COMPILE)
        other = subprocess.Popen(command, stdin=_NULL, stdout=subprocess.PIPE, stderr=_NULL, cwd=_ROOT)
    draw = Draw(SamplingParams(temperature=0.0), seed=0, position=0, recent=np.empty(0, np.int32))
    Fuser(2).pick(list(_ROWS), _NAMES, FusionParams("static"), [(1.0,)], [draw])
    if other is not None and other.stdout:
        other.stdout.readline()
        threading.Thread(target=other.communicate, daemon=True).start()
    _search(_ROWS)


def compile_search() -> None:
    """In the other process: compile what every step needs, print a line, and compile what is needed for rare rows."""
    _search(_ROWS)
    print(flush=True)
    _search(_MASKED)


def _search(members: Float32Array) -> None:
    AlphaSearch(2, Threads(1)).search(row_addresses(list(members), 1, 2), _NAMES, FusionParams())
