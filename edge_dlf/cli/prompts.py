"""The prompt of `generate` and `compare`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..errors import require
from ..params import DEFAULTS
from .streams import read_all

if TYPE_CHECKING:
    from ..api import FusedLlama

raw_option = click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")


@dataclass(frozen=True)
class Prompt:
    """One text, taken raw or as the message of a chat. Raises InvalidParameterError for raw with a system prompt."""

    text: str
    raw: bool
    system: str | None

    def __post_init__(self) -> None:
        require(not (self.raw and self.system), "a system prompt needs the chat template: leave out --raw or --system")

    def tokens(self, llm: FusedLlama, settings: Mapping[str, Any]) -> str | Sequence[int]:
        """The prompt as `FusedLlama.stream` takes it with these settings."""
        think = settings.get("think", DEFAULTS["think"])
        return self.text if self.raw else llm.apply_chat_template(self._messages(), think=think)

    def complete(self, llm: FusedLlama, settings: Mapping[str, Any]) -> Any:
        """The whole answer as a dictionary."""
        if self.raw:
            return llm.create_completion(self.text, **settings)
        return llm.create_chat_completion(self._messages(), **settings)

    def _messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


def read_prompt(argument: str | None, *, raw: bool, system: str | None) -> Prompt:
    """Read the prompt from the argument, or from stdin where the argument is `-` or missing.

    One line break at the end of stdin is left out. Bytes that are not UTF-8 are kept as surrogates.
    Raises InvalidParameterError where the argument is missing and stdin is a terminal, or holds nothing.
    """
    text = argument or ""
    if argument == "-" or (argument is None and not sys.stdin.isatty()):
        given = read_all(sys.stdin.buffer, "stdin").decode("utf-8", "surrogateescape")
        text = given.removesuffix("\n").removesuffix("\r")
    require(argument is not None or text, "no prompt is given: add it to the command, or pipe it in")
    return Prompt(text, raw, system)
