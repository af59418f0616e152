"""Work on what strangers wrote, in processes that may be killed: each job gets a fork of one prepared process.

A worker that loops, crashes or takes too much memory ends itself, and its job alone. Whoever gave the job sees its
connection end. `Workers` is their side; `serve` runs in the process that forks.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ..errors import EdgeDLFError, RequestInterruptedError
from .child import python_command
from .locks import ForkSafeLock

_SERVE = f"import sys; from {__name__} import serve; serve(int(sys.argv[1]), sys.argv[2])"
_LENGTH = struct.Struct("!Q")
_NICENESS = 10
"""Lower priority of a worker, so that many of them keep nobody else from computing."""


class WorkerEndedError(Exception):
    """A worker has ended before it answered, which its own limits may have made it do."""


class Connection:
    """Messages of bytes between a worker and whoever gave it its job. Used by one thread at a time on each side.

    fd: this end of a pair of sockets, which is closed with the connection, at the latest when nobody holds it any more.
    was_ended: whether the other side was ended on purpose, which raises RequestInterruptedError.
    """

    def __init__(self, fd: int, was_ended: Callable[[], bool] = lambda: False) -> None:
        self._fd, self._was_ended = fd, was_ended

    def fork(self, was_ended: Callable[[], bool] | None = None) -> Connection:
        """Return the connection to a new fork of the other side, which is in `fork_for_each`. May be called by several
        threads. Raises WorkerEndedError where the other side has ended, EdgeDLFError where there is no room."""
        with _having_room(), socket.socket(fileno=os.dup(self._fd)) as control:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                try:
                    socket.send_fds(control, [b"."], [theirs.fileno()])
                except ConnectionError:
                    raise self._ended() from None
                return Connection(ours.detach(), was_ended or self._was_ended)

    def fork_for_each(self, work: Callable[[Connection], None]) -> None:
        """Fork a worker for each connection that comes, until whoever sends them has ended."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no worker is left as a zombie
        gc.collect()
        gc.freeze()
        with socket.socket(fileno=os.dup(self._fd)) as control:
            self.close()
            while fds := socket.recv_fds(control, 1, 1)[1]:
                if os.fork() == 0:
                    control.close()
                    _be_worker(work, Connection(fds[0]))
                os.close(fds[0])

    def __del__(self) -> None:
        self.close()

    def send(self, *messages: bytes) -> None:
        """Send messages in one go. Raises WorkerEndedError where the other side has ended."""
        left = memoryview(b"".join(part for each in messages for part in (_LENGTH.pack(len(each)), each)))
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            raise self._ended() from None

    def receive(self) -> bytes:
        """Wait for a message. Raises WorkerEndedError where the other side has ended."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def has_come(self, patience_s: float | None) -> bool:
        """Wait so long for a message, or for the other side's end. Returns whether `receive` would return at once, as
        far as can be told: a message comes in one go."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(None if patience_s is None else patience_s * 1000))

    def close(self) -> None:
        """Calling it twice is no error."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _exactly(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            try:
                part = os.read(self._fd, min(length - len(content), 1 << 20))
            except OSError:
                raise self._ended() from None
            if not part:
                raise self._ended()
            content += part
        return bytes(content)

    def _ended(self) -> Exception:
        return RequestInterruptedError("the request was interrupted") if self._was_ended() else WorkerEndedError()


class Workers:
    """A process that forks a worker for each job. It is started with the first job, and again where it has ended.

    prepare: "module:function". The function is called with `material` in that process, once, and returns what each
    worker calls with its connection.
    """

    def __init__(self, prepare: str, material: bytes) -> None:
        self._prepare, self._material = prepare, material
        self._control: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._pid = ForkSafeLock(), os.getpid()
        self._is_closed = False
        self._n_ends = 0

    def worker(self) -> Connection:
        """Return the connection to a new worker. May be called by several threads, and in a forked child.

        Raises EdgeDLFError after `close`, and where the system has no room for a process.
        """
        with self._lock:
            if self._is_closed:
                raise EdgeDLFError("this FusedLlama has been closed")
            if os.getpid() != self._pid:  # the process belongs to the parent
                self._pid, self._control, self._process = os.getpid(), None, None
            n_ends = self._n_ends
            if self._control is not None:
                with suppress(WorkerEndedError):
                    return self._control.fork(lambda: self._n_ends != n_ends)
            with _having_room():
                control = self._start()
            return control.fork(lambda: self._n_ends != n_ends)

    def close(self) -> None:
        """End the process and all workers, and start none any more. Calling it twice is no error."""
        self._is_closed = True
        self.end()

    def end(self) -> None:
        """End the process and all workers. A later job starts it again. May be called by any thread."""
        with self._lock:
            self._n_ends += 1
            if self._process is not None and os.getpid() == self._pid:
                os.killpg(self._process.pid, signal.SIGKILL)  # workers are in the group of the process they come from
            self._end()

    def end_larger(self, n_bytes: int) -> None:
        """End the workers that hold more memory than that."""
        with suppress(psutil.Error):
            for worker in psutil.Process(self._process.pid).children(recursive=True) if self._process else ():
                if worker.memory_info().rss > n_bytes:
                    worker.kill()

    def _end(self) -> None:
        if self._control is not None and os.getpid() == self._pid:
            self._control.close()
        if self._process is not None and os.getpid() == self._pid:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    def _start(self) -> Connection:
        self._end()
        ours, theirs = socket.socketpair()
        control = Connection(ours.detach())
        with theirs:
            # Its own session, and so its own group: Ctrl-C in the terminal is meant for this process.
            self._process = subprocess.Popen(
                python_command(_SERVE, str(theirs.fileno()), self._prepare),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        with suppress(WorkerEndedError):  # a process that has ended is told of by the worker that does not come
            control.send(self._material)
        self._control = control  # only now: whatever a signal raises before leaves nothing that would be used
        return control


@contextmanager
def _having_room() -> Iterator[None]:
    """Raise EdgeDLFError where the system gives no more processes, descriptors or memory."""
    try:
        yield
    except OSError as error:
        raise EdgeDLFError(f"no process can be started: {(error.strerror or str(error)).lower()}") from error


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """In a worker: end this process if what follows computes for longer than that."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory(n_bytes: int) -> None:
    """In a worker: let no more than so many bytes be allocated from now on, where the system can keep to that."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + n_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(control_fd: int, prepare: str) -> None:
    """Prepare the work, and fork a worker for each job, until whoever sends them has ended."""
    control = Connection(control_fd)
    module, _, name = prepare.partition(":")
    with suppress(WorkerEndedError):
        control.fork_for_each(getattr(importlib.import_module(module), name)(control.receive()))


def _be_worker(work: Callable[[Connection], None], connection: Connection) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # where memory runs out, the system ends workers first
            Path("/proc/self/oom_score_adj").write_text("1000")
        with suppress(WorkerEndedError):
            work(connection)
    finally:
        os._exit(0)
