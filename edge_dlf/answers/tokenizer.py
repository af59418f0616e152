"""Tokens of texts and conversations, and back, by the vocabulary and chat template of the large model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..engine.constraint import Constraint
from ..errors import InvalidParameterError
from .call_grammar import call_grammar
from .dialects import Dialect
from .json_schema import Schemas
from .template import ChatPrompt, ChatTemplate, Message
from .text import to_bytes
from .thinking import AfterThinking, ThinkingTags
from .tools import Tools

if TYPE_CHECKING:
    from ..llama import Model

Prompt: TypeAlias = str | Sequence[int]


class Tokenizer:
    """Tokenizer of a family.

    n_vocab: tokens that all members share.
    """

    def __init__(self, model: Model, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        self._model = model
        self._templates: dict[str, ChatTemplate] = {}
        self._is_closed = False
        self._schemas: Schemas | None = None

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as a raw prompt, as in `FusedLlama.tokenize`."""
        return self._with_bos(self._model.tokenize(to_bytes(text), special=special))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, names of control tokens included."""
        return b"".join(map(self.name_bytes, tokens)).decode("utf-8", "replace")

    def answer(self, text: str, *, is_chat: bool) -> list[int]:
        """Tokens of an answer, as `FusedLlama.tokenize_answer`. Raises InvalidParameterError if nothing can end it."""
        ends = (self._model.eot, self._model.eos) if is_chat else (self._model.eos, self._model.eot)
        last = next((token for token in ends if token is not None), None)
        if last is None:
            raise InvalidParameterError("this model has no token that ends an answer")
        return [*self._model.tokenize(to_bytes(text), special=False), last]

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
        """Tokens of a prompt, one at least. Raises InvalidParameterError for ids that do not exist."""
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else [self.known(token) for token in prompt]
        return tokens or [self._bos()]

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        think: str = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Prompt for the assistant's answer to `messages`, as `ChatTemplate.prompt` makes it."""
        prompt = self._ready_template().prompt(messages, tools, think, variables)
        self._with_bos(prompt)
        return prompt

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
        if tools and grammar is not None:
            raise InvalidParameterError("an answer that may call tools keeps to no grammar")
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
        control = {self._name(token): token for token in self._model.control_tokens()}
        schemas = self._all_schemas(ends)
        return schemas.matcher(call_grammar(dialect, tools, answer, control, schemas.grammar))

    def constraint(
        self, grammar: str | None, schema: Mapping[str, Any] | None, ends: Callable[[int], bool]
    ) -> Constraint | None:
        """Constraint of an answer to a grammar or a JSON schema; None where there is neither.

        grammar: text of a GBNF grammar.
        ends: whether a token ends an answer.
        Raises InvalidParameterError.
        """
        if grammar is not None:
            from ..llama import Grammar

            if schema is not None:
                raise InvalidParameterError("an answer keeps to a grammar or to a JSON schema, not to both")
            if not isinstance(grammar, str):
                raise InvalidParameterError(f"grammar must be text of a GBNF grammar, not {grammar!r:.60}")
            return Grammar(self._model, grammar, self.n_vocab)
        return None if schema is None else self._all_schemas(ends).constraint(schema)

    def _all_schemas(self, ends: Callable[[int], bool]) -> Schemas:
        """Return what makes constraints of JSON schemas. Raises InvalidParameterError."""
        if self._schemas is None:
            last = list(filter(ends, range(self.n_vocab)))
            if not last:
                raise InvalidParameterError("this model has no token that ends an answer, which a JSON schema needs")
            pieces = list(map(self.piece, range(self.n_vocab)))
            self._schemas = Schemas(pieces, last, lambda text: self._model.tokenize(text, special=False))
        return self._schemas

    def known(self, token: int) -> int:
        """`token`, if it exists. Raises InvalidParameterError otherwise."""
        if not 0 <= token < self.n_vocab:
            raise InvalidParameterError(f"there is no token {token}; ids go from 0 to {self.n_vocab - 1}")
        return int(token)

    def close(self) -> None:
        """End the process that renders the template. Calling it twice is no error."""
        self._is_closed = True
        for template in list(self._templates.values()):
            template.close()

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

    def _ready_template(self) -> ChatTemplate:
        """The chat template, compiled once, whichever of several threads comes first."""
        if "chat" not in self._templates:
            made = self._compile_template()
            if self._templates.setdefault("chat", made) is not made:
                made.close()
            if self._is_closed:  # meanwhile, by another thread
                made.close()
        return self._templates["chat"]

    def _compile_template(self) -> ChatTemplate:
        source = self._model.chat_template
        if source is None:
            raise InvalidParameterError("the large model has no chat template; give it a raw prompt instead")
        return ChatTemplate(
            source,
            bos=self._name(self._model.bos),
            eos=self._name(self._model.eos),
            control={self._name(token): token for token in self._model.control_tokens()},
            tokenize=lambda text: self._model.tokenize(to_bytes(text), special=False),
        )
