"""Messages of a chat: which of them still fit into the context, and the file that they are saved in."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ContextOverflowError, EdgeDLFError
from ..system.durable import replacing, require_own
from .streams import read_all

if TYPE_CHECKING:
    from ..answers.template import MemberPrompts

_FORMAT = "edge-dlf chat 1"


@dataclass
class Conversation:
    """User messages and answers in turn; the last message may wait for its answer.

    n_dropped: number of messages at the beginning that no longer fit into the context. `save` still writes them.
    """

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    n_dropped: int = 0

    @property
    def is_unanswered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def ask(self, text: str) -> None:
        """Add the user's message, in place of one that was never answered."""
        if self.is_unanswered:
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the answer to the last message, unless it is empty."""
        if text:
            self.messages.append({"role": "assistant", "content": text})

    def retry(self) -> bool:
        """Forget the last answer. Returns whether a message is left to be answered."""
        if self.messages and not self.is_unanswered:
            self.messages.pop()
        return self.is_unanswered

    def undo(self) -> str | None:
        """Forget the last message and its answer. Returns the message."""
        if not self.retry():
            return None
        message = self.messages.pop()
        self.n_dropped = min(self.n_dropped, len(self.messages))
        return message["content"]

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages.clear()
        self.n_dropped = 0

    def visible(self, n_dropped: int) -> list[dict[str, str]]:
        """Messages that the model is shown: the system prompt, and those after the first `n_dropped`."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[n_dropped:]

    def fit(
        self, tokenize: Callable[[Sequence[Mapping[str, Any]]], MemberPrompts], n_ctx: int, n_answer: int
    ) -> MemberPrompts:
        """Prompt tokens of the conversation, with room for an answer in the context.

        Where the context is full, the oldest turns are dropped until a quarter of it is free, so that the next turns
        need not drop again.

        n_ctx: tokens of the context.
        n_answer: tokens that the answer needs.
        Raises ContextOverflowError where the last message alone is too long.
        """

        def room(n_dropped: int) -> int:
            return n_ctx - tokenize(self.visible(n_dropped)).n_longest

        if room(self.n_dropped) < n_answer:
            starts = range(self.n_dropped, len(self.messages), 2)
            wanted = max(n_answer, n_ctx // 4)
            k = bisect.bisect_left(starts, wanted, hi=len(starts) - 1, key=room)
            if room(starts[k]) < n_answer:
                raise ContextOverflowError(
                    f"this message needs {n_ctx - room(starts[k])} tokens with the system prompt, and its answer up to "
                    f"{n_answer}: more than the context of {n_ctx}"
                )
            self.n_dropped = starts[k]
        return tokenize(self.visible(self.n_dropped))

    def save(self, path: Path, family: str, settings: Mapping[str, Any]) -> None:
        """Write the whole conversation as JSON, all or nothing. Raises EdgeDLFError."""
        content = {"format": _FORMAT, "family": family, "settings": dict(settings), "messages": self.visible(0)}
        try:
            target = path.expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise EdgeDLFError(f"{path}: cannot be written ({error})") from error
        require_own(target, lambda beginning: _FORMAT.encode() in beginning[:80], "saved conversation")
        with replacing(target, 0o600) as file:  # what is said is nobody else's business
            file.write(json.dumps(content, indent=1).encode())


def load(path: Path) -> tuple[Conversation, dict[str, Any]]:
    """Read the conversation and the settings from a file that `save` wrote. Raises EdgeDLFError."""
    try:
        with path.expanduser().open("rb") as file:
            content = read_all(file, str(path))
    except (OSError, RuntimeError, ValueError) as error:  # a home that is not known; a NUL in the path; too large
        if isinstance(error, EdgeDLFError):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).lower().rstrip(".")
        raise EdgeDLFError(f"{path}: cannot be read ({reason})") from error
    try:
        saved = json.loads(content)
    except (RecursionError, ValueError) as error:
        raise EdgeDLFError(f"{path}: cannot be read (not valid JSON: {error})") from error
    match saved:
        case {"format": format, "settings": {}, "messages": [*messages]} if format == _FORMAT:
            system = [message["content"] for message in messages[:1] if _is_message(message, "system")]
            turns = list(zip(messages[len(system) :], itertools.cycle(("user", "assistant")), strict=False))
            if all(_is_message(message, role) for message, role in turns):
                spoken = [{"role": role, "content": message["content"]} for message, role in turns]
                return Conversation(next(iter(system), None), spoken), saved["settings"]
    raise EdgeDLFError(f"{path}: cannot be read (not a saved conversation)")


def _is_message(message: Any, role: str) -> bool:
    return isinstance(message, dict) and message.get("role") == role and isinstance(message.get("content"), str)
