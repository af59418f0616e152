"""Hooks of mkdocs: models/README.md is a page of the site too, and links lead to it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_PAGE = "demo.md"
_SOURCE = Path(__file__).parents[1] / "models" / "README.md"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, _PAGE, content=_SOURCE.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../docs/", "](").replace("](../models/README.md", f"]({_PAGE}")
