"""Prompt tokens of chat messages, by the model's own jinja template. No text of a message becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import InvalidParameterError
from .sandbox import TemplateProcess

Message: TypeAlias = Mapping[str, Any]
"""An OpenAI-shaped chat message: `role`, and `content` as text or as a list of `{"type": "text", "text": …}`."""

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatTemplate:
    """A chat template over one vocabulary.

    source: jinja text as a GGUF holds it.
    bos, eos: texts of these tokens, "" where there is none.
    control: text -> id of every control token.
    tokenize: text -> ids, reading no control tokens.
    Raises InvalidParameterError where the template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        *,
        bos: str,
        eos: str,
        control: Mapping[str, int],
        tokenize: Callable[[str], list[int]],
    ) -> None:
        self._template = TemplateProcess(source)
        self._bos, self._eos = bos, eos
        self._control = {text: token for text, token in control.items() if len(text) > 1}
        names = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._tokenize = tokenize

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next message. Raises InvalidParameterError if the template refuses it."""
        plain = [_with_text_content(message) for message in messages]
        shield = _absent_noncharacter(plain)
        text = self._render([self._shielded(message, shield) for message in plain])
        tokens: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            tokens += self._tokenize_plain(text[start : match.start()], shield)
            tokens.append(self._control[match[0]])
            start = match.end()
        return tokens + self._tokenize_plain(text[start:], shield)

    def close(self) -> None:
        """End the template's process. Calling it twice is no error."""
        self._template.close()

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(messages, bos_token=self._bos, eos_token=self._eos, add_generation_prompt=True)

    def _shielded(self, message: dict[str, Any], shield: str) -> dict[str, Any]:
        """The message with every name of a control token in its text broken by `shield`."""
        return {key: self._broken(value, shield) if isinstance(value, str) else value for key, value in message.items()}

    def _broken(self, text: str, shield: str) -> str:
        text = self._pattern.sub(lambda match: match[0][0] + shield + match[0][1:], text)
        # Half a name at either end could meet its other half in a message that the template puts next to this one.
        for name in self._control:
            for n in range(2, len(name)):
                if text.rstrip().endswith(name[:n]):
                    cut = len(text.rstrip()) - n + 1
                    text = text[:cut] + shield + text[cut:]
                if text.lstrip().startswith(name[-n:]):
                    cut = len(text) - len(text.lstrip()) + 1
                    text = text[:cut] + shield + text[cut:]
        return text

    def _tokenize_plain(self, text: str, shield: str) -> list[int]:
        text = text.replace(shield, "")
        return self._tokenize(text) if text else []


def _with_text_content(message: Message) -> dict[str, Any]:
    """A copy whose content is one string. Raises InvalidParameterError for content that is not text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameterError(f"a message must have a role and content, not {message!r:.80}")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise InvalidParameterError(f"the content of a message must be text, not {message.get('content')!r:.80}")
    return {**message, "content": content}


def _absent_noncharacter(messages: list[dict[str, Any]]) -> str:
    """A code point that is no character, and that no message contains."""
    used = {char for message in messages for value in message.values() if isinstance(value, str) for char in value}
    return next((char for char in _NONCHARACTERS if char not in used), "\U0010ffff")
