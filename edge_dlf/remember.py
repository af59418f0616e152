"""What was once found out about this machine, at some cost: small JSON files in the user's cache folder.

Each finding holds for a state, such as the sizes and times of the files it is about; in another it is forgotten.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs


def recall(name: str, key: str, state: Any) -> Any:
    """What `remember` was told of `key` in the same state, or None. name: the file."""
    entry = _read(name).get(key)
    return entry.get("found") if isinstance(entry, dict) and entry.get("state") == state else None


def remember(name: str, key: str, state: Any, found: Any) -> None:
    """Keep `found`, as JSON has it; a folder that cannot be written costs finding it out again, no more."""
    path = _path(name)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**_read(name), key: {"state": state, "found": found}}))
        part.replace(path)


def _path(name: str) -> Path:
    return Path(platformdirs.user_cache_dir("edge-dlf", appauthor=False)) / f"{name}.json"


def _read(name: str) -> dict[str, Any]:
    try:
        entries = json.loads(_path(name).read_bytes())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
