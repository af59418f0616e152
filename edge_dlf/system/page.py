"""HTML pages that are one file each, and the colours of experts, which the pages share with the terminal."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

COLOURS = ((255, 95, 0), (0, 160, 255), (80, 200, 0), (215, 80, 255), (240, 180, 0), (0, 205, 175))
"""Red, green and blue of each expert in turn, then again from the first."""


def read_page(package: str, name: str) -> tuple[str, str]:
    """Return a page of `package`, and a content security policy that allows its own style and script alone.

    {{colours}} in the page becomes the colours, and {{NAME.css}} or {{NAME.js}} the file of that name beside it.
    """
    folder = files(package)
    text = folder.joinpath(name).read_text("utf-8")
    text = re.sub(r"\{\{(\w+\.(?:css|js))\}\}", lambda match: folder.joinpath(match[1]).read_text("utf-8"), text)
    text = text.replace("{{colours}}", json.dumps(COLOURS))
    style, script = _digest(text, "style"), _digest(text, "script")
    return text, f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {style}; script-src {script}"


def _digest(text: str, tag: str) -> str:
    """Hash of the page's only element of this kind, for the policy."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
