"""Every command as cron, daemons, containers and pipes start it: closed or full descriptors, hardly any environment."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import pytest

from edge_dlf.fusion.ready import working_folder

ROOT = Path(__file__).parents[1]
QUESTION = "How much is 21 and 39 together?"
ANSWER = "The answer is 60."
ROW = json.dumps({"id": "1", "prompt": QUESTION}) + "\n"
MODELS = ["--large", "large-q8_0.gguf", "--base", "base-q8_0.gguf", "--expert", "sums=sums-lora-f16.gguf"]
WRITING = {
    "generate": ["generate", QUESTION],
    "generate-json": ["generate", QUESTION, "--json"],
    "chat": ["chat", "demo"],
    "compare": ["compare", QUESTION],
    "batch": ["batch", "in.jsonl", "-o", "-"],
    "batch-json": ["batch", "in.jsonl", "-o", "out.jsonl", "--restart", "--json"],
    "doctor": ["doctor"],
    "list": ["list"],
    "show": ["show", "demo"],
    "pull": ["pull", "demo"],
    "trace": ["trace", "trace.jsonl"],
    "help": ["--help"],
    "version": ["--version"],
}
"""Commands that end well, and write to stdout."""
REFUSED = {
    "tune": ["tune", "missing.jsonl"],
    "bench": ["bench", "missing"],
    "eval": ["eval", "--tasks", "missing.yaml", "-o", "results"],
    "new": ["new", "bad name", *MODELS],
    "rm": ["rm", "missing"],
    "train": ["train", "missing.gguf", "missing.jsonl", "-o", "x.gguf"],
    "serve": ["serve", "--port", "0", "--host", "256.0.0.0"],
}
"""Commands that end with one line about what is wrong, before they work for seconds."""

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
ENVIRONMENT = {"HOME": "/proc/none", "LC_ALL": "C", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""As `env -i` leaves it, with a home that cannot be written."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shell")
    (folder / "in.jsonl").write_text(ROW)
    for file in (ROOT / "models" / "demo").glob("*.gguf"):
        (folder / file.name).symlink_to(file)
    subprocess.run(command("generate", QUESTION, "--trace", "trace.jsonl"), cwd=folder, check=True, capture_output=True)
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edge_dlf", *arguments]


class Run:
    """A command that has ended, with the standard descriptors `closed`, `full` (a disk without room) or `wrong` (open
    in the other direction). is_removed: whether its working folder is gone."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        closed: Sequence[int] = (),
        full: Sequence[int] = (),
        wrong: Sequence[int] = (),
        stdin: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
        is_removed: bool = False,
    ) -> None:
        def prepare() -> None:
            for fd in full:
                os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
            for fd in wrong:
                os.dup2(os.open("/dev/null", os.O_RDONLY if fd else os.O_WRONLY), fd)
            for fd in closed:
                os.close(fd)
            if is_removed:
                removed = folder / "removed"
                removed.mkdir()
                os.chdir(removed)
                removed.rmdir()
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # last: the parent may hold more

        done = subprocess.run(
            command(*arguments), cwd=folder, env={**ENVIRONMENT, **environment}, preexec_fn=prepare,
            capture_output=True, input=stdin, encoding="utf-8", timeout=60, check=False,
        )  # fmt: skip
        self.code, self.stdout = done.returncode, done.stdout
        self.complaints = [line for line in done.stderr.splitlines() if line.startswith("edge-dlf:")]
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert len(self.complaints) <= 1


@needs_full
@pytest.mark.parametrize("name", [name for name in WRITING if name not in ("generate-json", "help", "version")])
def test_nothing_is_lost_without_stdin_stderr_home_and_locale(folder: Path, name: str) -> None:
    done = Run(folder, WRITING[name], closed=[0], full=[2])
    assert done.code == 0
    assert bool(done.stdout) == (name != "chat")  # which nobody asks anything
    if name in ("generate", "compare", "batch"):
        assert ANSWER in done.stdout


@needs_full
@pytest.mark.parametrize("name", WRITING)
def test_a_stdout_without_room_is_an_error_in_one_line(folder: Path, name: str) -> None:
    done = Run(folder, WRITING[name], full=[1], stdin=f"{QUESTION}\n{QUESTION}\n")
    assert (done.code, done.complaints) == (1, ["edge-dlf: stdout: no space left on device"])


@pytest.mark.parametrize(
    ("name", "how"), [("generate", "closed"), ("batch", "closed"), ("list", "wrong"), ("help", "closed")]
)
def test_a_stdout_that_takes_nothing_is_an_error_in_one_line(folder: Path, name: str, how: str) -> None:
    done = Run(folder, WRITING[name], **{how: [1]})
    assert (done.code, done.complaints) == (1, ["edge-dlf: stdout: bad file descriptor"])


@pytest.mark.parametrize("name", ["generate", "chat", "batch", "doctor", "version"])
def test_python_has_nothing_to_warn_of(folder: Path, name: str) -> None:
    assert Run(folder, WRITING[name], environment={"PYTHONWARNINGS": "error"}).code == 0


@pytest.mark.parametrize("name", ["generate", "chat", "compare", "doctor", "list", "show", "version"])
def test_a_working_folder_that_has_been_removed_is_not_needed(folder: Path, name: str) -> None:
    assert Run(folder, WRITING[name], is_removed=True).code == 0


@pytest.mark.parametrize("name", ["batch", "batch-json", "trace"])
def test_a_file_of_a_removed_working_folder_is_missing(folder: Path, name: str) -> None:
    assert Run(folder, WRITING[name], is_removed=True).code == 2


def test_kernels_are_compiled_where_the_working_folder_has_been_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba asks for the working folder then."""
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    (tmp_path / "removed").rmdir()
    with working_folder():
        assert Path.cwd() == Path("/")
    with pytest.raises(FileNotFoundError):
        Path.cwd()


def test_a_library_that_cannot_be_loaded_is_an_error_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(
        "try:\n    raise ImportError('libx.so: failed to map\\nsegment')\n"
        "except ImportError as error:\n    raise ImportError('a page of advice') from error\n"
    )
    for name in ("version", "generate"):
        done = Run(folder, WRITING[name], environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
        line = "edge-dlf: a part of this installation cannot be loaded: libx.so: failed to map segment"
        assert (done.code, done.complaints) == (1, [line])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_keeps_its_exit_code(folder: Path, name: str) -> None:
    done = Run(folder, REFUSED[name], closed=[0, 1])
    assert (done.code, len(done.complaints)) in ((2, 1), (3, 1))


def test_an_exit_code_needs_no_stream_at_all(folder: Path) -> None:
    assert Run(folder, REFUSED["bench"], closed=[0, 1, 2]).code == 3


def test_an_answer_needs_no_stderr(folder: Path) -> None:
    done = Run(folder, WRITING["generate"], closed=[2])
    assert (done.code, done.stdout) == (0, f"{ANSWER}\n")


@pytest.mark.parametrize("arguments", [["generate"], ["tune", "-"], ["rm", "demo"]])
def test_whoever_needs_an_answer_says_that_nobody_gives_one(folder: Path, arguments: list[str]) -> None:
    done = Run(folder, arguments, closed=[0])
    assert (done.code, len(done.complaints)) in ((2, 1), (3, 1))


@pytest.mark.parametrize("option", [["--grammar", "/dev/zero", "Hi"], ["--json-schema", "/dev/zero", "Hi"], ["-"]])
def test_what_never_ends_is_refused_before_memory_does(folder: Path, option: list[str]) -> None:
    with Path("/dev/zero").open("rb") as endless:
        done = subprocess.run(
            command("generate", *option), cwd=folder, env=ENVIRONMENT, stdin=endless, capture_output=True,
            encoding="utf-8", timeout=60, check=False, preexec_fn=_with_little_memory,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(": has more than 64 MiB")


def _with_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


def test_a_stdin_that_cannot_be_read(folder: Path) -> None:
    done = Run(folder, ["generate", "-"], wrong=[0])
    assert (done.code, done.complaints) == (1, ["edge-dlf: input or output: bad file descriptor"])


@pytest.mark.parametrize("name", ["generate", "batch", "trace"])
def test_a_reader_that_leaves_hears_no_complaint(folder: Path, name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*WRITING[name]), cwd=folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=writer,
        stderr=subprocess.PIPE, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 1
    assert "edge-dlf:" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_slow_reader_of_a_descriptor_that_never_waits_gets_everything(folder: Path) -> None:
    """Whoever started the command may have left its end of the pipe non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = f"from edge_dlf.cli.streams import open_streams; open_streams(); print('x' * {1 << 20}, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=writer, env=ENVIRONMENT, cwd=folder) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            assert len(file.read()) == (1 << 20) + 1
    assert process.returncode == 0


def _at_terminal(folder: Path, arguments: Sequence[str], **environment: str) -> bytes:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    env = {**ENVIRONMENT, **environment}
    with subprocess.Popen(command(*arguments), cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        written = b""
        with suppress(OSError):  # Linux says so at the end
            while part := os.read(ours, 1 << 16):
                written += part
    os.close(ours)
    assert run.returncode == 0
    return written


@pytest.mark.parametrize(
    ("name", "environment"),
    [("batch-json", {}), ("compare", {"TERM": "dumb"}), ("list", {})],
)
def test_a_terminal_that_knows_no_escapes_gets_none(folder: Path, name: str, environment: dict[str, str]) -> None:
    written = _at_terminal(folder, WRITING[name], **environment)
    assert written
    assert b"\x1b" not in written


def test_another_terminal_gets_them(folder: Path) -> None:
    assert b"\x1b" in _at_terminal(folder, WRITING["doctor"], TERM="xterm")


def _started(folder: Path, *arguments: str, ignored: Sequence[int], **streams: Any) -> subprocess.Popen[str]:
    def prepare() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen(
        command(*arguments), cwd=folder, env=ENVIRONMENT, preexec_fn=prepare, encoding="utf-8", **streams
    )


def _stream(file: IO[str] | None) -> IO[str]:
    assert file
    return file


def test_ignored_signals_stay_ignored(folder: Path) -> None:
    """As `nohup` and a shell's background want it."""
    ignored = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with _started(folder, "chat", "demo", ignored=ignored, **streams) as chat:
        stdin, stdout = _stream(chat.stdin), _stream(chat.stdout)
        for number in (*ignored, None):
            stdin.write(f"{QUESTION}\n")
            stdin.flush()
            assert stdout.readline() == f"{ANSWER}\n"
            if number:
                chat.send_signal(number)
        stdin.close()
    assert chat.returncode == 0


def test_a_server_with_nothing_open_serves_and_ends_by_a_signal_that_is_not_ignored(folder: Path) -> None:
    pytest.importorskip("uvicorn")
    code = "import os, sys; os.close(0); os.close(1); from edge_dlf.cli import main; main()"
    run = [sys.executable, "-c", code, "serve", "demo", "--port", "0"]

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with subprocess.Popen(
        run, cwd=folder, env=ENVIRONMENT, preexec_fn=prepare, stderr=subprocess.PIPE, encoding="utf-8"
    ) as server:
        url = next(line for line in _stream(server.stderr) if " at http" in line).split(" at ")[1].split(" ")[0]
        server.send_signal(signal.SIGINT)
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGTERM)
        rest = _stream(server.stderr).read()
    assert server.returncode == 143
    assert "Assertion" not in rest
