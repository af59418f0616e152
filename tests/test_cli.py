"""The commands `generate` and `compare`, their options, and what every command has in common."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_dlf import DecodeError, FusedLlama, ModelFileError, SamplingParams, VocabMismatchError, __version__
from edge_dlf.cli import main
from edge_dlf.cli.compare import Answer, show_columns
from edge_dlf.cli.options import Options
from edge_dlf.families import spec
from edge_dlf.families.spec import ModelSource
from edge_dlf.gguf import info

from .fake_llm import FakeLlama

FILES = ["--large", "l.gguf", "--base", "b.gguf", "--expert", "math=e.gguf"]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("EDGE_DLF_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `edge-dlf` on a fake family; `llm` may be what is raised while it is loaded."""

    def run(llm: FakeLlama | BaseException, *args: str, stdin: str | bytes | None = None) -> Result:
        def load(options: Options) -> FakeLlama:
            if isinstance(llm, BaseException):
                raise llm
            llm.options = options
            return llm

        monkeypatch.setattr(Options, "load", load)
        return CliRunner().invoke(main, args, input=stdin)

    return run


@pytest.fixture
def family(tmp_path: Path) -> Path:
    (tmp_path / "family.toml").write_text(
        'name = "small"\nlarge.path = "l.gguf"\nbase.path = "b.gguf"\nexperts = [{name = "math", path = "e.gguf"}]\n'
        "[defaults]\ntemperature = 0.25\n"
    )
    return tmp_path


class TestGenerate:
    def test_streams_the_answer_to_stdout(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama(["Hel", "lo"])
        result = run(llm, "generate", *FILES, "Hi")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")
        assert llm.requests == [("user: Hi\n", {})]
        assert llm.is_closed

    def test_ends_with_one_line_break(self, run: Callable[..., Result]) -> None:
        assert run(FakeLlama(["a\n"]), "generate", *FILES, "Hi").stdout == "a\n"

    def test_raw_takes_the_prompt_as_it_is(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama()
        run(llm, "generate", *FILES, "--raw", "Hi")
        assert llm.requests == [("Hi", {})]

    def test_system_prompt(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama()
        run(llm, "generate", *FILES, "--system", "Be brief.", "Hi")
        assert llm.requests[0][0] == "system: Be brief.\nuser: Hi\n"

    @pytest.mark.parametrize("args", [["-"], []])
    def test_reads_stdin_without_its_last_line_break(self, run: Callable[..., Result], args: list[str]) -> None:
        llm = FakeLlama()
        run(llm, "generate", *FILES, *args, stdin="two\nlines\n")
        assert llm.requests[0][0] == "user: two\nlines\n"

    def test_bytes_that_are_not_utf8_survive(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama()
        run(llm, "generate", *FILES, "--raw", stdin=b"a\xff\xfeb")
        assert llm.requests[0][0].encode("utf-8", "surrogateescape") == b"a\xff\xfeb"

    def test_an_argument_leaves_stdin_alone(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama()
        run(llm, "generate", *FILES, "Hi", stdin="not read")
        assert llm.requests[0][0] == "user: Hi\n"

    @pytest.mark.parametrize(("args", "kind"), [([], "chat.completion"), (["--raw"], "text_completion")])
    def test_json_is_one_object(self, run: Callable[..., Result], args: list[str], kind: str) -> None:
        result = run(FakeLlama(["Hé", "!"]), "generate", *FILES, "--json", *args, "Hi")
        answer = json.loads(result.stdout)
        assert answer["object"] == kind
        assert answer["usage"]["completion_tokens"] == 2
        assert "Hé!" in result.stdout

    def test_says_when_the_context_cut_the_answer_short(self, run: Callable[..., Result]) -> None:
        result = run(FakeLlama(["x"] * 99, n_ctx=12), "generate", *FILES, "Hi")
        assert result.stdout == "xxx\n"
        assert result.stderr == "note: cut short: the context of 12 tokens is full\n"

    def test_ctrl_c_keeps_what_has_come(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama(["par", KeyboardInterrupt()])
        result = run(llm, "generate", *FILES, "Hi")
        assert (result.exit_code, result.stdout, result.stderr) == (130, "par\n", "")
        assert llm.is_closed

    def test_sigterm(self, run: Callable[..., Result]) -> None:
        class Terminating(FakeLlama):
            def apply_chat_template(self, messages: Any, think: str = "auto") -> list[int]:
                os.kill(os.getpid(), signal.SIGTERM)
                return super().apply_chat_template(messages, think)

        before = signal.getsignal(signal.SIGTERM)
        llm = Terminating()
        assert run(llm, "generate", *FILES, "Hi").exit_code == 143
        assert llm.is_closed
        assert signal.getsignal(signal.SIGTERM) == before

    def test_a_reader_that_leaves_is_no_error_message(self, run: Callable[..., Result]) -> None:
        result = run(FakeLlama([BrokenPipeError(32, "Broken pipe")]), "generate", *FILES, "Hi")
        assert result.stderr == ""


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (ModelFileError("x.gguf", "no such file"), 3, "edge-dlf: x.gguf: no such file\n"),
            (VocabMismatchError("a and b\x1b\ndiffer"), 3, "edge-dlf: a and b\ufffd differ\n"),
            (MemoryError(), 4, "edge-dlf: not enough memory\n"),
            (KeyboardInterrupt(), 130, ""),
        ],
    )
    def test_while_loading(self, run: Callable[..., Result], error: BaseException, code: int, line: str) -> None:
        for command in (["generate", "Hi"], ["compare", "Hi"], ["chat"]):
            result = run(error, *command, *FILES)
            assert (result.exit_code, result.stdout, result.stderr) == (code, "", line)

    def test_within_an_answer(self, run: Callable[..., Result]) -> None:
        result = run(FakeLlama(["par", DecodeError("large failed")]), "generate", *FILES, "Hi")
        assert (result.exit_code, result.stdout, result.stderr) == (1, "par\n", "edge-dlf: large failed\n")

    def test_a_prompt_beyond_the_context(self, run: Callable[..., Result]) -> None:
        result = run(FakeLlama(n_ctx=8), "generate", *FILES, "a long prompt")
        assert result.exit_code == 4
        assert "edge-dlf: the prompt has 20 tokens" in result.stderr

    def test_a_bug_keeps_its_traceback(self, run: Callable[..., Result]) -> None:
        assert isinstance(run(ZeroDivisionError(), "generate", *FILES, "Hi").exception, ZeroDivisionError)

    def test_notices_of_the_library(self, run: Callable[..., Result]) -> None:
        class Noticing(FakeLlama):
            def apply_chat_template(self, messages: Any, think: str = "auto") -> list[int]:
                logging.getLogger("edge_dlf.llama").warning("slow %s", "build")
                return super().apply_chat_template(messages, think)

        assert run(Noticing(), "generate", *FILES, "Hi").stderr == "note: slow build\n"
        assert not logging.getLogger("edge_dlf").handlers

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ([*FILES, "--family", "x", "Hi"], "both by --family and by --large, --base and --expert"),
            (["--large", "l.gguf", "Hi"], "--base is missing"),
            ([*FILES, "--expert", "math=f.gguf", "Hi"], "two experts have the same name"),
            ([*FILES, "--expert", "large=f.gguf", "Hi"], "'large'"),
            ([*FILES, "--expert", "f.gguf", "Hi"], "expected NAME=FILE"),
            ([*FILES, "--temperature", "-1", "Hi"], "temperature must be 0 or more"),
            ([*FILES, "--temperature", "hot", "Hi"], "--temperature must be a finite number, not 'hot'"),
            (
                [*FILES, "--method", "magic", "Hi"],
                "method must be one of dynamic, static, blend, weighted, large, base, math",
            ),
            ([*FILES, "--alpha", "code=1", "Hi"], "alpha names 'code'"),
            ([*FILES, "--alpha", "much", "Hi"], "--alpha must be a finite number or NAME=NUMBER,…, not 'much'"),
            ([*FILES, "--weights", "0.5", "Hi"], "--weights must be NAME=NUMBER,…, not 0.5"),
            ([*FILES, "--weights", "code=1", "Hi"], "weights names 'code'; the members are large, base, math"),
            ([*FILES, "--weights", "large=0", "Hi"], "weights must give a member a number other than 0"),
            ([*FILES, "--method", "weighted", "Hi"], "method weighted needs weights of members, such as large=0.5"),
            ([*FILES, "--gpu-layers", "1.5", "Hi"], "--gpu-layers must be an integer or NAME=NUMBER,…"),
            ([*FILES, "--main-gpu", "one", "Hi"], "--main-gpu must be an integer"),
            ([*FILES, "--tensor-split", "3;1", "Hi"], "expected numbers with commas between them"),
            ([*FILES, "--search", "none", "Hi"], "'grid', 'exact'"),
            ([*FILES, "--max-tokens", "0", "Hi"], "--max-tokens must be 1 or more, not 0"),
            ([*FILES, "--draft", "9", "Hi"], "--draft must be auto, off or 0 to 8, not 9"),
            ([*FILES, "--stop", "", "Hi"], "a stop string must not be empty"),
            ([*FILES, "--raw", "--system", "x", "Hi"], "leave out --raw or --system"),
        ],
    )
    def test_usage(self, run: Callable[..., Result], args: list[str], words: str) -> None:
        result = run(FakeLlama(), "generate", *args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr


class TestOptions:
    def test_weights_may_be_the_family_s(self, run: Callable[..., Result], family: Path) -> None:
        toml, llm = family / "family.toml", FakeLlama()
        toml.write_text(toml.read_text() + "weights = {large = 0.5, math = 0.5}\n")
        result = run(llm, "generate", "--family", str(family), "--method", "weighted", "Hi")
        assert result.exit_code == 0, result.stderr
        assert llm.requests[0][1] == {"method": "weighted"}

    def test_only_what_is_given_is_passed_on(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama()
        run(llm, "generate", *FILES, "Hi")
        assert llm.options
        assert (llm.options.loading, llm.requests[0][1]) == ({}, {})

    def test_all_that_is_given_is_passed_on(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama()
        settings = "--method static --search exact --alpha math=0.5 --max-tokens 9 --temperature 0 --top-k 0 --top-p 1"
        more = "--weights large=0.54,base=-0.37,math=0.8 --min-p 0 --repeat-penalty 1.1 --seed 0 --stop END --stop ."
        loading = "--ctx-size 99 --gpu-layers large=20,base=-1 --threads 3 --cache-type-k q8_0 --cache-type-v f16"
        loading += " --main-gpu base=1 --tensor-split 3,1 --overlap threads"
        result = run(llm, "generate", *FILES, *f"{settings} {more} {loading}".split(), "Hi")
        assert result.exit_code == 0, result.stderr
        assert llm.requests[0][1] == {
            "method": "static",
            "search": "exact",
            "alpha": {"math": 0.5},
            "weights": {"large": 0.54, "base": -0.37, "math": 0.8},
            "max_tokens": 9,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.1,
            "seed": 0,
            "stop": ("END", "."),
        }
        assert llm.options
        assert llm.options.loading == {
            "n_ctx": 99,
            "n_gpu_layers": {"large": 20, "base": -1},
            "main_gpu": {"base": 1},
            "tensor_split": [3.0, 1.0],
            "overlap": "threads",
            "n_threads": 3,
            "type_k": "q8_0",
            "type_v": "f16",
        }

    def test_environment_serves_every_command(
        self, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = {
            "LARGE": "l",
            "BASE": "b",
            "EXPERT": "a=1:b=2 3",
            "TEMPERATURE": "0.5",
            "STOP": "a b",
            "CTX_SIZE": "77",
        }
        for name, value in values.items():
            monkeypatch.setenv(f"EDGE_DLF_{name}", value)
        for args in (["generate", "Hi"], ["compare", "Hi"], ["chat"]):
            llm = FakeLlama(experts=["a", "b"])
            assert run(llm, *args, stdin="Hi\n").exit_code == 0
            assert llm.options
            assert {role: source for role, source, _ in llm.options.spec.members[2:]} == {
                "a": ModelSource(Path("1")),
                "b": ModelSource(Path("2 3")),
            }
            assert llm.options.loading == {"n_ctx": 77}
            assert llm.requests[0][1].items() >= {"temperature": 0.5, "stop": ("a b",)}.items()

    def test_what_is_typed_goes_before_the_environment(
        self, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, family: Path
    ) -> None:
        monkeypatch.setenv("EDGE_DLF_FAMILY", "elsewhere")
        monkeypatch.setenv("EDGE_DLF_SEED", "1")
        for args in (["generate", *FILES, "Hi"], ["chat", str(family)], ["chat", "-f", str(family)]):
            llm = FakeLlama()
            result = run(llm, *args, "--seed", "2", stdin="Hi\n")
            assert result.exit_code == 0, result.stderr
            assert llm.requests[0][1] == {"seed": 2}

    @pytest.mark.parametrize(
        ("args", "stdin"),
        [
            (["generate", "--max-tokens", "2", "Hi"], None),
            (["chat", "--max-tokens", "2"], "Hi\n"),
            (["compare", "--max-tokens", "2", "Hi"], None),
            (["batch", "in", "-o", "out"], None),
        ],
    )
    def test_a_family_is_read_once(
        self, monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path, args: list[str], stdin: str | None
    ) -> None:
        """The command and what it loads share one reading of family.toml and of every header, LoRA adapters too."""
        read = []

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Path, *more: Any) -> Any:
                read.append(path.name)
                return function(path, *more)

            return call

        for module, name in ((info, "read_header"), (spec, "read_toml")):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
        monkeypatch.chdir(tmp_path)
        Path("in").write_text('{"prompt": "Hi", "max_tokens": 2}\n')
        result = CliRunner().invoke(main, [*args, "-f", str(tiny), "--ctx-size", "128", "--threads", "1"], input=stdin)
        assert result.exit_code == 0, result.stderr
        assert sorted(read) == ["base.gguf", "family.toml", "large.gguf", "lora.gguf", "tuned.gguf"]

    def test_a_family_that_is_not_there(self, run: Callable[..., Result], tmp_path: Path) -> None:
        result = run(FakeLlama(), "generate", "-f", str(tmp_path / "none"), "Hi")
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1


def test_without_a_family_the_one_that_ships(
    run: Callable[..., Result], family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = family / "shipped"
    (shipped / "demo").mkdir(parents=True)
    (shipped / "demo" / "family.toml").write_text((family / "family.toml").read_text())
    for module in ("cli.options", "families.spec"):
        monkeypatch.setattr(f"edge_dlf.{module}.shipped_dir", lambda: shipped)
    llm = FakeLlama(["ok"])
    result = run(llm, "generate", "Hi")
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    assert result.stderr == "no family is named: this is small, the small one that ships with edge-dlf\n"
    assert llm.options
    assert llm.options.family == "demo"


class TestCompare:
    def test_each_method_in_turn(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama(["A"], ["B"], [("C", 1.0), ("C", 1.0)], ["F"], [("D", 0.5), "D"])
        result = run(llm, "compare", *FILES, "--top-k", "3", "Hi")
        assert result.exit_code == 0
        assert result.stdout == (
            "== large\nA\n[]\n\n== math\nB\n[]\n\n"
            "== static\nCC\n[10.0 tokens/s · mean α 1.00 · math 100%]\n\n"
            "== blend\nF\n[]\n\n"
            "== dynamic\nDD\n[10.0 tokens/s · mean α 0.25 · math 50%]\n"
        )
        seeds = {settings.pop("seed") for _, settings in llm.requests}
        assert len(seeds) == 1  # all methods draw with the same noise
        assert [settings for _, settings in llm.requests] == [
            {"top_k": 3, "method": method} for method in ("large", "math", "static", "blend", "dynamic")
        ]

    @pytest.mark.parametrize("by_family", [True, False])
    def test_weighted_where_there_are_weights(self, run: Callable[..., Result], family: Path, by_family: bool) -> None:
        toml, args = family / "family.toml", ["--weights", "large=0.5,math=0.5"]
        if by_family:
            toml.write_text(toml.read_text() + 'method = "weighted"\nweights = {large = 0.5, math = 0.5}\n')
            args = []
        llm = FakeLlama(["A"], ["B"], [("C", 1.0)], ["F"], [("E", 0.5)], [("D", 0.5)])
        result = run(llm, "compare", "--family", str(family), *args, "Hi")
        assert "== static\nC\n" in result.stdout
        assert "== weighted\nE\n[mean α 0.50 · math 100%]\n\n== dynamic\nD\n" in result.stdout
        methods = [settings["method"] for _, settings in llm.requests]
        assert methods == ["large", "math", "static", "blend", "weighted", "dynamic"]

    def test_json(self, run: Callable[..., Result]) -> None:
        llm = FakeLlama(["A"], ["B"], ["C"], ["F"], ["D"])
        answers = json.loads(run(llm, "compare", *FILES, "--raw", "--json", "Hi").stdout)
        assert {method: answer["choices"][0]["text"] for method, answer in answers.items()} == {
            "large": "A",
            "math": "B",
            "static": "C",
            "blend": "F",
            "dynamic": "D",
        }

    def test_without_a_prompt_the_examples(self, run: Callable[..., Result], family: Path) -> None:
        toml = family / "family.toml"
        toml.write_text('examples = ["One?", "Two?"]\n' + toml.read_text())
        answers = [["A"], ["B"], ["C\n"], ["I"], ["D"], ["E"], ["F"], ["G"], ["J"], ["H"]]
        llm = FakeLlama(*answers)
        result = run(llm, "compare", "--family", str(family), stdin="")
        assert [prompt for prompt, _ in llm.requests] == ["user: One?\n"] * 5 + ["user: Two?\n"] * 5
        assert result.stdout == (
            "> One?\n  large    A\n  math     B\n  static   C\n  blend    I\n  dynamic  D\n\n"
            "> Two?\n  large    E\n  math     F\n  static   G\n  blend    J\n  dynamic  H\n\n"
        )
        both = json.loads(run(FakeLlama(*answers), "compare", "--json", "--family", str(family), stdin="").stdout)
        assert both["Two?"]["dynamic"]["choices"][0]["message"]["content"] == "H"

    def test_a_prompt_leaves_the_examples_alone(self, run: Callable[..., Result], family: Path) -> None:
        toml = family / "family.toml"
        toml.write_text('examples = ["One?"]\n' + toml.read_text())
        llm = FakeLlama()
        run(llm, "compare", "--family", str(family), stdin="Hi\n")
        assert {prompt for prompt, _ in llm.requests} == {"user: Hi\n"}

    def test_ctrl_c_keeps_what_has_come(self, run: Callable[..., Result]) -> None:
        result = run(FakeLlama(["A"], ["B", KeyboardInterrupt()]), "compare", *FILES, "Hi")
        assert (result.exit_code, result.stdout) == (130, "== large\nA\n[]\n\n== math\nB\n")

    def test_side_by_side(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        first, second = Answer("large", "one\x1b[31m [b]two[/b]"), Answer("dynamic", "three")
        show_columns([first, second], iter(()))
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["large", "dynamic"] in lines
        assert ["one\ufffd[31m", "[b]two[/b]", "three"] in lines


def test_version() -> None:
    printed = CliRunner().invoke(main, ["--version"]).stdout
    assert re.fullmatch(rf"edge-dlf {__version__}, llama-cpp-python [\d.]+, ggml [\d.]+ \([0-9a-f]+\)\n", printed)


def test_without_a_command_there_are_three_things_to_try() -> None:
    shown = CliRunner().invoke(main, []).output
    assert "Three things to try: edge-dlf compare, edge-dlf chat demo, edge-dlf list." in shown
    assert all(f"  {name} " in shown for name in main.commands)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_the_shell_takes(shell: str) -> None:
    script = CliRunner().invoke(main, ["completion", shell]).stdout
    assert "_EDGE_DLF_COMPLETE" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)
    position = "comp" if shell == "fish" else "1"
    asked = {"COMP_WORDS": "edge-dlf comp", "COMP_CWORD": position, "_EDGE_DLF_COMPLETE": f"{shell}_complete"}
    found = CliRunner().invoke(main, [], prog_name="edge-dlf", env=asked).stdout
    assert "compare" in found
    assert "chat" not in found


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    result = CliRunner().invoke(main, ["list"])
    assert result.exit_code == 3
    assert result.stderr.startswith("edge-dlf: edge-dlf runs on Linux and macOS; on Windows, run it in WSL: https://")
    assert result.stderr.count("\n") == 1


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "edge_dlf", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"edge-dlf {__version__}, ")


def test_help_tells_the_defaults_of_params() -> None:
    text = CliRunner().invoke(main, ["generate", "--help"]).stdout
    assert f"0 takes the most likely token. [{SamplingParams.temperature}]" in text


def test_help_tells_the_defaults_of_loading() -> None:
    text = CliRunner().invoke(main, ["generate", "--help"], terminal_width=100).stdout
    defaults = inspect.signature(FusedLlama).parameters
    assert f"Tokens of the context [{defaults['n_ctx'].default}];" in text
    assert f"Layers on the GPU [{defaults['n_gpu_layers'].default}, all]" in text


def test_help_in_the_docs_is_what_the_commands_print() -> None:
    update = runpy.run_path(str(DOCS / "update.py"))
    for path in update["PAGES"]:
        page = path.read_text("utf-8")
        # How lines are wrapped depends on click's version.
        assert page.split() == update["updated"](page).split(), "run `python docs/update.py`"


def test_a_second_ctrl_c_leaves_at_once() -> None:
    # The main thread is in one long call into C, during which Python runs no signal handler.
    program = """
import hashlib, os, signal, threading
from edge_dlf.cli.interrupts import interruptible
from edge_dlf.cli.screen import Screen
def press():
    while True:
        os.kill(os.getpid(), signal.SIGINT)
with interruptible(Screen(), lambda: None):
    threading.Thread(target=press, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60).returncode == 130


def test_a_tiny_family_from_end_to_end(tiny: Path) -> None:
    args = ["generate", "-f", str(tiny), "--raw", "--json", "--max-tokens", "3", "--ctx-size", "64", "--threads", "1"]
    result = CliRunner().invoke(main, [*args, "one two"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--timeout", "nan"], ["serve", "--timeout", "-inf"], ["serve", "--timeout", "0"],
        ["train", "b", "d", "-o", "o", "--lr", "nan"], ["train", "b", "d", "-o", "o", "--lr", "inf"],
        ["train", "b", "d", "-o", "o", "--alpha", "NaN"], ["train", "b", "d", "-o", "o", "--seed", str(2**64)],
    ],
)  # fmt: skip
def test_a_number_that_no_work_can_be_done_with_is_refused_with_its_option(arguments: list[str]) -> None:
    found = CliRunner().invoke(main, arguments)
    assert (found.exit_code, found.stdout) == (2, "")
    assert f"{arguments[-2]} must be" in found.stderr
    assert found.stderr.count("\n") == 1
