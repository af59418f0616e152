"""Measurements of this machine and its files, kept in the user's cache folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .jsonl import parse_object
from .paths import user_dir


def recall(name: str, key: str) -> Any:
    """The value of `key` in the collection `name`; None if there is none."""
    return _read(name).get(key)


def remember(name: str, key: str, value: Any) -> None:
    """Add to the collection `name`. If the folder cannot be written, the value is measured again next time."""
    path = _file(name)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**_read(name), key: value}))
        part.replace(path)


def states(paths: Sequence[Path]) -> list[list[int]]:
    """Size and time of each file: a measurement of a file holds as long as these do."""
    stats = [path.stat() for path in paths]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _file(name: str) -> Path:
    return user_dir("cache") / f"{name}.json"


def _read(name: str) -> dict[str, Any]:
    path = _file(name)
    try:
        return parse_object(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
