"""Work side by side, a thread for each lane of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


class Lanes:
    """Threads that are made when they are first needed. Used by one thread at a time."""

    def __init__(self) -> None:
        self._threads: list[ThreadPoolExecutor] = []

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run `jobs` side by side, the last one on the caller's thread. Whatever happens, Ctrl-C included, no job is
        still at work when this returns. Raises what the last job raises, or else the first that raises anything."""
        while len(self._threads) < len(jobs) - 1:
            self._threads.append(ThreadPoolExecutor(1, thread_name_prefix="edge-dlf-member"))
        try:
            running = [thread.submit(job) for thread, job in zip(self._threads, jobs[:-1], strict=False)]
            jobs[-1]()
            for job in running:
                job.result()
        except BaseException:
            self._rest()
            raise

    def _rest(self) -> None:
        """Wait for all threads. What each was given comes before what it is given here."""
        for thread in self._threads:
            while True:
                try:
                    thread.submit(int).result()
                    break
                except KeyboardInterrupt:  # one is on its way already
                    continue

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()
        self._threads.clear()
