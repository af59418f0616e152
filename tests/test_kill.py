"""A batch in a process of its own, ended in every way there is: no row is lost, none is there twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import batch_worker
from .test_batch_cli import answers, read, write

Start = Callable[..., Any]

N_ROWS = 600
ROW_BYTES = 500
PROCESSES = multiprocessing.get_context("forkserver")  # what is imported once serves every process
PROCESSES.set_forkserver_preload([batch_worker.__name__])


class Worker:
    """A running batch. given: keyword arguments of `batch_worker.run`."""

    def __init__(
        self, folder: Path, *args: str | Path, stdin: Any = os.devnull, stdout: Any = os.devnull, **given: Any
    ) -> None:
        self._stderr = folder / "stderr"
        self._stderr.write_bytes(b"")
        streams = [stdin, stdout, self._stderr]
        self.process = PROCESSES.Process(target=batch_worker.run, args=(list(map(str, args)), streams), kwargs=given)
        self.process.start()

    @property
    def is_alive(self) -> bool:
        return self.process.exitcode is None

    def signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait(self) -> tuple[int | None, str]:
        """Exit code and stderr."""
        self.process.join(60)
        return self.process.exitcode, self._stderr.read_text()

    def wait_until_grown(self, path: Path, n_rows: int, n_before: int | None = None) -> None:
        """Wait until about `n_rows` more rows are in the file than in its first `n_before` bytes, by default all."""
        target = (size(path) if n_before is None else n_before) + n_rows * ROW_BYTES
        while size(path) < target:
            assert self.is_alive, self.wait()
            time.sleep(0.0005)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder with an input, and the output of one run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    texts = ["plain", "日本語", "fail", "\u2028é"]
    rows = [{"id": f"é{n}", "prompt": f"{texts[n % 4]} {n}"} for n in range(N_ROWS - 2)]
    write(str(folder / "in"), [*rows[:100], "{", *rows[100:], '{"id": "é5"}'])
    assert Worker(folder, "-f", tiny, folder / "in", "-o", folder / "whole").wait()[0] == 1
    assert len(answers(folder / "whole")) == N_ROWS
    return folder


@pytest.fixture
def start(tiny: Path, whole: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a batch of the input into `out`. At the end all are killed."""
    workers = []

    def start(*args: str | Path, output: Path | str = tmp_path / "out", **given: Any) -> Worker:
        input = "-" if "stdin" in given else whole / "in"
        workers.append(Worker(tmp_path, "-f", tiny, input, "-o", output, *args, **given))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.join()
        worker.process.close()


def test_kill_9(start: Start, whole: Path, tmp_path: Path) -> None:
    chance, files = random.Random(9), [tmp_path / "out", tmp_path / "bad"]
    n_torn = 0
    for number in range(20):
        n_rows = chance.randrange(25)
        if number % 3 == 0:
            worker = start("--errors", files[1], n_writes=n_rows)  # kills itself amid a write
        else:
            worker = start("--errors", files[1], n_rows=40)
            worker.wait_until_grown(files[0], n_rows)
            worker.process.kill()
        assert worker.wait()[0] == -signal.SIGKILL
        n_torn += any(path.exists() and path.read_bytes()[-1:] not in (b"", b"\n") for path in files)
    assert n_torn > 3
    assert start("--errors", files[1]).wait()[0] == 1
    assert answers(*files) == answers(whole / "whole")


def test_sigterm(start: Start, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(4):
        worker = start(n_rows=40)
        worker.wait_until_grown(out, 20)
        worker.signal(signal.SIGTERM)
        code, stderr = worker.wait()
        assert (code, stderr.count("\n")) == (143, 1)
        assert stderr.startswith(f"stopped: {len(read(out))} of {N_ROWS} rows")
        assert stderr.endswith("; the same command goes on from here\n")
    assert start().wait()[0] == 1
    assert answers(out) == answers(whole / "whole")


def test_two_writers(start: Start, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    first = start(n_rows=20)
    first.wait_until_grown(out, 1)
    line = f"edge-dlf: {out.resolve()}: another run is writing to it\n"
    assert start().wait() == (1, line)
    assert start("--restart", output=tmp_path / "link").wait() == (1, line)
    assert start("--errors", out, output=tmp_path / "other").wait() == (1, line)
    first.signal(signal.SIGINT)
    assert first.wait()[0] == 130
    assert start().wait()[0] == 1
    assert answers(out) == answers(whole / "whole")


def test_a_limit_on_the_size_of_files(start: Start, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for limit in (30_000, 60_000, 90_000):
        code, stderr = start(n_bytes=limit).wait()
        assert (code, stderr.count("\n")) == (1, 1)
        assert "out: file too large; every row so far is kept, and once there is room" in stderr
        assert limit - 2 * ROW_BYTES < size(out) <= limit
        assert read(out)
    assert start().wait()[0] == 1
    assert answers(out) == answers(whole / "whole")


def test_a_full_file_system(start: Start, whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no mount")
    try:
        for n_kib in (64, 128):
            subprocess.run(["mount", "-o", f"remount,size={n_kib}k", str(disk)], check=True)
            code, stderr = start(output=disk / "out").wait()
            assert (code, stderr.count("\n")) == (1, 1)
            assert "disk/out: no space left on device; every row so far is kept" in stderr
            assert len(answers(disk / "out")) > n_kib
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert start(output=disk / "out").wait()[0] == 1
        assert answers(disk / "out") == answers(whole / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_rows_of_a_pipe_are_answered_as_they_come_and_ctrl_c_ends_the_wait(start: Start, tmp_path: Path) -> None:
    reader, writer = PROCESSES.Pipe(duplex=False)
    with writer:
        with reader:
            worker = start(stdin=reader)
        for n_rows in range(1, 4):
            n_before = size(tmp_path / "out")
            os.write(writer.fileno(), b'{"prompt": "a"}\n')
            worker.wait_until_grown(tmp_path / "out", 1, n_before)
            assert len(read(tmp_path / "out")) == n_rows
        worker.signal(signal.SIGINT)
        assert worker.wait()[0] == 130
    assert len(read(tmp_path / "out")) == 3


def test_a_reader_that_leaves(start: Start) -> None:
    reader, writer = PROCESSES.Pipe(duplex=False)
    with reader:
        with writer:
            worker = start(output="-", stdout=writer)
        with open(reader.fileno(), "rb", closefd=False) as file:
            assert json.loads(file.readline())["error"] is None
    assert worker.wait() == (1, "")
