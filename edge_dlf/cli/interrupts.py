"""Ctrl-C while llama.cpp computes.

Python runs signal handlers between bytecodes, so a Ctrl-C during a long call into C is seen only once the call returns,
two of them are seen as one, and one that is seen inside a callback from C is lost. The signal's wake-up descriptor is
written at once, whatever the main thread does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import RequestInterruptedError
from .screen import Screen

_PATIENCE_S = 0.5


@contextmanager
def interruptible(screen: Screen, interrupt: Callable[[], None]) -> Iterator[None]:
    """While this lasts, the first Ctrl-C calls `interrupt`, which is to end what is running, and then raises
    KeyboardInterrupt here; `screen` says so if that takes long. A second one ends the process with exit code 130."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    was_pressed = threading.Event()
    previous_handler = signal.signal(signal.SIGINT, lambda _signal, _frame: None)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, screen, interrupt, was_pressed), daemon=True)
    watcher.start()
    try:
        yield
    except RequestInterruptedError:
        was_pressed.set()
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        watcher.join()
        os.close(reader)
        signal.signal(signal.SIGINT, previous_handler)
    if was_pressed.is_set():
        raise KeyboardInterrupt


def _watch(reader: int, screen: Screen, interrupt: Callable[[], None], was_pressed: threading.Event) -> None:
    n_interrupts = 0
    while number := os.read(reader, 1):
        if number[0] != signal.SIGINT:
            interrupt()
            continue
        n_interrupts += 1
        if n_interrupts == 2:
            screen.leave()
            os._exit(130)  # the main thread is inside llama.cpp and cannot be unwound
        was_pressed.set()
        interrupt()
        if not select.select([reader], [], [], _PATIENCE_S)[0]:
            screen.say("stopping after this step; Ctrl-C again leaves at once")
