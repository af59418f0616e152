"""Write what is generated in README.md and docs/*.md: what `edge-dlf … --help` prints, and the tables of settings and
families."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from edge_dlf.cli import main
from edge_dlf.cli.opening import size
from edge_dlf.cli.screen import show
from edge_dlf.families.catalogue import read_catalogue
from edge_dlf.params import SETTINGS, Setting, Text

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
_BLOCK = re.compile(r"^\$ edge-dlf ([^\n]*--help)\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)
_TABLE = re.compile(r"(<!-- (settings|catalogue) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_PLACES = ("command line", "chat", "family", "body", "edge_dlf", "eval")


def updated(page: str) -> str:
    """The page with every block as the command prints it now."""
    page = _TABLE.sub(lambda match: match[1] + (_settings() if match[2] == "settings" else _catalogue()), page)
    return _BLOCK.sub(lambda match: f"$ edge-dlf {match[1]}\n{_printed(match[1].split())}", page)


def _printed(arguments: list[str]) -> str:
    return CliRunner().invoke(main, arguments, prog_name="edge-dlf", terminal_width=100).stdout


def _catalogue() -> str:
    heads = "family", "good at", "experts", "download", "memory", "licences", "verified"
    lines = [heads, ("---",) * len(heads)]
    for name, entry in read_catalogue().items():
        experts = ", ".join(expert.name for expert in entry.spec.experts)
        sizes = size(entry.download_bytes), size(entry.memory_bytes)
        lines.append((f"`{name}`", entry.good_at, experts, *sizes, entry.license, entry.sure))
    return _markdown(lines)


def _settings() -> str:
    heads = (
        "setting",
        "values",
        "default",
        "what it does",
        "option",
        "`/set`",
        "family",
        "request",
        "edge_dlf",
        "eval",
    )
    lines = [heads, ("---",) * len(heads), *(_row(setting) for setting in SETTINGS.values())]
    return _markdown(lines)


def _markdown(lines: list[tuple[str, ...]]) -> str:
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _row(setting: Setting) -> tuple[str, ...]:
    kind = setting.kind
    values = ", ".join(kind.choices) if isinstance(kind, Text) and kind.choices else getattr(kind, "range", kind.name)
    values = values.replace("|", " or ").replace("-inf or more", "number")
    default = "" if setting.default is None else show(setting.default)
    places = ("✓" if place in setting.places else "" for place in _PLACES)
    return f"`{setting.name}`", values, default, setting.help, *places


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text("utf-8")), "utf-8")
