"""The code blocks of the documents: commands run as they stand, on the family that ships, and print what is shown.

A command that a test cannot run is in `NOT_RUN` with the reason. Where one block holds for another machine, a comment
`<!-- not run: reason -->` stands above it. What is not run is still read by a shell, and its arguments by the program
that would get them. A `…` in a block stands for anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pytest
import yaml

from edge_dlf import FusedLlama
from edge_dlf.answers.requests import parse_line
from edge_dlf.cli import main
from edge_dlf.evidence.examples import read_rows
from edge_dlf.families.spec import FamilySpec
from edge_dlf.server import Rules

from .http_server import serving

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "models" / "README.md"]
FENCED = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NOT_RUN = {
    r"(CMAKE_ARGS=.*)?(pip|pipx|uv tool) (un)?install |python3 -m venv ": "it changes what is installed",
    r"edge-dlf new .*\$\(edge-dlf pull": "it downloads models; test_hub.py pulls from a hub of its own",
    r"(path=\$\()?edge-dlf pull ": "it downloads models; test_hub.py pulls from a hub of its own",
    r"edge-dlf serve ": "it ends when it is stopped; test_serve_cli.py starts and stops it",
    r"edge-dlf train ": "it needs torch; test_train.py trains",
    r"edge-dlf eval |python -m edge_dlf\.harness ": "it needs lm_eval; test_evaluate.py evaluates",
    r"edge-dlf batch .* --ray": "it needs Ray; test_ray.py runs it",
    r"(for .*; do )?(python|torchrun) .*(benchmarks/|-m tests\.|-m models\.)": "it measures or trains for minutes",
    r"python convert_(hf|lora)_to_gguf\.py ": "it is a program of llama.cpp",
    r"cat \w+\.yaml": "it shows a file of the reader's own, for lm_eval",
    r"\.ci/run": "it runs this test",
}
RECORDED = (
    "apt-get",
    "edge-dlf",
    "python",
    "python3",
    "pip",
    "pipx",
    "uv",
    "torchrun",
    "cat",
    "tar",
    "cmake",
    ".ci/run",
    "pytest",
)
"""Programs that only note their arguments, each call in a file of its own, where a command is not run."""
INSTALLERS = ("apt-get", "pip", "pipx", "uv")
"""Programs that no test may run: they are not there where commands are run."""
RECORDER = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" > "$(mktemp "$RECORD/XXXXXX")"
echo large.gguf  # for a command around this one
"""


@dataclass(frozen=True)
class Block:
    """A block of commands. shown: each command, and what it is shown to print. comment: what stands above it."""

    comment: str
    shown: tuple[tuple[str, str], ...]

    @property
    def kept_back(self) -> str:
        return self.comment.partition("not run: ")[2]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block as a shell reads it, and the lines below it, which it prints."""
    command, printed = "", ""
    for line in text.splitlines(keepends=True):
        if command and is_unfinished(command):
            command += line
        elif line.startswith("$ "):
            if command:
                yield command, printed
            command, printed = line[2:], ""
        else:
            printed += line
    yield command, printed


def is_unfinished(command: str) -> bool:
    """Whether a shell would ask for more lines."""
    if here := re.search(r"<<'(\w+)'", command):
        return not re.search(rf"^{here[1]}$", command, re.MULTILINE)
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return command.endswith("\\\n")


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    for comment, language, text in FENCED.findall(page.read_text("utf-8")):
        if language in languages:
            yield comment, text


SESSIONS = [
    pytest.param(Block(comment, tuple(commands(text))), id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, (comment, text) in enumerate(blocks(page, "console", "text"))
    if text.startswith("$ ") and not text.partition("\n")[0].endswith("--help")  # test_cli.py compares the help
]


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command, re.DOTALL)), None)


@pytest.fixture
def desk(tmp_path: Path, block: Block) -> Path:
    """A folder with the files and families that the block names, made of the family that ships."""
    text = "".join(command for command, _ in block.shown)
    models = {"large": "large", "base": "base", "small": "base", "maths": "base", "law-lora": "sums"}
    for name, source in (models | {"tickets": "legs", "banking77-lora": "legs"}).items():
        shutil.copyfile(next(DEMO.glob(f"{source}-*.gguf")), tmp_path / f"{name}.gguf")
    for name in {*re.findall(r"(?<= )(?!models/|results/)([\w-]+)/(?=\s)|\b(FAMILY)\b", text)}:
        shutil.copytree(DEMO, tmp_path / "".join(name))
    shutil.copytree(DEMO, tmp_path / "home" / "qwen2.5-1.5b-coder")
    rows = [{"prompt": f"What is {n} plus 40?", "answer": f"The answer is {n + 40}."} for n in range(30, 38)]
    shaped = {
        "prompts": [{"id": str(number), "prompt": row["prompt"]} for number, row in enumerate(rows)],
        "test": [{"question": row["prompt"], "answer": f"So it is. #### {row['answer'][14:-1]}"} for row in rows],
    }
    written = {*re.findall(r"(?:-o|>|--trace) ([\w-]+)\.jsonl", text)}
    for name in {*re.findall(r"(?<![\w-])([\w-]+)\.jsonl", text)} - written:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shaped.get(name, rows)))
    for name in re.findall(r"< (\w+\.txt)", text):
        (tmp_path / name).write_text("What is 35 plus 40?\n")
    (tmp_path / "banking77_train.csv").write_text("text,category\n" + "".join(f"Why {n}?,why\n" for n in range(1200)))
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    return tmp_path


def replaced(desk: Path, programs: Sequence[str], script: str) -> None:
    """Let a script take the place of programs in this folder's shell."""
    for name in programs:
        program = desk / name if "/" in name else desk / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(script)
        program.chmod(0o755)


def in_shell(desk: Path, lines: list[str]) -> list[str]:
    """Run each command in turn in one shell, as a reader would. Returns what each printed on stdout."""
    folders = [desk / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(map(str, folders)),
        "EDGE_DLF_MODELS": str(desk / "home"),
        "XDG_DATA_HOME": str(desk / "data"),
        "XDG_STATE_HOME": str(desk / "state"),
        "RECORD": str(desk / "record"),
        "PYTHONPATH": str(ROOT),
    }
    mark = "----------------"
    script = "".join(f"{line.rstrip()}\necho; echo {mark}\n" for line in lines)
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", f"{script}wait\n"],
        cwd=desk,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout.split(f"\n{mark}\n")


def prints(shown: str, printed: str) -> bool:
    """Whether a command printed what is shown, but for white space; `…` stands for anything. A long line of output may
    be shown as several lines."""
    parts = re.findall(r"…|\s+|[^…\s]+", shown.strip())
    matches = {"…": ".*?", " ": r"\s+"}
    pattern = "".join(r"\s*" if "\n" in part else matches.get(part[0], re.escape(part)) for part in parts)
    return re.search(pattern, printed, re.DOTALL) is not None


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("block", SESSIONS)
def test_commands_run_as_they_stand(block: Block, desk: Path) -> None:
    run = [pair for pair in block.shown if not block.kept_back and not reason(pair[0])]
    lines = [command for command, _ in run]
    replaced(desk, INSTALLERS, "exit 1")
    if "curl" in " ".join(lines):
        assert block.comment == "run with a server"
        if not shutil.which("curl"):
            pytest.skip("needs curl")
        with FusedLlama.from_family("demo", n_ctx=512, n_threads=1) as llm, serving(llm, Rules({})) as server:
            address = str(server.base_url).rstrip("/")
            outputs = in_shell(desk, [line.replace("http://127.0.0.1:8080", address) for line in lines])
    else:
        outputs = in_shell(desk, lines) if run else []
    for (command, shown), printed in zip(run, outputs, strict=False):
        assert prints(shown, printed), f"$ {command}{printed}"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("block", SESSIONS)
def test_commands_that_are_not_run_would_be_understood(block: Block, desk: Path, monkeypatch: Any) -> None:
    lines = [command for command, _ in block.shown if block.kept_back or reason(command)]
    record = desk / "record"
    record.mkdir()
    replaced(desk, RECORDED, RECORDER)
    in_shell(desk, lines)
    monkeypatch.chdir(desk)
    monkeypatch.setenv("EDGE_DLF_MODELS", str(desk / "home"))
    called = [call.read_text().split("\0")[:-1] for call in record.iterdir()]
    assert len(called) >= len(lines)
    for program, *arguments in called:
        understand(program, arguments)


def understand(program: str, arguments: list[str]) -> None:
    """Let the program read its arguments, and do nothing."""
    if program == "edge-dlf":
        command = main.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:], click.Context(main, **main.context_settings)).close()
    elif "install" in arguments:
        extras = re.findall(r"\[(\w+)\]", " ".join(arguments))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        assert {*extras} <= {*project["optional-dependencies"]}
        for version in re.findall(r"llama-cpp-python(==\S+)", " ".join(arguments)):
            assert f"llama-cpp-python{version}" in project["dependencies"]
    elif "models.recipe" in arguments:
        recipe = pytest.importorskip("models.recipe.__main__", reason="needs the extra recipe")
        recipe.main.make_context("recipe", arguments[arguments.index("models.recipe") + 1 :])
    elif found := [argument for argument in arguments if argument.startswith(("benchmarks/", "tests."))]:
        parse(found[0], arguments[arguments.index(found[0]) + 1 :])


class ParsedError(Exception):
    pass


def parse(program: str, arguments: list[str]) -> None:
    """Start a program of this repository up to where it has read its arguments."""
    read = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, given: Any = None) -> None:
        read(self, arguments if given is None else given)
        raise ParsedError

    with patch.object(argparse.ArgumentParser, "parse_args", parsed), pytest.raises(ParsedError):
        start(program)


def start(program: str) -> None:
    try:
        if program.endswith(".py"):
            with patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
                runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            importlib.import_module(program).main()
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")


def test_every_reason_is_needed() -> None:
    every = [command for session in SESSIONS for command, _ in session.values[0].shown]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in every), pattern


FILES = [
    pytest.param(language, text, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, (_, language, text) in enumerate(FENCED.findall(page.read_text("utf-8")))
    if language in ("json", "toml", "yaml")
]
HEAD = """name = "mine"
large.path = "large.gguf"
base.path = "base.gguf"
[[experts]]
name = "law"
path = "law.gguf"
"""


@pytest.mark.parametrize(("language", "text"), FILES)
def test_files_are_read_as_they_stand(language: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / f"shown.{language}"
    if language == "toml":
        file.write_text(text if "[large]" in text else HEAD + text, "utf-8")
        assert FamilySpec.load(file).experts
    elif language == "yaml":
        assert {"task", "dataset_path", "output_type", "doc_to_text", "metric_list"} <= {*yaml.safe_load(text)}
    elif '"answer"' in text:
        file.write_text(text, "utf-8")
        assert len([*read_rows(file)]) == text.count("\n")
    else:
        for line in text.splitlines():
            row = json.loads(line.replace("{…}", "{}"))
            if "response" not in row:
                parse_line(row)


def test_every_other_block_says_why_it_is_not_run() -> None:
    known = ("console", "python", "json", "toml", "yaml", "text")  # a text that begins with `$` is run as well
    for page in PAGES:
        for comment, language, text in FENCED.findall(page.read_text("utf-8")):
            assert language in known or "not run: " in comment, f"{page}: {text}"
