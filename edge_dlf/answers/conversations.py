"""Prompts of a conversation, by the large model's chat template and by those of members that have another one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import EdgeDLFError, InvalidParameterError
from ..gguf.template_source import TemplateSource
from ..system.locks import ForkSafeLock
from .template import ChatPrompt, ChatTemplate, Message
from .tools import Tools

logger = logging.getLogger(__name__)


class Conversations:
    """Chat templates of a family, which are read and compiled when a conversation first needs them. Of any thread.

    sources: returns those of the large model and of members that have another one.
    tokenize: text -> ids, reading no control tokens.
    """

    def __init__(
        self, sources: Callable[[], Mapping[str, TemplateSource]], tokenize: Callable[[str], list[int]]
    ) -> None:
        self._read_sources, self._tokenize = sources, tokenize
        self._sources: Mapping[str, TemplateSource] = {}
        self._templates: dict[str, ChatTemplate] = {}
        self._said: set[str] = set()
        self._lock, self._is_closed = ForkSafeLock(), False

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        think: str = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Prompt for the assistant's answer to `messages`, as `ChatTemplate.prompt` makes it.

        A member whose own template cannot render these messages reads the large model's prompt. Thinking is the large
        model's matter: a template that cannot switch it is left to itself.
        """
        prompt, own = self._compiled("large").prompt(messages, tools, think, variables), {}
        for member in [name for name in self._sources if name != "large"]:
            try:
                template = self._compiled(member)
                asked = think if template.dialect.can_think and not template.dialect.is_harmony else "auto"
                own[member] = [*template.prompt(messages, tools, asked, variables)]
            except InvalidParameterError as error:
                if member not in self._said:
                    logger.warning("%s reads the prompt by the large model's chat template: %s", member, error)
                self._said.add(member)
        prompt.own = own
        return prompt

    def _compiled(self, member: str) -> ChatTemplate:
        """Return the member's template, one for all members of the same source."""
        with self._lock:
            if self._is_closed:
                raise EdgeDLFError("this FusedLlama has been closed")
            self._sources = self._sources or self._read_sources()
            own = self._sources[member]
            if own.source not in self._templates:
                self._templates[own.source] = ChatTemplate(own, self._tokenize)
            return self._templates[own.source]

    def close(self) -> None:
        """End the processes of the templates. Calling it twice is no error."""
        with self._lock:
            self._is_closed = True
            for template in self._templates.values():
                template.close()
