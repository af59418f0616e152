"""Threads that run one kernel together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

_Jobs = SimpleQueue[Any]


class Team:
    """Helper threads that run a kernel beside the caller. The kernel shares out its work by counters in `sync`, which
    is new for each run: a helper that wakes late finds less to do, or nothing, and nobody waits for it."""

    def __init__(self, n_helpers: int) -> None:
        self._queues: list[_Jobs] = [SimpleQueue() for _ in range(n_helpers)]
        for jobs in self._queues:
            threading.Thread(target=_help, args=(jobs,), name="edge-dlf-kernels", daemon=True).start()

    def run(self, kernel: Callable[..., None], *args: Any) -> npt.NDArray[np.int64]:
        """Run `kernel(*args, sync)` on every thread; returns `sync` as the kernel left it."""
        sync = np.zeros(8, np.int64)
        for jobs in self._queues:
            jobs.put((kernel, args, sync))
        kernel(*args, sync)
        return sync

    def __del__(self) -> None:
        for jobs in self._queues:
            jobs.put(None)


def _help(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        kernel, args, sync = job
        kernel(*args, sync)
        del kernel, args, sync, job
