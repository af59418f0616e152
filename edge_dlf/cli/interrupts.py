"""Ctrl-C while llama.cpp computes.

Python runs signal handlers between bytecodes, so a Ctrl-C during a long call into C is seen only once the call returns,
and two of them are seen as one. The signal's wake-up descriptor is written at once, whatever the main thread does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .screen import Screen

_PATIENCE_S = 0.5


@contextmanager
def interruptible(screen: Screen, interrupt: Callable[[], None]) -> Iterator[None]:
    """While this lasts, the first Ctrl-C calls `interrupt`, which makes llama.cpp return where it can, and raises
    KeyboardInterrupt as soon as it has; `screen` says so if that takes long. A second one ends the process with exit
    code 130."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, screen, interrupt), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, screen: Screen, interrupt: Callable[[], None]) -> None:
    n_interrupts = 0
    while number := os.read(reader, 1):
        interrupt()
        if number[0] != signal.SIGINT:
            continue
        n_interrupts += 1
        if n_interrupts == 2:
            screen.leave()
            os._exit(130)  # the main thread is inside llama.cpp and cannot be unwound
        if not select.select([reader], [], [], _PATIENCE_S)[0]:
            screen.say("stopping after this step; Ctrl-C again leaves at once")
