"""The prompt of `generate` and `compare`: where it comes from, and what the models are given."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidParameterError

if TYPE_CHECKING:
    from ..api import FusedLlama

raw_option = click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")


@dataclass(frozen=True)
class Prompt:
    """One text, taken raw or as a chat of one message. Raises InvalidParameterError for raw with a system prompt."""

    text: str
    raw: bool
    system: str | None

    def __post_init__(self) -> None:
        if self.raw and self.system:
            raise InvalidParameterError("a system prompt needs the chat template: leave out --raw or --system")

    def tokens(self, llm: FusedLlama) -> str | Sequence[int]:
        """What `FusedLlama.stream` takes."""
        return self.text if self.raw else llm.apply_chat_template(self._messages())

    def complete(self, llm: FusedLlama, settings: Mapping[str, Any]) -> Any:
        """The whole answer as a dictionary."""
        if self.raw:
            return llm.create_completion(self.text, **settings)
        return llm.create_chat_completion(self._messages(), **settings)

    def _messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


def read_prompt(argument: str | None, *, raw: bool, system: str | None) -> Prompt:
    """The argument, or stdin for `-` and where stdin is no terminal; one line break at its end is left out. Bytes that
    are not UTF-8 survive. Raises InvalidParameterError where there is no prompt."""
    if argument is None and sys.stdin.isatty():
        raise InvalidParameterError("no prompt is given: add it to the command, or pipe it in")
    if argument is None or argument == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        argument = text.removesuffix("\n").removesuffix("\r")
    return Prompt(argument, raw, system)
