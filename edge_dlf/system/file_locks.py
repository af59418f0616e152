"""Locks that keep other processes away from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import EdgeDLFError, require
from .durable import file_error

_POLL_S = 0.2


def lock_name(path: Path) -> Path:
    """The file by which a run keeps others away from `path`; it may stay."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(paths: Sequence[Path]) -> Iterator[None]:
    """Keep other runs away from these files. Raises EdgeDLFError, at once, where one of them is in use."""
    with ExitStack() as stack:
        for path in paths:
            # The lock would make the folder.
            require(path.parent.is_dir(), f"{path}: there is no folder {path.parent}")
            try:
                stack.enter_context(FileLock(lock_name(path), timeout=0, thread_local=False))
            except Timeout:
                raise EdgeDLFError(f"{path}: another run is writing to it") from None
            except OSError as error:
                raise file_error(path, error) from error
        yield


@contextmanager
def awaited(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Keep other runs away from this file, after those that are there already.

    wait: called now and then until they are done. It may raise.
    """
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(FileLock(lock_name(path), timeout=_POLL_S, thread_local=False))
                break
            except Timeout:
                wait()
        yield
