"""Prompts of members whose control tokens are not the large model's, each by its own chat template."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InvalidParameterError
from ..gguf.own_template import OwnTemplate
from ..system.locks import ForkSafeLock
from .template import ChatTemplate, Message
from .tools import Tools

logger = logging.getLogger(__name__)


class OwnPrompts:
    """Chat templates of members, which are compiled when a conversation first needs them. Of any thread.

    templates: by member. tokenize: text -> ids, reading no control tokens.
    """

    def __init__(self, templates: Mapping[str, OwnTemplate], tokenize: Callable[[str], list[int]]) -> None:
        self._sources = dict(templates)
        self._tokenize = tokenize
        self._templates: dict[str, ChatTemplate] = {}
        self._said: set[str] = set()
        self._lock = ForkSafeLock()

    def prompts(
        self, messages: Sequence[Message], tools: Tools | None, think: str, variables: Mapping[str, Any] | None
    ) -> dict[str, list[int]]:
        """Return the prompt of each member; none where its template cannot render these messages.

        Arguments as for `ChatTemplate.prompt`. Thinking is the large model's matter: a template that cannot switch it
        is left to itself.
        """
        found = {}
        for member, own in self._sources.items():
            try:
                template = self._compiled(own)
                asked = think if template.dialect.can_think and not template.dialect.is_harmony else "auto"
                tokens: list[int] = [*template.prompt(messages, tools, asked, variables)]
            except InvalidParameterError as error:
                if member not in self._said:
                    logger.warning("%s reads the prompt by the large model's chat template: %s", member, error)
                self._said.add(member)
                continue
            if own.first is not None and tokens[:1] != [own.first]:
                tokens.insert(0, own.first)
            found[member] = tokens
        return found

    def _compiled(self, own: OwnTemplate) -> ChatTemplate:
        """Return the template, one for all members of the same source."""
        with self._lock:
            if own.source not in self._templates:
                self._templates[own.source] = ChatTemplate(
                    own.source, bos=own.bos, eos=own.eos, control=own.control, tokenize=self._tokenize
                )
            return self._templates[own.source]

    def close(self) -> None:
        """End the processes of the templates. Calling it twice is no error."""
        with self._lock:
            for template in self._templates.values():
                template.close()
