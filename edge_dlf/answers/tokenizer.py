"""Tokens of texts and conversations, and back, by the vocabulary and chat template of the large model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..engine.constraint import Constraint
from ..errors import ContextOverflowError, InvalidParameterError, require, shown
from ..gguf.template_source import TemplateSource
from ..params import Text
from ..system.locks import ForkSafeLock
from .call_grammar import call_grammar
from .conversations import Conversations
from .dialects import Dialect
from .fewest_tokens import FewestTokens
from .forms import Forms
from .sandbox import NoTemplateError
from .template import ChatPrompt
from .text import to_bytes
from .thinking import AfterThinking, ThinkingTags
from .tools import Tools

if TYPE_CHECKING:
    from ..llama import Model

Prompt: TypeAlias = str | Sequence[int]
_TEXT = Text()

_SHORT_BYTES = 1 << 14
"""Bytes of text that are tokenized in no time."""


class Tokenizer:
    """Tokenizer of a family. May be used by several threads.

    n_vocab: tokens that all members share. n_ctx: the most tokens of a prompt.
    templates: of the members that read a conversation by a chat template of their own.
    conversations: what makes prompts of messages.
    """

    def __init__(
        self, model: Model, n_vocab: int, n_ctx: int, templates: Mapping[str, TemplateSource] | None = None
    ) -> None:
        self.n_vocab, self._n_ctx = n_vocab, n_ctx
        self._model, self._templates = model, templates or {}
        self.conversations = Conversations(self._sources, self._part)
        self._lock = ForkSafeLock()
        self._fewest: FewestTokens | None = None
        self._forms: Forms | None = None

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as a raw prompt, as in `FusedLlama.tokenize`."""
        return self._with_bos(self._model.tokenize(to_bytes(_TEXT.read("the text", text)), special=special))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, names of control tokens included."""
        return b"".join(map(self.name_bytes, self.known(tokens))).decode("utf-8", "replace")

    def answer(self, text: str, *, is_chat: bool) -> list[int]:
        """Tokens of an answer, as `FusedLlama.tokenize_answer`. Raises InvalidParameterError if nothing can end it."""
        ends = (self._model.eot, self._model.eos) if is_chat else (self._model.eos, self._model.eot)
        last = next((token for token in ends if token is not None), None)
        if last is None:
            raise InvalidParameterError("this model has no token that ends an answer")
        return [*self._model.tokenize(to_bytes(_TEXT.read("the text", text)), special=False), last]

    @property
    def first_token(self) -> int:
        """BOS, or else EOS. Raises InvalidParameterError where the vocabulary has neither."""
        token = self._model.eos if self._model.bos is None else self._model.bos
        if token is None:
            raise InvalidParameterError("this model has no token that begins or ends a text")
        return token

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, as jinja text."""
        return self._model.chat_template

    def piece(self, token: int) -> bytes:
        """Bytes that `token` adds to an answer; empty for control tokens."""
        return self._model.piece(token)

    def name_bytes(self, token: int) -> bytes:
        """Bytes of `token`; the name of a control token."""
        return self._model.piece(token, special=True)

    def prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, one at least.

        Raises InvalidParameterError unless it is text, or ids that exist, and ContextOverflowError for a text that is
        much too long, before it is tokenized.
        """
        if isinstance(prompt, str):
            self._require_room(to_bytes(prompt))
            return self.tokenize(prompt) or [self._bos()]
        if hasattr(prompt, "__len__") and len(prompt) > self._n_ctx:
            raise self._overflow(len(prompt))
        return self.known(prompt) or [self._bos()]

    def _require_room(self, text: bytes) -> None:
        """Raise ContextOverflowError if `text` surely has more tokens than the context."""
        if len(text) <= max(_SHORT_BYTES, self._n_ctx):
            return
        with self._lock:
            if self._fewest is None:
                tokens = range(self._model.n_vocab)
                names = [name for token in tokens if (name := self.name_bytes(token)) != self.piece(token)]
                self._fewest = FewestTokens([*map(self.piece, tokens), *names])
        n_least = self._fewest.of(text)
        if n_least > self._n_ctx:
            raise self._overflow(n_least, " or more")

    def _overflow(self, n_tokens: int, bound: str = "") -> ContextOverflowError:
        return ContextOverflowError(f"the prompt has {n_tokens} tokens{bound}, more than the context of {self._n_ctx}")

    def chat_constraint(
        self,
        prompt: ChatPrompt,
        grammar: str | None,
        schema: Mapping[str, Any] | None,
        budget: int | None,
        ends: Callable[[int], bool],
    ) -> Constraint | None:
        """Constraint of an answer to `prompt`: its thinking is free up to `budget` tokens; what follows keeps to the
        grammar, the schema, or those of the tools. Raises InvalidParameterError."""
        tools, dialect = prompt.tools, prompt.dialect
        calls = tools is not None and (tools.is_constrained or schema is not None)
        require(not tools or grammar is None, "an answer that may call tools keeps to no grammar")
        if budget is not None and not dialect.can_think:
            raise InvalidParameterError("the model's chat template knows no thinking, which think_budget would limit")
        if calls and tools and budget is not None and dialect.is_harmony:
            raise InvalidParameterError("think_budget and tools that are held to a schema exclude each other here")
        inner = self._calls(dialect, tools, schema, ends) if calls and tools else self.constraint(grammar, schema, ends)
        if not dialect.can_think or (inner is None and budget is None) or (calls and dialect.is_harmony):
            return inner
        return AfterThinking(
            self._thinking_tags(dialect),
            self.name_bytes,
            ends,
            self.n_vocab,
            is_thinking=prompt.is_thinking,
            budget=budget,
            inner=inner,
        )

    def _thinking_tags(self, dialect: Dialect) -> ThinkingTags:
        opens, closes = dialect.tags or ("", "<|channel|>final<|message|>")
        closing = f"\n{closes}\n\n" if dialect.tags else f"<|end|><|start|>assistant{closes}"
        return ThinkingTags(
            opens.encode(), closes.encode(), tuple(self._model.tokenize(closing.encode(), special=True))
        )

    def _calls(
        self, dialect: Dialect, tools: Tools, answer: Mapping[str, Any] | None, ends: Callable[[int], bool]
    ) -> Constraint:
        return self._forms_of(ends).calls(call_grammar(dialect, tools, answer, self._control))

    def constraint(
        self, grammar: str | None, schema: Mapping[str, Any] | None, ends: Callable[[int], bool]
    ) -> Constraint | None:
        """Constraint of an answer to a grammar or a JSON schema; None where there is neither.

        grammar: text of a GBNF grammar.
        ends: whether a token ends an answer.
        Raises InvalidParameterError.
        """
        if grammar is not None:
            if schema is not None:
                raise InvalidParameterError("an answer keeps to a grammar or to a JSON schema, not to both")
            if not isinstance(grammar, str):
                raise InvalidParameterError(f"grammar must be text of a GBNF grammar, not {shown(grammar)}")
            return self._forms_of(ends).grammar(grammar)
        return None if schema is None else self._forms_of(ends).schema(schema)

    def _forms_of(self, ends: Callable[[int], bool]) -> Forms:
        """Return forms over the vocabulary, which are made once. Raises InvalidParameterError if no answer can end."""
        with self._lock:
            if self._forms is None:
                last = list(filter(ends, range(self.n_vocab)))
                require(last, "this model has no token that ends an answer, which a form needs")
                self._forms = Forms(list(map(self.piece, range(self.n_vocab))), last)
            return self._forms

    def known(self, tokens: Sequence[int]) -> list[int]:
        """`tokens`, a sequence or an array, if they are ids that exist. Raises InvalidParameterError otherwise."""
        ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray):
            raise InvalidParameterError(f"tokens must be a list of ids, not {shown(tokens)}")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise InvalidParameterError(f"the id of a token must be an integer, not {shown(token)}")
            if not 0 <= token < self.n_vocab:
                raise InvalidParameterError(f"there is no token {shown(token)}; ids go from 0 to {self.n_vocab - 1}")
        return [int(token) for token in ids]

    def _part(self, text: str) -> list[int]:
        """Tokens of a part of a prompt that holds no control tokens. Raises ContextOverflowError as `prompt`."""
        part = to_bytes(text)
        self._require_room(part)
        return self._model.tokenize(part, special=False)

    def end_forms(self) -> None:
        """End all forms, those that are being read too. Their answers fail."""
        if (forms := self._forms) is not None:
            forms.end()

    def close(self) -> None:
        """End the processes that render the template and read forms. Calling it twice is no error."""
        self.conversations.close()
        with self._lock:
            if self._forms is not None:
                self._forms.close()

    def _with_bos(self, tokens: list[int]) -> list[int]:
        if self._model.adds_bos and tokens[:1] != [self._model.bos]:
            tokens.insert(0, self._bos())
        return tokens

    def _bos(self) -> int:
        if self._model.bos is None:
            raise InvalidParameterError("the prompt is empty, and this model has no token that begins a text")
        return self._model.bos

    def _name(self, token: int | None) -> str:
        return "" if token is None else self.name_bytes(token).decode("utf-8", "replace")

    @cached_property
    def _control(self) -> dict[str, int]:
        """Text -> id of every control token."""
        return {self._name(token): token for token in self._model.control_tokens()}

    def _sources(self) -> dict[str, TemplateSource]:
        """Chat templates by member."""
        model = self._model
        if model.chat_template is None:
            raise NoTemplateError("the large model has no chat template; give it a raw prompt (--raw) instead")
        bos, eos, first = self._name(model.bos), self._name(model.eos), model.bos if model.adds_bos else None
        return {"large": TemplateSource(model.chat_template, bos, eos, self._control, first), **self._templates}
