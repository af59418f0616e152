"""Threads that run one kernel together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class Team:
    """Helper threads that run a kernel beside the caller. The kernel shares out its work by counters in `sync`, so a
    helper that wakes late finds less to do, and nobody waits for it."""

    def __init__(self, n_helpers: int) -> None:
        self._sync = np.zeros(8, np.int64)
        self._mailboxes: list[tuple[list[Any], threading.Lock, threading.Lock]] = []
        for _ in range(n_helpers):
            mailbox: tuple[list[Any], threading.Lock, threading.Lock] = ([], threading.Lock(), threading.Lock())
            mailbox[1].acquire()
            self._mailboxes.append(mailbox)
            threading.Thread(target=_help, args=mailbox, name="edge-dlf-kernels", daemon=True).start()

    def run(self, kernel: Callable[..., None], *args: Any) -> npt.NDArray[np.int64]:
        """Run `kernel(*args, sync)` on every thread; returns `sync` as the kernel left it."""
        for _, _, idle in self._mailboxes:
            idle.acquire()
        self._sync[:] = 0
        for job, wake, _ in self._mailboxes:
            job[:] = (kernel, *args, self._sync)
            wake.release()
        kernel(*args, self._sync)
        return self._sync

    def __del__(self) -> None:
        for _, wake, idle in self._mailboxes:
            idle.acquire()
            wake.release()


def _help(job: list[Any], wake: threading.Lock, idle: threading.Lock) -> None:
    while True:
        wake.acquire()
        if not job:
            return
        job[0](*job[1:])
        job.clear()
        idle.release()
