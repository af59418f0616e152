"""`edge-dlf batch` on a scripted family: rows in, rows out, and going on where an earlier run was stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from edge_dlf import DecodeError, OutOfMemoryError
from edge_dlf.batch import progress
from edge_dlf.cli import main
from edge_dlf.cli.options import Options
from edge_dlf.cli.progress import ProgressLine, duration
from edge_dlf.cli.screen import Screen
from edge_dlf.system import durable, jsonl

from .fake_llm import FakeLlama

Runner = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> Runner:
    """Run `edge-dlf batch` in an empty folder, on the files of the tiny family and the answers of a fake one."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("EDGE_DLF_"):
            monkeypatch.delenv(name)

    def run(llm: FakeLlama | BaseException, *args: str, stdin: str | bytes | None = None) -> Result:
        def load(options: Options) -> FakeLlama:
            if isinstance(llm, BaseException):
                raise llm
            llm.options = options
            return llm

        monkeypatch.setattr(Options, "load", load)
        return CliRunner().invoke(main, ["batch", "-f", str(tiny), *args], input=stdin)

    return run


def write(name: str, rows: Iterable[Mapping[str, Any] | str]) -> None:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read(name: str | Path) -> list[dict[str, Any]]:
    content = Path(name).read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def answers(*names: str | Path) -> dict[str, Any]:
    """Row by id, or by line where it has none, without what differs from run to run; each is there once."""
    found: dict[str, Any] = {}
    for row in (row for name in names for row in read(name)):
        key = row["custom_id"] or f"line {row['error']['line']}"
        assert key not in found
        found[key] = row["error"] or row["response"]["body"]["choices"]
    return found


def prompts(n_rows: int) -> list[dict[str, Any]]:
    """Rows r0, r1, …; every fifth of them fails."""
    return [{"id": f"r{n}", "prompt": f"fail {n}" if n % 5 == 4 else f"prompt {n}"} for n in range(n_rows)]


class Stopping(FakeLlama):
    """Calls `then` before it gives out row number `n_rows`."""

    def __init__(self, n_rows: int, then: Callable[[], Any]) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.then = then

    def row(self, request: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        if len(self.requests) == self.n_rows:
            self.then()
        return super().row(request, settings)


class Healed(FakeLlama):
    """No prompt of its fails."""

    def row(self, request: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        return super().row({**request, "prompt": "well"}, settings)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail(error: BaseException) -> Callable[[], None]:
    def then() -> None:
        raise error

    return then


class TestRows:
    def test_columns_of_the_user_s_own_are_kept(self, run: Runner) -> None:
        write("in", [{"id": "a", "prompt": "x", "answer": "42"}, {"id": "b", "prompt": "fail", "answer": "43"}])
        assert run(FakeLlama(), "in", "-o", "out", "--keep").exit_code == 1
        assert {row["custom_id"]: row["columns"] for row in read("out")} == {
            "a": {"answer": "42"},
            "b": {"answer": "43"},
        }

    def test_one_line_for_each(self, run: Runner) -> None:
        write("in", [{"prompt": "a"}, {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {}}])
        llm = FakeLlama()
        result = run(llm, "in", "-o", "out")
        assert (result.exit_code, result.stdout) == (0, "")
        assert {row["custom_id"]: list(row) for row in read("out")} == {
            "1": ["id", "custom_id", "response", "error"],
            "x": ["id", "custom_id", "response", "error"],
        }
        assert llm.is_closed

    def test_requests_and_settings_go_to_the_engine_as_they_are(self, run: Runner) -> None:
        write("in", [{"id": 7, "prompt": "a", "temperature": 1}])
        llm = FakeLlama()
        given = "--top-k 3 --draft 2 --stop x --stop y --max-tokens 9 --method large"
        run(llm, "in", "-o", "out", *given.split())
        request, settings = llm.requests[0]
        assert json.loads(request) == {"prompt": "a", "temperature": 1}
        assert settings == {
            "top_k": 3,
            "draft": 2,
            "stop": ("x", "y"),
            "max_tokens": 9,
            "method": "large",
            "seed": 0,
            "system": None,
            "raw": False,
        }
        assert llm.options
        assert llm.options.loading == {"n_parallel": "auto"}

    def test_seed_system_raw_and_parallel(self, run: Runner) -> None:
        write("in", [{"prompt": "a"}])
        llm = FakeLlama()
        run(llm, "in", "-o", "out", "--seed", "5", "--system", "Be brief.", "--parallel", "3")
        assert llm.requests[0][1] == {"seed": 5, "system": "Be brief.", "raw": False}
        assert llm.options
        assert llm.options.loading == {"n_parallel": 3}
        run(llm, "in", "-o", "raw", "--raw")
        assert llm.requests[1][1] == {"seed": 0, "system": None, "raw": True}

    def test_order(self, run: Runner) -> None:
        write("in", prompts(30))
        run(FakeLlama(), "in", "-o", "out")
        run(FakeLlama(), "in", "-o", "ordered", "--ordered")
        ids = [row["custom_id"] for row in read("ordered")]
        assert ids == [f"r{n}" for n in range(30)] != [row["custom_id"] for row in read("out")]
        assert answers("out") == answers("ordered")

    def test_stdin_and_stdout(self, run: Runner) -> None:
        result = run(FakeLlama(), "-", "-o", "-", stdin='{"id": "é", "prompt": "a"}\n{"prompt": "b"}')
        assert result.exit_code == 0
        assert {json.loads(line)["custom_id"] for line in result.stdout_bytes.splitlines()} == {"é", "2"}
        assert list(Path().iterdir()) == []

    def test_no_rows(self, run: Runner) -> None:
        write("in", ["", " "])
        result = run(MemoryError(), "in", "-o", "out")
        assert (result.exit_code, result.stderr) == (0, "done: 0 rows\n")
        assert read("out") == []


class TestErrors:
    def test_each_is_the_error_of_its_row(self, run: Runner) -> None:
        write("in", ['{"bad', '{"id": "a"}', "[1]", '{"id": "a"}', '{"prompt": "fail", "id": "b"}', '{"id": "c"}'])
        with Path("in").open("ab") as file:
            file.write(b'{"id": "\xff"}\n{"id": "d\x00"}\n{"id": "last"}')
        result = run(FakeLlama(), "in", "-o", "out")
        assert result.exit_code == 1
        failure, done = result.stderr.splitlines()
        assert failure.startswith("line 1 failed first: not JSON: ")
        assert failure.endswith('; a row is an object such as {"prompt": "…"}')
        assert done.startswith("done: 9 rows · 6 failed · 6 tokens in ")
        assert result.stderr.endswith("; --retry-errors runs what failed again\n")
        found = answers("out")
        assert {key: row["line"] for key, row in found.items() if isinstance(row, dict)} == {
            "line 1": 1,
            "line 3": 3,
            "line 4": 4,
            "b": 5,
            "line 7": 7,
            "line 8": 8,
        }
        assert {key for key, row in found.items() if isinstance(row, list)} == {"a", "c", "last"}

    def test_a_line_that_is_too_long(self, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
        write("in", [{"prompt": "a"}, {"prompt": "a" * 500}, {"prompt": "b"}])
        assert run(FakeLlama(), "in", "-o", "out").exit_code == 1
        assert answers("out")["line 2"]["code"] == "line_too_long"
        assert set(answers("out")) == {"1", "line 2", "3"}

    def test_a_file_of_their_own(self, run: Runner) -> None:
        write("in", [*prompts(10), "{"])
        assert run(FakeLlama(), "in", "-o", "out", "--errors", "bad").exit_code == 1
        assert set(answers("bad")) == {"r4", "r9", "line 11"}
        assert len(answers("out")) == 8
        assert len(answers("out", "bad")) == 11

    def test_what_ends_the_run_leaves_what_is_done(self, run: Runner) -> None:
        write("in", prompts(20))
        for n_rows, error in ((5, OutOfMemoryError("no room")), (9, DecodeError("large failed"))):
            result = run(Stopping(n_rows, fail(error)), "in", "-o", "out", "--json")
            assert (result.exit_code, result.stderr) == (error.exit_code, f"edge-dlf: {error}\n")
            assert json.loads(result.stdout)["status"] == "failed"
        assert len(answers("out")) == 14


class TestResume:
    def test_goes_on_where_it_was_stopped(self, run: Runner) -> None:
        write("in", [*prompts(40), "{", '{"id": "r0"}'])
        run(FakeLlama(), "in", "-o", "whole")
        n_runs, n_requests = 0, 0
        while True:
            llm = Stopping(7, kill(signal.SIGTERM if n_runs % 2 else signal.SIGINT))
            result = run(llm, "in", "-o", "out")
            n_requests += len(llm.requests)
            if result.exit_code == 1:
                break
            assert result.exit_code == (143 if n_runs % 2 else 130)
            n_runs += 1
            n_done = len(read("out"))
            assert result.stderr.startswith(f"stopped: {n_done} ")
            assert result.stderr.endswith("; the same command goes on from here\n")
        assert n_runs > 4
        assert n_requests <= 40 + n_runs
        assert answers("out") == answers("whole")

    def test_nothing_is_loaded_where_nothing_is_left(self, run: Runner) -> None:
        write("in", prompts(4))
        run(FakeLlama(), "in", "-o", "out")
        before = Path("out").read_bytes()
        result = run(ZeroDivisionError(), "in", "-o", "out")
        assert (result.exit_code, result.stderr) == (0, "done: 4 rows, 4 of them before\n")
        assert Path("out").read_bytes() == before

    def test_an_input_may_grow(self, run: Runner) -> None:
        write("in", prompts(5))
        run(FakeLlama(), "in", "-o", "out")
        write("in", prompts(9))
        llm = FakeLlama()
        run(llm, "in", "-o", "out")
        assert len(llm.requests) == 4
        run(FakeLlama(), "in", "-o", "whole")
        assert answers("out") == answers("whole")

    def test_retry_errors(self, run: Runner) -> None:
        write("in", [*prompts(10), "{"])
        for files in (["-o", "out"], ["-o", "out2", "--errors", "bad"]):
            run(FakeLlama(), "in", *files)
            llm = FakeLlama()
            assert run(llm, "in", *files).exit_code == 1
            assert llm.requests == []

            llm = Healed()
            assert run(llm, "in", *files, "--retry-errors").exit_code == 1
            assert len(llm.requests) == 2
            found = answers(*files[1::2])
            assert len(found) == 11
            assert [key for key, row in found.items() if isinstance(row, dict)] == ["line 11"]

    def test_stdin_goes_on_too(self, run: Runner) -> None:
        rows = "".join(json.dumps(row) + "\n" for row in prompts(10))
        run(Stopping(5, kill(signal.SIGINT)), "-", "-o", "out", stdin=rows)
        llm = FakeLlama()
        run(llm, "-", "-o", "out", stdin=rows)
        assert 0 < len(llm.requests) < 10
        assert len(answers("out")) == 10

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--temperature", "0.5"], "temperature was 0.0, now 0.5"),
            (["--seed", "1"], "seed was 0, now 1"),
            (["--ctx-size", "99"], "n_ctx was 4096, now 99"),
            (["--system", "x"], 'system was not given, now "x"'),
            (["--raw", "--stop", "x"], 'stop was not given, now ["x"]; raw was false, now true'),
            (["--errors", "bad"], 'errors was not given, now "bad"'),
            (["--cache-type-k", "q8_0"], 'type_k was "f16", now "q8_0"'),
        ],
    )
    def test_other_parameters_are_refused(self, run: Runner, args: list[str], words: str) -> None:
        write("in", prompts(3))
        run(FakeLlama(), "in", "-o", "out")
        before = {path: path.read_bytes() for path in Path().iterdir()}
        result = run(ZeroDivisionError(), "in", "-o", "out", *args)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert f"was begun with something else: {words}; give the same again, or --restart" in result.stderr
        assert {path: path.read_bytes() for path in before} == before

    def test_what_changes_no_answer_is_not(self, run: Runner) -> None:
        write("in", prompts(3))
        run(FakeLlama(), "in", "-o", "out")
        given = "--draft auto --parallel 2 --threads 1 --gpu-layers 0 --ordered --temperature 0 --ctx-size 4096"
        assert run(ZeroDivisionError(), "in", "-o", "out", *given.split()).exit_code == 0

    def test_another_family_is_refused(self, run: Runner, tiny: Path) -> None:
        write("in", prompts(3))
        run(FakeLlama(), "in", "-o", "out")
        files = [f"--{role}={tiny}/{role}.gguf" for role in ("large", "base")] + [f"--expert=lora={tiny}/lora.gguf"]
        result = CliRunner().invoke(main, ["batch", "in", "-o", "out", "--temperature", "0", *files])
        assert result.exit_code == 2
        assert "the members were large, base, lora, tuned, now large, base, lora" in result.stderr

    def test_another_input_is_refused(self, run: Runner) -> None:
        write("in", prompts(3))
        run(FakeLlama(), "in", "-o", "out")
        for rows in (prompts(2), [{"id": "r0", "prompt": "changed"}, *prompts(9)[1:]]):
            write("in", rows)
            result = run(ZeroDivisionError(), "in", "-o", "out")
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            assert "was begun with another input: the first" in result.stderr

    def test_a_file_that_is_no_output_is_refused(self, run: Runner) -> None:
        write("in", prompts(3))
        Path("out").write_text("precious")
        for args in (["-o", "out"], ["-o", "new", "--errors", "out"], ["-o", "-", "--errors", "out"]):
            result = run(ZeroDivisionError(), "in", *args)
            assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
            assert Path("out").read_text() == "precious"

    def test_a_manifest_that_is_damaged(self, run: Runner) -> None:
        write("in", prompts(3))
        run(FakeLlama(), "in", "-o", "out")
        Path("out.manifest.json").write_text("{")
        result = run(ZeroDivisionError(), "in", "-o", "out")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)

    def test_an_output_that_was_removed_is_begun_anew(self, run: Runner) -> None:
        write("in", prompts(3))
        run(FakeLlama(), "in", "-o", "out")
        Path("out").unlink()
        assert run(FakeLlama(), "in", "-o", "out", "--seed", "1").exit_code == 0
        assert len(answers("out")) == 3

    def test_restart_keeps_what_was_there(self, run: Runner) -> None:
        write("in", prompts(5))
        args = ["in", "-o", "out", "--errors", "bad", "--restart"]
        contents = []
        for seed in "123":
            assert run(FakeLlama(), *args, "--seed", seed).exit_code == 1
            contents.append(Path("out").read_bytes() + Path("bad").read_bytes())
        for number in (1, 2):
            assert Path(f"out.{number}").read_bytes() + Path(f"bad.{number}").read_bytes() == contents[number - 1]
            assert json.loads(Path(f"out.{number}.manifest.json").read_text())["parameters"]["seed"] == number

    def test_an_output_in_another_folder_and_by_a_link(self, run: Runner) -> None:
        write("in", prompts(9))
        Path("there").mkdir()
        Path("link").symlink_to("there/out")
        run(Stopping(4, kill(signal.SIGINT)), "in", "-o", "link")
        run(FakeLlama(), "in", "-o", "there/out")
        assert Path("link").is_symlink()
        assert len(answers("link")) == 9
        assert Path("there/out.manifest.json").exists()


class TestFiles:
    @pytest.mark.parametrize(
        "args", [["-o", "in"], ["-o", "symbolic"], ["-o", "hard"], ["-o", "new", "--errors", "hard"]]
    )
    def test_the_input_is_never_written_to(self, run: Runner, args: list[str]) -> None:
        write("in", prompts(3))
        before = Path("in").read_bytes()
        Path("symbolic").symlink_to("in")
        Path("hard").hardlink_to("in")
        for more in ([], ["--restart"]):
            result = run(FakeLlama(), "in", *args, *more)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            assert "is the input" in result.stderr
        assert Path("in").read_bytes() == before

    @pytest.mark.parametrize("errors", ["out", "./out", "link"])
    def test_output_and_errors_are_two_files(self, run: Runner, errors: str) -> None:
        write("in", prompts(3))
        Path("link").symlink_to("out")
        result = run(FakeLlama(), "in", "-o", "out", "--errors", errors)
        assert result.exit_code == 2
        assert "is both the output and the file of errors" in result.stderr

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["none", "-o", "out"], "does not exist"),
            (["folder", "-o", "out"], "is a directory"),
            (["in", "-o", "no/out"], "there is no folder"),
            (["in", "-o", "folder"], "is a folder"),
            (["in", "-o", "out", "--errors", "-"], "--errors must be a file"),
            (["in"], "Missing option '--output'"),
            (["in", "-o", "out", "--parallel", "0"], "--parallel must be auto or 1 or more, not 0"),
            (["in", "-o", "out", "--raw", "--system", "x"], "leave out --raw or --system"),
        ],
    )
    def test_usage(self, run: Runner, args: list[str], words: str) -> None:
        write("in", prompts(1))
        Path("folder").mkdir()
        result = run(FakeLlama(), *args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr

    def test_a_stream_is_written_and_not_resumed(self, run: Runner) -> None:
        write("in", prompts(3))
        assert run(FakeLlama(), "in", "-o", "/dev/null").exit_code == 0
        assert run(FakeLlama(), "in", "-o", "/dev/null").exit_code == 0
        assert {path.name for path in Path().iterdir()} == {"in"}

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_a_stream_that_is_full(self, run: Runner) -> None:
        write("in", prompts(3))
        result = run(FakeLlama(), "in", "-o", "/dev/full")
        assert (result.exit_code, result.stderr) == (1, "edge-dlf: /dev/full: no space left on device\n")


class Crash(BaseException):
    """The machine stops here."""


class Crashing:
    """In place of `os` where files are written: counts its calls, and stops for good amid call number `n_calls`."""

    def __init__(self, n_calls: int) -> None:
        self.n_left = n_calls

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self.counted(real) if name in ("write", "fsync", "ftruncate", "open") else real

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return None
            self.n_left -= 1
            if self.n_left > 0:
                return None if real is os.fsync else real(*args)
            if self.n_left == 0 and real is os.write:
                real(args[0], args[1][: len(args[1]) // 2])
            raise Crash

        return call


@pytest.mark.parametrize("args", [[], ["--retry-errors"], ["--retry-errors", "--errors", "bad"]])
def test_a_crash_at_any_call_loses_nothing(run: Runner, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    rows, files = prompts(8), ["out", *args[2:]]
    write("in", [*rows[:5], "{"])
    run(FakeLlama(), "in", "-o", "out", *args)
    begun = {file: Path(file).read_bytes() + b'{"no row"\n{"torn' for file in files}
    begun["out.manifest.json"] = Path("out.manifest.json").read_bytes()
    write("in", [*rows[:5], "{", *rows[5:]])
    run(FakeLlama(), "in", "-o", "whole")
    for n_calls in range(1, 200):
        for name, content in begun.items():
            Path(name).write_bytes(content)
        with monkeypatch.context() as patch:
            crashing = Crashing(n_calls)
            patch.setattr(durable, "os", crashing)
            patch.setattr(Path, "replace", crashing.counted(Path.replace))
            try:
                run(FakeLlama(), "in", "-o", "out", *args)
                break
            except Crash:
                pass
        assert run(FakeLlama(), "in", "-o", "out", *args).exit_code == 1
        assert answers(*files) == answers("whole")
    assert 15 < n_calls < 100


class TestProgress:
    @pytest.fixture
    def now(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """A clock that stands still; `s` is what it shows."""
        clock = SimpleNamespace(s=0.0, monotonic=lambda: clock.s)
        monkeypatch.setattr(progress, "time", clock)
        return clock

    def finish(self, shown: ProgressLine, n_rows: int) -> None:
        """Rows of 20 tokens; the first of them fails."""
        body = {"usage": {"prompt_tokens": 3, "completion_tokens": 20}}
        shown.add({"error": {"code": "c", "message": "no", "line": 2}, "response": None})
        for _ in range(n_rows - 1):
            shown.add({"error": None, "response": {"body": body}})

    def test_figures(self, now: SimpleNamespace) -> None:
        shown = ProgressLine(1660, 660, 0)
        now.s = 9.0
        assert shown.figures() == "660/1,660 rows · 0:00:09 so far"
        shown.n_picked = lambda: 90
        assert shown.figures() == "660/1,660 rows · 10.0 tokens/s · 0:00:09 so far"
        shown.n_picked = lambda: 0
        now.s = 100.0
        self.finish(shown, 101)
        assert shown.figures() == "761/1,660 rows · 1 failed · 20.0 tokens/s · 0:14:50 left"
        assert (
            shown.summary()
            == "761 of 1,660 rows, 660 of them before · 1 failed · 2,000 tokens in 0:01:40 (20.0 tokens/s)"
        )
        assert shown.report("completed") == {
            "status": "completed",
            "request_counts": {"total": 1660, "completed": 760, "failed": 1},
            "n_before": 660,
            "usage": {"prompt_tokens": 300, "completion_tokens": 2000, "total_tokens": 2300},
            "elapsed_s": 100.0,
            "generation_tps": 20.0,
        }

    def test_rows_that_are_not_finished_count_in_the_time_left(self, now: SimpleNamespace) -> None:
        """Of many rows at once the first to finish is early: not all others take as long after one another."""
        shown = ProgressLine(102)
        now.s = 60.0
        self.finish(shown, 2)  # of 20 tokens in all, so 10 a row
        shown.n_picked = lambda: 280
        assert shown.figures() == "2/102 rows · 1 failed · 5.0 tokens/s · 0:02:24 left"
        shown = ProgressLine(10)
        self.finish(shown, 8)
        now.s = 120.0
        shown.n_picked = lambda: 280  # the longest come last: how long they will go on is not known
        assert shown.left_s == pytest.approx(60 * 1 / 9)

    def test_a_stream_has_no_end_in_sight(self, now: SimpleNamespace) -> None:
        shown = ProgressLine()
        now.s = 1.0
        self.finish(shown, 2)
        assert shown.figures() == "2 rows · 1 failed · 20.0 tokens/s"

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0:00:01"),
            (59.6, "0:01:00"),
            (599.6, "0:10:00"),
            (9000, "2:30:00"),
            (200_000, "2 days, 7:33:20"),
        ],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    def test_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm")
        shown = ProgressLine(4)
        with shown.shown(Screen()):
            self.finish(shown, 4)
            Screen().say("note: kept above")
        assert "4/4 rows · 1 failed" in terminal.getvalue()
        assert "note: kept above" in terminal.getvalue()
        assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")

    @pytest.mark.parametrize("width", [20, 80])
    def test_one_line_whatever_the_width(self, width: int) -> None:
        shown = ProgressLine(1000)
        self.finish(shown, 500)
        console = Console(file=io.StringIO(), width=width)
        console.print(shown._line())
        assert len(console.file.getvalue().splitlines()) == 1

    def test_a_line_each_minute_elsewhere(self, now: SimpleNamespace) -> None:
        lines: list[str] = []

        class Listening(Screen):
            def say(self, message: str) -> None:
                lines.append(message)

        shown = ProgressLine(9, 2, 0)
        with shown.shown(Listening()):
            self.finish(shown, 2)
            now.s = 61.0
            self.finish(shown, 2)
        assert lines == ["5/9 rows · 2 failed · 0.3 tokens/s · 0:01:21 left"]

    def test_json(self, run: Runner) -> None:
        write("in", prompts(10))
        report = json.loads(run(FakeLlama(), "in", "-o", "out", "--errors", "bad", "--json", "--quiet").stdout)
        assert report.pop("elapsed_s") >= 0
        assert report.pop("generation_tps") > 0
        assert report == {
            "status": "completed",
            "request_counts": {"total": 10, "completed": 8, "failed": 2},
            "n_before": 0,
            "usage": {"prompt_tokens": 176, "completion_tokens": 16, "total_tokens": 192},
            "output": str(Path("out").resolve()),
            "errors": str(Path("bad").resolve()),
        }
        result = run(Stopping(5, kill(signal.SIGINT)), "in", "-o", "-", "--json")
        *_, stopped, report = result.stderr.splitlines()
        assert stopped.startswith("stopped: ")
        assert "same command" not in stopped
        assert json.loads(report)["status"] == "interrupted"
        assert all(json.loads(line)["custom_id"] for line in result.stdout.splitlines())

    def test_quiet(self, run: Runner) -> None:
        write("in", prompts(4))
        assert run(FakeLlama(), "in", "-o", "out", "--quiet").stderr == ""
        Path("out").write_bytes(Path("out").read_bytes()[:-3])
        result = run(FakeLlama(), "in", "-o", "out", "--quiet")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
        assert len(answers("out")) == 4


def test_a_tiny_family_from_end_to_end(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 3}
    rows = [
        {"id": 30, "prompt": "one two"},
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"url": "/v1/completions", "body": {"prompt": "two", "edge_dlf": {"method": "large"}}},
        {"prompt": "one", "id": "odd", "temperature": "hot"},
        {"id": "long", "prompt": "one " * 200},
        "[",
        {"custom_id": "embedding", "url": "/v1/embeddings", "body": {}},
    ]
    write("in", rows)
    args = "--max-tokens 4 --ctx-size 128 --threads 1 --parallel 3 --seed 1 --temperature 1"
    contents = []
    for name in ("out", "again"):
        result = CliRunner().invoke(main, ["batch", "in", "-o", name, "-f", str(tiny), *args.split()])
        assert result.exit_code == 1, result.stderr
        contents.append(answers(name))
    first, second = contents
    assert {key: row["code"] for key, row in first.items() if isinstance(row, dict)} == {
        "odd": "invalid_request",
        "long": "context_length_exceeded",
        "line 6": "invalid_json",
        "embedding": "invalid_request",
    }
    assert first.keys() == {"30", "chat", "3", "odd", "long", "line 6", "embedding"}
    assert first == second
