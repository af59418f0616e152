"""The documents: links lead somewhere, commands take the options shown, named tests exist, the README is short."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest

from edge_dlf import FusedLlama
from edge_dlf.cli import main
from edge_dlf.server import Rules

from .http_server import serving

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "models" / "README.md"]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PYTHON = re.compile(r"^(<!-- [^\n]* -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, "with a server" in (comment or ""), id=f"{page.name}-{number}")
    for page in PAGES
    for number, (comment, code) in enumerate(PYTHON.findall(page.read_text("utf-8")))
]
ROWS = [{"prompt": f"What is {n} plus 40?", "answer": f"The answer is {n + 40}."} for n in range(30, 42)]
PLOTS = runpy.run_path(str(ROOT / "docs" / "plots.py"), run_name="plots")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls(text: str) -> Iterator[list[str]]:
    """The arguments of every call of edge-dlf in lines of shell, without what is piped into it or out of it."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if "edge-dlf " not in line or not line.startswith("$ "):
            continue
        lexer = shlex.shlex(line[2:], posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words = [*lexer, ";"]
        while words:
            end = next(n for n, word in enumerate(words) if set(word) <= set("|&;<>()"))
            call, words = words[:end], words[end + 1 :]
            if call[:1] == ["edge-dlf"]:
                yield call[1:]


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{link} leads nowhere"
            assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    group = click.Context(main, **main.context_settings)
    inline = [f"$ {span}" for span in re.findall(r"`(edge-dlf [^`]+)`", prose(page).replace("\n", " "))]
    for text in [*BLOCK.findall(page.read_text("utf-8")), *inline]:
        for name, *arguments in calls(text):
            assert name in main.commands, f"edge-dlf {name}"
            command = main.commands[name]
            try:
                _, left, _ = command.make_parser(click.Context(command, parent=group)).parse_args(arguments)
            except click.UsageError as error:
                pytest.fail(f"edge-dlf {name} {shlex.join(arguments)}: {error.format_message()}")
            assert not left, f"edge-dlf {name} {shlex.join(arguments)}: too many arguments"


@each_page
def test_programs_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for path in re.findall(r"\b(?:benchmarks|tests|edge_dlf|docs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for file in re.findall(r"`(?:tests/)?(test_\w+\.py)", text):
        assert (ROOT / "tests" / file).exists(), file
    for name in re.findall(r"::(test_\w+)", text):
        assert any(f"def {name}(" in file.read_text("utf-8") for file in ROOT.glob("tests/test_*.py")), name


def test_the_checks_see_what_is_wrong() -> None:
    assert [*calls("$ path=$(edge-dlf pull a/b:Q8_0) && edge-dlf chat x \\\n    --draft 4 | head  # and so on\n")] == [
        ["pull", "a/b:Q8_0"],
        ["chat", "x", "--draft", "4"],
    ]
    assert "what-does-edge-dlf-add-to-its-models" in anchors(ROOT / "docs" / "performance.md")


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("plot", PLOTS["PLOTS"], ids=lambda plot: plot.name)
def test_a_plot_shows_the_numbers_of_its_table(plot: Any) -> None:
    root = ElementTree.parse(PLOTS["path_of"](plot)).getroot()
    shown = {
        group.get("id"): "".join(group.itertext()).strip()
        for group in root.iter("{http://www.w3.org/2000/svg}g")
        if group.get("id", "").startswith("number-")
    }
    assert shown == plot.numbers(), "run `python docs/pictures.py`"
    texts = {"".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {row.label for row in plot.rows()} | {name for _, name, _ in plot.series} <= texts


@pytest.mark.parametrize(("code", "needs_server"), SNIPPETS)
def test_python_runs_as_it_stands(
    code: str, needs_server: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the family that ships in place of others, in a folder with the files that the documents name."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"id": str(number), "prompt": row["prompt"]} for number, row in enumerate(ROWS)]
    for name, rows in {"examples.jsonl": ROWS, "prompts.jsonl": prompts}.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = re.sub(r"qwen-family/|qwen2\.5-coder-gsm8k", "demo", code)
    if "langchain" in code:
        pytest.importorskip("langchain_openai")
    with ExitStack() as stack:
        if needs_server:
            llm = stack.enter_context(FusedLlama.from_family("demo", n_ctx=512, n_threads=1))
            server = stack.enter_context(serving(llm, Rules({})))
            code = code.replace("http://127.0.0.1:8080", str(server.base_url).rstrip("/"))
        exec(compile(code, "the snippet", "exec"), {"__name__": "snippet"})
    printed = capsys.readouterr().out
    assert printed.strip()
    assert "rows failed" not in printed or "0 rows failed" in printed
