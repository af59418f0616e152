"""The documents: links lead somewhere, commands take the options shown, named tests exist, the README is short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edge_dlf.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "models" / "README.md"]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

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
