"""The processes that keep answers to their forms, by llguidance. `forms.py` is the other end.

A form is what a client wrote, and llguidance can be made to compute for minutes, to take gigabytes, or to overflow its
stack. Here it ends this process at most. One process reads a form, and forks for each answer that keeps to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..system.workers import Connection, at_most, limit_memory
from .gbnf import lark_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

READING_S = 2.0
"""Seconds that reading a form may compute."""
TOKEN_S = 1.0
"""Seconds that one token may compute."""
MEMORY_BYTES = 384 << 20
YES, NO, ERROR = b"y", b"n", b"e"
"""How an answer begins: a token may follow; it may not, but those of the bits after it may; no token may follow."""
_DEAD_END = b"the answer has come to where no token may follow"
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 20_000,
    "step_max_items": 2_000_000,
    "step_lexer_fuel": 4_000_000,
    "initial_lexer_fuel": 20_000_000,
}
"""Above llguidance's own limits, which valid grammars reach: seconds and bytes are what is limited here."""


@dataclass(frozen=True)
class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    eos_token_id: int
    tokens: list[bytes]
    special_token_ids: list[int]
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError  # asked for where a form leaves no choice, which no_forcing turns off


def prepare(material: bytes) -> Callable[[Connection], None]:
    """Read a vocabulary. Returns what keeps one answer to a form over it."""
    from llguidance import LLTokenizer, TokenizerWrapper

    known: dict[str, Any] = json.loads(material)
    pieces, ends = [bytes.fromhex(piece) for piece in known["pieces"]], known["ends"]
    special = {token for token, piece in enumerate(pieces) if not piece} | set(ends)
    names = [f"<|{token}|>".encode() if token in special else piece for token, piece in enumerate(pieces)]
    tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(ends[0], names, sorted(special))), eos_token=ends)
    return lambda connection: _keep(connection, tokenizer, frozenset(ends))


def _keep(connection: Connection, tokenizer: LLTokenizer, ends: frozenset[int]) -> None:
    """Read a form, tell what is wrong with it, and fork for each answer that has to keep to it."""
    limit_memory(MEMORY_BYTES)
    kind, text = connection.receive(), connection.receive().decode("utf-8", "replace")
    with at_most(READING_S):
        matcher, reason = _matcher(tokenizer, kind == b"grammar", text)
    connection.send(ERROR + reason.encode() if matcher is None else YES)
    if matcher:
        connection.fork_for_each(lambda answer: _tell(answer, matcher, ends))


def _tell(connection: Connection, matcher: LLMatcher, ends: frozenset[int]) -> None:
    """Tell, of one answer, which tokens may follow."""
    while True:
        question = json.loads(connection.receive())
        with at_most(TOKEN_S):
            told = _answer(matcher, ends, **question)
        connection.send(told)


def _matcher(tokenizer: LLTokenizer, is_grammar: bool, text: str) -> tuple[LLMatcher | None, str]:
    """Return the matcher of a form, or what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        form = lark_of(text) if is_grammar else text
        matcher = LLMatcher(tokenizer, form, log_level=0, limits=LLParserLimits(verbose_errors=False, **_LIMITS))
    except (ValueError, TypeError, RecursionError) as error:
        return None, _one_line(str(error))
    return (None, _one_line(matcher.get_error())) if matcher.is_error() else (matcher, "")


def _answer(matcher: LLMatcher, ends: frozenset[int], taken: list[int], ahead: list[int], token: int) -> bytes:
    """Tell whether `token` may follow the answer and `ahead`. taken: what the answer has had since the last question.

    Where the form does not allow `ahead`, nothing after it is ever used.
    """
    matcher.consume_tokens(taken)
    if not ends.isdisjoint(ahead) or matcher.validate_tokens(ahead) < len(ahead):
        return YES
    matcher.consume_tokens(ahead)
    is_allowed = matcher.is_accepting() if token in ends else bool(matcher.validate_tokens([token]))
    bits = b"" if is_allowed or matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        return ERROR + (_DEAD_END if "NoExtension" in matcher.get_error() else _one_line(matcher.get_error()).encode())
    if bits and not matcher.is_accepting():
        allowed = bytearray(bits)
        for end in ends:
            allowed[end // 8] &= ~(1 << end % 8)
        bits = bytes(allowed)
    matcher.rollback(len(ahead))
    if bits and not any(bits):
        return ERROR + _DEAD_END
    return NO + bits if bits else YES


def _one_line(text: str) -> str:
    text = text.partition("<backtrace>")[0].replace("<non-verbose/>", "")
    return " ".join(text.split())[:300] or "no reason given"
