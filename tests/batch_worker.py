"""`edge-dlf batch` on a scripted family, in a process of its own that a test may end at any moment."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Here, so that no process imports them again.
from edge_dlf.batch import intake, ledger  # noqa: F401
from edge_dlf.cli import main
from edge_dlf.cli.options import Options
from edge_dlf.families import manifest  # noqa: F401
from edge_dlf.system import durable

from .fake_llm import FakeLlama


def run(
    args: list[str],
    streams: list[Any],
    *,
    n_rows: int | None = None,
    n_writes: int | None = None,
    n_bytes: int | None = None,
) -> None:
    """The command with these arguments; streams: its stdin, stdout and stderr, each a path or the end of a pipe.

    n_rows: before the row after these the engine waits to be interrupted. n_writes: amid the write after these the
    process is killed. n_bytes: no file may grow beyond.
    """
    for fd, stream in enumerate(streams):
        if not isinstance(stream, Connection):
            stream = Path(stream).open("wb" if fd else "rb", buffering=0)  # noqa: SIM115
        os.dup2(stream.fileno(), fd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    if n_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    Options.load = lambda _: Waiting(n_rows)  # type: ignore[assignment,return-value]
    if n_writes is not None:
        durable.os = Tearing(n_writes)  # type: ignore[assignment]
    main(["batch", *args])


class Waiting(FakeLlama):
    def __init__(self, n_rows: int | None) -> None:
        super().__init__()
        self._n_rows = n_rows
        self._goes_on = threading.Event()

    def interrupt(self) -> None:
        super().interrupt()
        self._goes_on.set()

    def row(self, request: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        if len(self.requests) == self._n_rows:
            self._goes_on.wait()
        return super().row(request, settings)


class Tearing:
    """In place of `os`: ends the process when the line of one write is half written."""

    def __init__(self, n_writes: int) -> None:
        self._n_left = n_writes

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, line: bytes) -> int:
        if not self._n_left:
            os.write(fd, line[: os.getpid() % len(line)])
            os.kill(os.getpid(), signal.SIGKILL)
        self._n_left -= 1
        return os.write(fd, line)
