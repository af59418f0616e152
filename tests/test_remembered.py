"""What is remembered of this machine is measured again where its file is damaged, and never ends a command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_dlf.system import remembered
from edge_dlf.system.remembered import recall, remember

DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "cut": lambda path: path.write_text('{"a": 1, "b'),
    "a list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a number of 5,000 digits": lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"),
    "a pipe that nobody writes to": os.mkfifo,
    "a device that never ends": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_as_if_there_were_none(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "user_dir", lambda _: tmp_path)
    DAMAGES[damage](tmp_path / "speeds.json")
    assert recall("speeds", "a") is None
    remember("speeds", "a", 2)
    assert recall("speeds", "a") == (None if damage == "a folder" else 2)
