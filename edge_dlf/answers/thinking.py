"""Thinking before an answer: left free by the grammar of the answer, and closed when its budget is used up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..engine.constraint import Constraint, Tokens

_Phase: TypeAlias = Literal["start", "thinking", "gap", "answer"]
_MAX_SPACE = 4
"""Bytes of white space before thinking, or between it and the answer, that a grammar is not asked about."""


class _State(NamedTuple):
    """How far an answer has come.

    text: its end, as far as a tag may have begun in it. n_tokens: tokens of thinking. n_closing: those of the closing
    text that are written. ahead: tokens of the answer that its own constraint has not accepted yet.
    """

    phase: _Phase
    text: bytes = b""
    n_tokens: int = 0
    n_closing: int = 0
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True)
class ThinkingTags:
    """opens, closes: what stands before and after thinking; without `opens`, every answer begins with thinking.
    closing: tokens that are written where thinking is ended."""

    opens: bytes
    closes: bytes
    closing: tuple[int, ...]


class AfterThinking:
    """A `Constraint` that leaves thinking free and holds the answer after it to another one.

    name: token -> bytes, those of a control token being its name. is_end: whether a token ends the answer.
    is_thinking: whether the prompt ends within thinking.
    budget: most tokens of thinking, after which it is closed; None for any number.
    inner: the constraint of the answer; None for none.
    """

    def __init__(
        self,
        tags: ThinkingTags,
        name: Callable[[int], bytes],
        is_end: Callable[[int], bool],
        n_vocab: int,
        *,
        is_thinking: bool,
        budget: int | None,
        inner: Constraint | None,
    ) -> None:
        self._tags, self._name, self._is_end, self._n_vocab = tags, name, is_end, n_vocab
        self._budget, self._inner = budget, inner
        self._patience_s: float | None = None
        self._state = _State("thinking" if is_thinking or not tags.opens else "start")

    def banned(self, ahead: Sequence[int], token: int, patience_s: float | None) -> Tokens | None:
        self._patience_s = patience_s
        state = self._after(ahead)
        if state is None or self._step(state, token) is not None:
            return None
        if self._must_close(state):
            return np.delete(np.arange(self._n_vocab), self._tags.closing[state.n_closing])
        if state.phase == "thinking" or state.text.strip():
            return np.array([token for token in range(self._n_vocab) if self._step(state, token) is None], np.int64)
        banned = self._inner.banned(state.ahead, token, patience_s) if self._inner else None
        if state.phase == "answer" or banned is None:
            return banned
        return np.array([token for token in banned.tolist() if self._before_answer(state, token) is None], np.int64)

    def accept(self, token: int) -> None:
        self._patience_s = None
        state = self._step(self._state, token)
        if state is None:
            return
        if state.ahead and self._inner:
            self._inner.accept(token)
        self._state = state._replace(ahead=())

    def is_computing(self, patience_s: float) -> bool:
        return self._inner is not None and self._inner.is_computing(patience_s)

    def _after(self, guesses: Sequence[int]) -> _State | None:
        """Return the state after `guesses`; None where they may not follow."""
        state: _State | None = self._state
        for token in guesses:
            state = state and self._step(state, token)
        return state

    def _must_close(self, state: _State) -> bool:
        is_used_up = self._budget is not None and state.n_tokens >= self._budget
        return state.phase == "thinking" and (is_used_up or state.n_closing > 0)

    def _step(self, state: _State, token: int) -> _State | None:
        """Return the state after one more token; None where it may not follow."""
        if state.phase == "thinking":
            return self._think(state, token)
        has_tag = state.phase == "start" and bool(state.text.strip())  # a part of one, which is to be completed
        if self._inner and not has_tag and self._inner.banned(state.ahead, token, self._patience_s) is None:
            return _State("answer", ahead=(*state.ahead, token))
        if state.phase == "answer":
            return None if self._inner else state
        return self._before_answer(state, token) or (None if self._inner else _State("answer"))

    def _think(self, state: _State, token: int) -> _State | None:
        if self._must_close(state):
            if token != self._tags.closing[state.n_closing]:
                return None
            n_closing = state.n_closing + 1
            return _State("gap") if n_closing == len(self._tags.closing) else state._replace(n_closing=n_closing)
        if self._inner and self._is_end(token):
            return None
        text = state.text + self._name(token)
        _, closes, rest = text.partition(self._tags.closes)
        if closes:
            return None if self._inner and rest.strip() else _State("gap", rest)
        return state._replace(text=text[-len(self._tags.closes) + 1 :], n_tokens=state.n_tokens + 1)

    def _before_answer(self, state: _State, token: int) -> _State | None:
        """Return the state after a token that comes before the answer; None where it belongs to the answer."""
        text = state.text + self._name(token)
        begun = text.lstrip()
        if not begun:
            return state._replace(text=text) if len(text) <= _MAX_SPACE else None
        if state.phase == "gap":
            return None
        if begun.startswith(self._tags.opens):
            return _State("thinking", begun[len(self._tags.opens) :])
        return state._replace(text=text) if self._tags.opens.startswith(begun) else None
