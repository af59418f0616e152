"""Prompt tokens of chat messages, by the model's own jinja template. No text of a message becomes a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import InvalidParameterError, require, shown
from ..gguf.template_source import TemplateSource
from .dialects import Dialect, dialect_of
from .message import MessageParser
from .origin import Marker
from .sandbox import TemplateProcess
from .tools import Tools, with_read_arguments

Message: TypeAlias = Mapping[str, Any]
"""An OpenAI-shaped chat message: `role`, and `content` as text or as a list of `{"type": "text", "text": …}`."""

_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")
_OTHERS = (
    "audio", "file", "files", "function_call", "image", "image_url", "images", "input_audio", "video", "video_url",
    "videos",
)  # fmt: skip
_ROLES = ("system", "user", "assistant")
_FIRST_NUMBER = 918_273_000_000
_NUMBER = re.compile(r"918273\d{6}")
_FEW = 32
"""Most messages that are looked at one by one: each look takes as long as the whole conversation."""
_DOUBLED = r"{{\"name\": <function-name>, \"arguments\": <args-json-object>}}"
"""Templates of Qwen2.5 that were left with the braces of a Python format string: the model is told to write calls that
are no JSON, and does. Later files of the same family have single ones."""


class MemberPrompts(list[int]):
    """Prompt tokens, and those of members that read the same conversation by a template of their own.

    own: member -> its tokens. Some of them may be control tokens that only such members have.
    """

    def __init__(self, tokens: Sequence[int], own: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__(tokens)
        self.own = own or {}

    @property
    def n_longest(self) -> int:
        """The most tokens that any member reads."""
        return max(map(len, (self, *self.own.values())))


class ChatPrompt(MemberPrompts):
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

    tokenize: text -> ids, reading no control tokens.
    Raises InvalidParameterError where the template cannot be compiled.
    """

    def __init__(self, own: TemplateSource, tokenize: Callable[[str], list[int]]) -> None:
        self.dialect = dialect_of(own.source)
        self._control, self._first, self._source = own.control, own.first, own.source
        self._marker = Marker(list(own.control))
        self._template = TemplateProcess(own.source.replace(_DOUBLED, _DOUBLED[1:-1]), list(own.control))
        self._literals = {"bos_token": own.bos, "eos_token": own.eos}
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
            raise InvalidParameterError(f"messages must be a list of one message or more, not {shown(messages)}")
        if tools and self.dialect.calls is None:
            raise InvalidParameterError("the model's chat template knows no tools, or writes calls in an unknown way")
        plain = [self._with_known_calls(self._with_known_role(_with_text_content(message))) for message in messages]
        given: Mapping[str, Any] = {**self._switched(think), **_known_variables(variables)}
        if tools:
            given = {**given, "tools": list(tools.definitions)}
        plain, given, escapes = self._escaped(plain, given)
        text = self._render(plain, given)
        self._require_all_heard(plain, given, text)
        tags = self.dialect.tags
        is_thinking = tags is not None and self._marker.plain(text.rstrip()[-len(tags[0]) :]) == tags[0]
        if tags and is_thinking and think == "off":
            text, is_thinking = f"{text.rstrip()}\n\n{self._marker.mark(tags[1])}\n\n", False
        return ChatPrompt(self._tokenize_rendered(text, escapes), self.dialect, tools, is_thinking=is_thinking)

    def _switched(self, think: str) -> dict[str, Any]:
        """Return the variables by which templates switch thinking on or off."""
        if think == "auto" or (think == "off" and not self.dialect.can_think):
            return {}
        require(self.dialect.can_think, "the model's chat template knows no thinking")
        if think == "off" and self.dialect.is_harmony:
            raise InvalidParameterError("this model always thinks; reasoning_effort low makes it think less")
        return {"enable_thinking": think == "on", "thinking": think == "on"}

    def _tokenize_rendered(self, text: str, escapes: Mapping[int, int]) -> list[int]:
        back = {escape: char for char, escape in escapes.items()}
        tokens: list[int] = []
        plain: list[str] = []
        for part, is_name in (*self._marker.split(text), ("", True)):
            if not is_name:
                plain.append(part.translate(back) if back else part)
                continue
            if piece := "".join(plain):
                tokens += self._tokenize(piece)
            plain.clear()
            tokens += [self._control[part]] if part else []
        return tokens if self._first is None or [self._first] == tokens[:1] else [self._first, *tokens]

    def _escaped(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], Mapping[str, Any], Mapping[int, int]]:
        """Return both without the stand-ins for letters of control tokens, and what stands for those instead.

        Raises InvalidParameterError for values that JSON does not have.
        """
        text = _json([messages, variables])
        if escapes := self._marker.escapes(text):
            messages, variables = json.loads(text.translate(escapes))
        return messages, variables, escapes

    def _with_known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message if its role means anything to the template, which may drop others without a word.

        "developer" is what OpenAI's clients call "system". Raises InvalidParameterError for an unknown role.
        """
        role = message["role"]
        is_word = role in self._source  # a pattern of megabytes would take seconds to compile
        is_known = role in _ROLES or (is_word and re.search(rf"\b{re.escape(role)}\b", self._source))
        if role == "developer" and not is_known:
            return {**message, "role": "system"}
        require(is_known, f"the model's chat template knows no role {shown(role)}")
        return message

    def _with_known_calls(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message with its calls as a template reads them; as JSON in its text where it would drop them."""
        read = with_read_arguments(message)
        if not read.get("tool_calls") or "tool_calls" in self._source:
            return read
        calls = [{name: call["function"][name] for name in ("name", "arguments")} for call in read["tool_calls"]]
        said = [message["content"], *map(_json, calls)]
        return {**message, "content": "\n".join(filter(None, said))}

    def _require_all_heard(self, messages: list[dict[str, Any]], given: Mapping[str, Any], text: str) -> None:
        """Raise InvalidParameterError where the prompt would be the same whatever a system's or tool's message said.

        Users and assistants are heard by every template, but for what an assistant thought or said beside a call.
        """
        doubtful = {
            n: message
            for n, message in enumerate(messages)
            if message["role"] not in ("user", "assistant") and message["content"].strip()
        }
        if len(doubtful) <= _FEW:  # each is a search in the whole text
            doubtful = {n: message for n, message in doubtful.items() if message["content"].strip() not in text}
        if not doubtful:
            return
        # Numbers in their places all come through at once, unless a template reads them in a way of its own.
        numbers = {n: str(_FIRST_NUMBER + n) for n in doubtful}
        through = set(_NUMBER.findall(self._said_instead(messages, given, numbers) or ""))
        silent = [n for n in doubtful if numbers[n] not in through]
        others = {n: "." if messages[n]["content"].strip() != "." else "-" for n in silent}
        for few in (*([n] for n in silent[:_FEW]), silent[_FEW:]):
            if few and self._said_instead(messages, given, {n: others[n] for n in few}) == text:
                role = shown(messages[few[0]]["role"])
                raise InvalidParameterError(f"the model's chat template drops the message of role {role}")

    def _said_instead(
        self, messages: list[dict[str, Any]], given: Mapping[str, Any], contents: Mapping[int, str]
    ) -> str | None:
        """Return the text with other contents for some messages; None where the template refuses those."""
        others = [
            {**message, "content": contents[n]} if n in contents else message for n, message in enumerate(messages)
        ]
        try:
            return self._render(others, given)
        except InvalidParameterError:
            return None

    def close(self) -> None:
        """End the template's process. Calling it twice is no error."""
        self._template.close()

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        return self._template.render(messages, {"add_generation_prompt": True, **variables}, self._literals)


def _json(value: Any) -> str:
    """Return the JSON of a part of a request. Raises InvalidParameterError for values that JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"messages and variables of a chat template are JSON: {error}") from None


def _with_text_content(message: Message) -> dict[str, Any]:
    """Return a copy whose content is one string. Raises InvalidParameterError for content that is not text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameterError(f"a message must have a role and content, not {shown(message)}")
    _require_text_alone(message)
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = message.get("refusal") or ""  # as OpenAI writes an answer that refuses
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(map(_text_of, content))
    if not isinstance(content, str):
        raise InvalidParameterError(f"the content of a message must be text, not {shown(message.get('content'))}")
    return {**message, "content": content}


def _known_variables(variables: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if taken := next((name for name in variables or () if name in _OWN_VARIABLES), None):
        raise InvalidParameterError(f"{taken} is no variable of chat_template_kwargs: it has a field of its own")
    return variables or {}


def _text_of(part: Any) -> str:
    """Return the text of one part of a message's content."""
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise InvalidParameterError(f"each part of a message's content must be text, not {shown(part)}")
    _require_text_alone(part)
    return str(part["text"])


def _require_text_alone(fields: Mapping[str, Any]) -> None:
    """Raise InvalidParameterError where something stands beside the text that would be left out."""
    for name in _OTHERS:
        require(not fields.get(name), f"messages hold text alone: {name} cannot be used")
