"""A lock that a forked child finds free."""

from __future__ import annotations

import os
import threading


class ForkSafeLock:
    """A lock that the thread that holds it, as a signal handler of it, may take again.

    In a forked child it is a new one: a thread of the parent that held it does not exist there.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._pid:
            self._lock, self._pid = threading.RLock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
