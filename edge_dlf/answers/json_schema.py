"""Answers that are JSON of a given schema, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.constraint import Constraint
from ..errors import InvalidParameterError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Tokens = npt.NDArray[np.int64]

_WHITESPACE = r"\x20|\n[\x20\t]{0,20}"
"""Between the parts of JSON: without a bound, a model may go on with it for ever."""


@dataclass(frozen=True)
class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    eos_token_id: int
    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    encode: Callable[[bytes], list[int]]
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


class Schemas:
    """JSON schemas over one vocabulary, by llguidance.

    pieces: bytes of each token, none for those that stand for no text. ends: tokens that end an answer. encode: bytes
    -> tokens.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int], encode: Callable[[bytes], list[int]]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        special = {token for token, piece in enumerate(pieces) if not piece} | set(ends)
        names = [f"<|{token}|>".encode() if token in special else piece for token, piece in enumerate(pieces)]
        vocabulary = _Vocabulary(ends[0], names, sorted(special), encode)
        self._n_vocab = len(pieces)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(ends))

    def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """An answer that is JSON of this schema. Raises InvalidParameterError for one that cannot be kept to."""
        return self.matcher(json.dumps({"grammars": [self.grammar(schema)]}))

    @staticmethod
    def grammar(schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return llguidance's grammar of JSON of this schema. Raises InvalidParameterError."""
        from llguidance import LLMatcher

        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE})
            grammar: Mapping[str, Any] = json.loads(text)["grammars"][0]
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidParameterError(f"the JSON schema cannot be used: {error}") from None
        return grammar

    def matcher(self, grammar: str) -> Constraint:
        """An answer that keeps to a grammar of llguidance. Raises InvalidParameterError."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidParameterError(
                f"the JSON schema cannot be used: {' '.join(matcher.get_error().split())[:300]}"
            )
        return _Matcher(matcher, self._n_vocab)


class _Matcher:
    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab

    def allows(self, guesses: Sequence[int], token: int) -> bool:
        return self._matcher.validate_tokens([*guesses, token]) != len(guesses)

    def banned(self, guesses: Sequence[int]) -> Tokens:
        n_taken = self._matcher.try_consume_tokens(list(guesses))
        try:
            if n_taken < len(guesses):
                return np.empty(0, np.int64)
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            return np.flatnonzero(np.unpackbits(bits, count=self._n_vocab, bitorder="little") == 0)
        finally:
            if n_taken:
                self._matcher.rollback(n_taken)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
