"""Python processes of our own that never import from the folder that the user works in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
"""The folder that `edge_dlf` itself is imported from, wherever the user works."""


def python_command(code: str, *arguments: str) -> list[str]:
    """The command that runs `code`, with `arguments` from sys.argv[1] on, in a Python that finds the same packages.

    `python -c` alone looks for modules in the working folder first, so that a json.py beside the user's data would run.
    """
    prelude = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1))"
    return [sys.executable, "-I", "-c", f"{prelude}\n{code}", json.dumps(_packages()), *arguments]


def _packages() -> list[str]:
    """The folders of sys.path without the working folder, which Python itself may have put there."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # removed meanwhile
        return [entry for entry in sys.path if entry]
    return [entry for entry in sys.path if Path(entry).resolve() != here or here == _ROOT]
