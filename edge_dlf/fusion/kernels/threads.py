"""Threads that run one kernel together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt


class Threads:
    """`n_threads` threads, the caller among them, that run a kernel together.

    The kernel shares out its work by atomic counters, which are new for each run. A thread that wakes late finds less
    work left, or none, and no other thread waits for it.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(n_threads - 1)]
        for jobs in self._queues:
            threading.Thread(target=_work, args=(jobs,), name="edge-dlf-kernels", daemon=True).start()

    def run(self, kernel: Callable[..., None], *args: Any) -> npt.NDArray[np.int64]:
        """Run `kernel(*args, counters)` on every thread. Returns the counters, (8,), as the kernel left them."""
        counters = np.zeros(8, np.int64)
        for jobs in self._queues:
            jobs.put((kernel, args, counters))
        kernel(*args, counters)
        return counters

    def __del__(self) -> None:
        for jobs in self._queues:
            jobs.put(None)


def _work(jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        kernel, args, counters = job
        kernel(*args, counters)
        del kernel, args, counters, job
