"""Threads that let groups of members compute at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


class GroupThreads:
    """One thread per group of members, made when it is first needed. Used by one caller at a time."""

    def __init__(self) -> None:
        self._threads: list[ThreadPoolExecutor] = []

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run `jobs` at the same time, the last one on the caller's thread.

        No job is still running when this returns, whatever happens, Ctrl-C included.
        Raises what the last job raises, or else the first error of another one.
        """
        while len(self._threads) < len(jobs) - 1:
            self._threads.append(ThreadPoolExecutor(1, thread_name_prefix="edge-dlf-member"))
        try:
            running = [thread.submit(job) for thread, job in zip(self._threads, jobs[:-1], strict=False)]
            jobs[-1]()
            for job in running:
                job.result()
        except BaseException:
            self._wait()
            raise

    def _wait(self) -> None:
        """Wait until every thread is idle. A thread runs its jobs in order, so an empty job comes after all others."""
        for thread in self._threads:
            while True:
                try:
                    thread.submit(int).result()
                    break
                except KeyboardInterrupt:  # the caller raises one already
                    continue

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()
        self._threads.clear()
