"""Conversations that a chat keeps by itself, in the user's data folder: one file each, as /save writes it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import EdgeDLFError
from ..system.durable import file_error
from ..system.paths import user_dir
from ..system.remembered import states
from .conversation import Conversation, load

N_KEPT = 100


@dataclass
class Kept:
    """Conversations with one family, and which of them the chat is about.

    family: its name. note: called with one line where a conversation cannot be kept.
    path: file of this conversation; None until something is said.
    """

    family: str
    note: Callable[[str], None]
    path: Path | None = None
    _written: tuple[Any, ...] = ()
    _state: list[list[int]] = field(default_factory=list)
    _is_failing: bool = False

    @property
    def folder(self) -> Path:
        name = re.sub(r"[^\w.-]", "_", self.family).lstrip(".") or "_"
        return user_dir("data") / "chats" / name

    def files(self) -> list[Path]:
        """The kept conversations, the oldest first."""
        return sorted(self.folder.glob("*.json"))

    def recent(self) -> list[Path]:
        """The kept conversations, first the one in which something was said last."""
        times: dict[Path, int] = {}
        for path in self.files():
            with suppress(OSError):
                times[path] = path.stat().st_mtime_ns
        return sorted(times, key=lambda path: times[path], reverse=True)

    def begin(self) -> None:
        """Let what is said from now on be another conversation."""
        self.path = None

    def open(self, path: Path) -> tuple[Conversation, dict[str, Any]]:
        """Read a kept conversation with its settings, and go on with it. Raises EdgeDLFError."""
        conversation, settings = load(path)
        self.path, self._state = path, _state(path)
        self._written = _content(conversation, settings)
        return conversation, settings

    def keep(self, conversation: Conversation, settings: Mapping[str, Any]) -> None:
        """Write the conversation if it has changed, and remove one in which nothing is left.

        Where another chat has gone on with the same file, this one becomes a file of its own, so that neither is lost.
        """
        content = _content(conversation, settings)
        if (content == self._written and self.path) or not (conversation.messages or self.path):
            return
        if self.path and _state(self.path) != self._state:
            self.path = None
        try:
            if conversation.messages:
                self.path = self.path or self._new()
                conversation.save(self.path, self.family, settings)
                self._written, self._state = content, _state(self.path)
            elif self.path:
                self.path.unlink(missing_ok=True)
                self.path = None
            self._is_failing = False
        except (EdgeDLFError, OSError) as error:
            reason = error if isinstance(error, EdgeDLFError) else file_error(self.folder, error)
            if not self._is_failing:
                self.note(f"note: this conversation cannot be kept ({reason})")
            self._is_failing = True

    def _new(self) -> Path:
        """A name for another file. The oldest ones go where there are too many. Raises OSError."""
        self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        for path in self.files()[: 1 - N_KEPT]:
            path.unlink(missing_ok=True)
        return self.folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{os.getpid()}.json"


def _content(conversation: Conversation, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return deepcopy((conversation.system, conversation.messages, dict(settings)))


def _state(path: Path) -> list[list[int]]:
    """Size and time of a file; nothing where it is gone."""
    try:
        return states([path])
    except OSError:
        return []
