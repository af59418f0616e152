"""Files that lose nothing that was written, whatever ends the process or the machine."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import EdgeDLFError, InvalidParameterError, require

_SYNC_S = 1.0
_BEGINNING_BYTES = 1 << 12
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_WRONG_PATH = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
)
_KEPT = "; every row so far is kept, and once there is room the same command continues"


def file_error(path: str | PathLike[str], error: OSError, kept: str = "") -> EdgeDLFError:
    """The error to raise if a file cannot be used: a path that leads to none is the caller's mistake.

    kept: what is said of a full disk.
    """
    reason = (error.strerror or str(error)).lower()
    if error.errno in _WRONG_PATH:
        return InvalidParameterError(f"{path}: {reason}")
    return EdgeDLFError(f"{path}: {reason}{kept if error.errno in _FULL else ''}")


class Appender(AbstractContextManager["Appender"]):
    """A file that grows by whole lines. Each of them is there in full or not at all, and on disk a second later.

    A context manager. Raises EdgeDLFError where the disk is full or fails, and, within a second, where another program
    has removed, replaced or cut the file.
    """

    def __init__(self, path: Path, n_bytes: int) -> None:
        """Open the file, or make it; what lies beyond `n_bytes` is cut off."""
        self.path = path
        self._n_bytes = n_bytes
        self._failure: OSError | None = None
        self._syncing = threading.Lock()
        self._is_due = self._is_closed = False
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._fd, n_bytes)
        except OSError as error:
            raise file_error(path, error) from error
        sync_folder(path.parent)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with suppress(*([EdgeDLFError] if kind else [])):
            self.close()

    def append(self, line: bytes) -> None:
        """Write `line` at the end."""
        if self._failure:
            raise file_error(self.path, self._failure, _KEPT)
        try:
            n_written = os.write(self._fd, line)
            while n_written < len(line):  # a disk that is filling up; the next call says why
                n_written += os.write(self._fd, line[n_written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._n_bytes)
            raise file_error(self.path, error, _KEPT) from error
        self._n_bytes += len(line)
        if not self._is_due:
            self._is_due = True
            timer = threading.Timer(_SYNC_S, self._sync)  # in a thread, so that a slow disk holds up nobody
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """Bring everything to disk. Calling it twice is no error."""
        self._sync()
        with self._syncing:
            if self._is_closed:
                return
            self._is_closed = True
            os.close(self._fd)
        if self._failure:
            raise file_error(self.path, self._failure, _KEPT)

    def _sync(self) -> None:
        with self._syncing:
            self._is_due = False
            try:
                if not self._is_closed:
                    os.fsync(self._fd)
                    self._require_place()
            except OSError as error:
                self._failure = self._failure or error

    def _require_place(self) -> None:
        """Raise OSError where the lines are no longer what the path leads to."""
        n_bytes, own = self._n_bytes, os.fstat(self._fd)
        try:
            is_there = os.path.samestat(own, self.path.stat())
        except FileNotFoundError:
            is_there = False
        if own.st_size < n_bytes or not is_there:
            raise OSError(errno.ESTALE, "another program has removed, replaced or cut this file")


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a file that replaces `path` at the end, all at once; an exception before the end changes nothing. A link
    keeps leading to it. A pipe or a device is written to as it is.

    mode: permissions of a new file, less those that the umask takes away. A file that is replaced keeps its own.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path))
    except OSError as error:
        raise file_error(path, error) from error
    new = new_name(path)
    try:
        with open(new, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    except BaseException as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise file_error(path, error) from error
        raise
    sync_folder(path.parent)


def require_own(path: Path, is_own: Callable[[bytes], bool], what: str) -> None:
    """Raise InvalidParameterError where `path` is a file that this program has not written, and that would be replaced.

    is_own: whether a file of this program begins with such bytes. what: what is written, for the message.
    """
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            beginning = file.read(_BEGINNING_BYTES)
    except (OSError, ValueError):
        return  # whoever writes it says what is wrong
    require(not beginning or is_own(beginning), f"{path}: is another file, no {what}, and stays; choose another name")


def new_name(path: Path) -> Path:
    """Path that `replacing` writes to; a process that is killed leaves it behind."""
    return path.with_name(f".{path.name}.new")


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to disk, where the system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
