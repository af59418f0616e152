"""Handling of Ctrl-C, and of SIGTERM where asked for, while llama.cpp computes.

Python runs signal handlers between bytecodes. During a long call into C a Ctrl-C would be seen only once the call
returns, two would count as one, and one that is seen inside a callback from C would be lost. The signal's wake-up
descriptor is written at once, whatever the main thread does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import RequestInterruptedError
from .screen import Screen

_PATIENCE_S = 0.5


class Stop:
    """A request to stop: `signal` is the number of the signal that asked for it, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._raises = False

    def check(self) -> None:
        """Raise KeyboardInterrupt, or SystemExit for SIGTERM, if a signal has come."""
        if self.signal == signal.SIGTERM:
            raise SystemExit(143)
        if self.signal is not None:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let signals raise immediately inside this context, which waits for input or for work that `interrupt` cannot
        end."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def handle(self, number: int, _frame: object) -> None:
        """Handle a signal; Python calls this between two bytecodes."""
        self.signal = self.signal or number
        if self._raises:
            self.check()


@contextmanager
def interruptible(
    screen: Screen, interrupt: Callable[[], None], signals: Sequence[int] = (signal.SIGINT,)
) -> Iterator[Stop]:
    """Stop the work in this context when a signal comes.

    The first of `signals` calls `interrupt`, which must end the work from another thread; the context then raises
    KeyboardInterrupt, or SystemExit for SIGTERM. `screen` says so if that takes long. A second Ctrl-C ends the process
    with exit code 130. A signal that this process was started to ignore, as by `nohup`, stays ignored.
    """
    signals = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stop = Stop()
    previous_handlers = {number: signal.signal(number, stop.handle) for number in signals}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, screen, interrupt, stop), daemon=True)
    watcher.start()
    try:
        yield stop
    except RequestInterruptedError:
        stop.signal = stop.signal or signal.SIGINT
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        watcher.join()
        os.close(reader)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    stop.check()


def _watch(reader: int, screen: Screen, interrupt: Callable[[], None], stop: Stop) -> None:
    n_interrupts = 0
    while number := os.read(reader, 1):
        if number[0] != signal.SIGINT:
            interrupt()
            continue
        n_interrupts += 1
        if n_interrupts == 2:
            screen.leave()
            os._exit(130)  # the main thread is inside llama.cpp and cannot be unwound
        stop.signal = stop.signal or signal.SIGINT
        interrupt()
        if not select.select([reader], [], [], _PATIENCE_S)[0]:
            screen.say("stopping after this step; Ctrl-C again leaves at once")
