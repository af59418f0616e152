"""Write what `edge-dlf … --help` prints into the blocks of README.md and docs/*.md that begin with that command."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from edge_dlf.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
_BLOCK = re.compile(r"^\$ edge-dlf ([^\n]*--help)\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)


def updated(page: str) -> str:
    """The page with every block as the command prints it now."""
    return _BLOCK.sub(lambda match: f"$ edge-dlf {match[1]}\n{_printed(match[1].split())}", page)


def _printed(arguments: list[str]) -> str:
    return CliRunner().invoke(main, arguments, prog_name="edge-dlf", terminal_width=100).stdout


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text("utf-8")), "utf-8")
