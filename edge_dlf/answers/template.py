"""Prompt tokens of chat messages, by the model's own jinja template. No text of a message becomes a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import InvalidParameterError
from .dialects import Dialect, dialect_of
from .message import MessageParser
from .sandbox import TemplateProcess
from .tools import Tools, with_read_arguments

Message: TypeAlias = Mapping[str, Any]
"""An OpenAI-shaped chat message: `role`, and `content` as text or as a list of `{"type": "text", "text": …}`."""

_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")
_MEDIA = ("audio", "file", "files", "image", "image_url", "images", "input_audio", "video", "video_url", "videos")
_ROLES = ("system", "user", "assistant")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatPrompt(list[int]):
    """Prompt tokens that a chat template made, and how the answer to them is to be read.

    tools: those that it may call. is_thinking: whether the prompt ends within thinking.
    """

    def __init__(self, tokens: Sequence[int], dialect: Dialect, tools: Tools | None, *, is_thinking: bool) -> None:
        super().__init__(tokens)
        self.dialect = dialect
        self.tools = tools
        self.is_thinking = is_thinking

    def parser(self) -> MessageParser | None:
        """Return what takes the answer apart; None where all of it is content."""
        if not (self.tools or self.dialect.can_think):
            return None
        return MessageParser(self.dialect, self.tools.callable if self.tools else None, is_thinking=self.is_thinking)


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
        self.dialect = dialect_of(source)
        self._template = TemplateProcess(source)
        self._source = source
        self._bos, self._eos = bos, eos
        self._control = {text: token for text, token in control.items() if len(text) > 1}
        names = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._lengths = range(2, max(map(len, names), default=2))
        self._beginnings = {name[:n] for name in names for n in range(2, len(name))}
        self._endings = {name[-n:] for name in names for n in range(2, len(name))}
        self._tokenize = tokenize

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        think: str = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Prompt for the assistant's next message.

        think: whether it thinks before; "auto" leaves it to the template. variables: more variables of the template.
        Raises InvalidParameterError if the template refuses the messages, or knows no tools or no thinking.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise InvalidParameterError(f"messages must be a list of one message or more, not {messages!r:.60}")
        if tools and self.dialect.calls is None:
            raise InvalidParameterError("the model's chat template knows no tools, or writes calls in an unknown way")
        plain = [self._with_known_role(with_read_arguments(_with_text_content(message))) for message in messages]
        given = {**self._switched(think), **_known_variables(variables)}
        if tools:
            given["tools"] = list(tools.definitions)
        shield = _absent_noncharacter([*plain, given])
        plain, given = [self._shielded(message, shield) for message in plain], self._shielded(given, shield)
        text = self._render(plain, given)
        self._require_all_heard(plain, given, text)
        tags = self.dialect.tags
        is_thinking = tags is not None and text.rstrip().endswith(tags[0])
        if tags and is_thinking and think == "off":
            text, is_thinking = f"{text.rstrip()}\n\n{tags[1]}\n\n", False
        return ChatPrompt(self._tokenize_rendered(text, shield), self.dialect, tools, is_thinking=is_thinking)

    def _switched(self, think: str) -> dict[str, Any]:
        """Return the variables by which templates switch thinking on or off."""
        if think == "auto" or (think == "off" and not self.dialect.can_think):
            return {}
        if not self.dialect.can_think:
            raise InvalidParameterError("the model's chat template knows no thinking")
        if think == "off" and self.dialect.is_harmony:
            raise InvalidParameterError("this model always thinks; reasoning_effort low makes it think less")
        return {"enable_thinking": think == "on", "thinking": think == "on"}

    def _tokenize_rendered(self, text: str, shield: str) -> list[int]:
        tokens: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            tokens += self._tokenize_plain(text[start : match.start()], shield)
            tokens.append(self._control[match[0]])
            start = match.end()
        return tokens + self._tokenize_plain(text[start:], shield)

    def _with_known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message if its role means anything to the template, which may drop others without a word.

        "developer" is what OpenAI's clients call "system". Raises InvalidParameterError for an unknown role.
        """
        role = message["role"]
        is_known = role in _ROLES or re.search(rf"\b{re.escape(role)}\b", self._source)
        if role == "developer" and not is_known:
            return {**message, "role": "system"}
        if not is_known:
            raise InvalidParameterError(f"the model's chat template knows no role {role!r:.60}")
        return message

    def _require_all_heard(self, messages: list[dict[str, Any]], given: Mapping[str, Any], text: str) -> None:
        """Raise InvalidParameterError where the prompt would be the same whatever a system's or tool's message said.

        Users and assistants are heard by every template, but for what an assistant thought or said beside a call.
        """
        for n, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] in ("user", "assistant") or not content or content in text:
                continue
            other = [*messages[:n], {**message, "content": "." if content != "." else "-"}, *messages[n + 1 :]]
            try:
                is_heard = self._render(other, given) != text
            except InvalidParameterError:
                is_heard = True
            if not is_heard:
                raise InvalidParameterError(f"the model's chat template drops the message of role {message['role']!r}")

    def close(self) -> None:
        """End the template's process. Calling it twice is no error."""
        self._template.close()

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        own = {"bos_token": self._bos, "eos_token": self._eos, "add_generation_prompt": True}
        return self._template.render(messages, **{**own, **variables})

    def _shielded(self, value: Any, shield: str) -> Any:
        """Return the value with every name of a control token broken by `shield`, in every text that it holds."""
        if isinstance(value, str):
            return self._broken(value, shield)
        if isinstance(value, Mapping):
            return {self._shielded(key, shield): self._shielded(each, shield) for key, each in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self._shielded(each, shield) for each in value]
        return value

    def _broken(self, text: str, shield: str) -> str:
        text = self._pattern.sub(lambda match: match[0][0] + shield + match[0][1:], text)
        # Half a name at either end could meet its other half in a text that the template puts next to this one.
        stripped = text.rstrip()
        cuts = {len(stripped) - n + 1 for n in self._lengths if stripped[-n:] in self._beginnings}
        start = len(text) - len(text.lstrip())
        cuts |= {start + 1 for n in self._lengths if text[start : start + n] in self._endings}
        for cut in sorted(cuts, reverse=True):
            text = text[:cut] + shield + text[cut:]
        return text

    def _tokenize_plain(self, text: str, shield: str) -> list[int]:
        text = text.replace(shield, "")
        return self._tokenize(text) if text else []


def _with_text_content(message: Message) -> dict[str, Any]:
    """Return a copy whose content is one string. Raises InvalidParameterError for content that is not text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameterError(f"a message must have a role and content, not {message!r:.80}")
    _require_no_media(message)
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(map(_text_of, content))
    if not isinstance(content, str):
        raise InvalidParameterError(f"the content of a message must be text, not {message.get('content')!r:.80}")
    return {**message, "content": content}


def _known_variables(variables: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if taken := next((name for name in variables or () if name in _OWN_VARIABLES), None):
        raise InvalidParameterError(f"{taken} is no variable of chat_template_kwargs: it has a field of its own")
    return variables or {}


def _text_of(part: Any) -> str:
    """Return the text of one part of a message's content."""
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise InvalidParameterError(f"each part of a message's content must be text, not {part!r:.80}")
    _require_no_media(part)
    return str(part["text"])


def _require_no_media(fields: Mapping[str, Any]) -> None:
    """Raise InvalidParameterError where something other than text stands beside the text."""
    for name in _MEDIA:
        if fields.get(name):
            raise InvalidParameterError(f"messages hold text alone: {name} cannot be used")


def _absent_noncharacter(values: list[dict[str, Any]]) -> str:
    """Return a code point that is no character, and that no text in `values` contains."""
    used = set(json.dumps(values, ensure_ascii=False, default=str))
    return next((char for char in _NONCHARACTERS if char not in used), "\U0010ffff")
