"""OpenAI-shaped dictionaries of an answer, with llama-cpp-python's names."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from .message import Delta
from .stream import Answer, FinishReason
from .token import Token
from .trace_entry import token_entry

Dict: TypeAlias = dict[str, Any]


class Completion:
    """One answer as dictionaries of `create_completion`.

    model: the name that the dictionaries carry.
    logprobs: whether they list log-probabilities.
    piece: token id -> its bytes, those of a control token being its name.
    n_prompt_chars: characters of the prompt, after which offsets of an answer's tokens begin.
    """

    object = "text_completion"
    chunk_object = "text_completion"
    prefix = "cmpl"
    prompt: Any = None
    """What the chat template has made of the request, for its other choices."""

    def __init__(
        self, answer: Answer, model: str, logprobs: bool, piece: Callable[[int], bytes], n_prompt_chars: int = 0
    ) -> None:
        self.answer = answer
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._piece = piece
        self._index = 0
        self._offset = n_prompt_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def join(self, other: Completion, index: int, fields: Dict) -> None:
        """Become the choice number `index` of the result that `other` belongs to. fields: of all its dictionaries."""
        self._head, self._index = {**other._head, **fields}, index

    def result(self, tokens: Sequence[Token]) -> Dict:
        """Return the dictionary of a whole answer."""
        report = self.answer.report
        choice = self._choice(_joined(tokens), self._logprobs_of(tokens), report.finish_reason)
        summary = report.summary()
        if traced := [token_entry(token, self._name) for token in tokens if token.trace]:
            summary["trace"] = {"alpha_max": report.alpha_max, "tokens": traced}
        return {**self._envelope(self.object, choice), "usage": report.usage(), "edge_dlf": summary}

    def chunks(self, tokens: Iterator[Token]) -> Iterator[Dict]:
        """Yield a dictionary for each token, then one with the finish reason, usage and the `edge_dlf` field."""
        yield from self.opening()
        yield from map(self.chunk, tokens)
        report = self.answer.report
        yield {**self.closing(), "usage": report.usage()}

    def opening(self) -> Iterator[Dict]:
        """Yield the chunks before the first token."""
        return iter(())

    def chunk(self, token: Token) -> Dict:
        """Return the chunk of the next token."""
        return self._envelope(self.chunk_object, self._delta(_joined([token]), self._logprobs_of([token]), None))

    def closing(self) -> Dict:
        """Return the chunk that tells why the answer ended, and how it came about."""
        report = self.answer.report
        return {**self._envelope(self.chunk_object, self._end(report.finish_reason)), "edge_dlf": report.summary()}

    def traced(self, token: Token) -> Dict:
        """Return how a traced token came about.

        changed: whether the large model alone would have chosen another one.
        large: its choice, and its log-probability for this token if that is among its likeliest; None where it takes no
            part.
        """
        large = token.trace.members.get("large") if token.trace else None
        return {
            "alpha": token.alpha,
            "expert": token.expert,
            "from_draft": token.from_draft,
            "logprob": token.logprob if math.isfinite(token.logprob) else None,
            "changed": large is not None and large.token != token.id,
            "large": large and {"choice": self._name(large.token), "logprob": dict(large.top_logprobs).get(token.id)},
        }

    def no_choice(self) -> Dict:
        """Return a chunk of no choice, for what concerns all of them."""
        return {**self._head, "object": self.chunk_object, "choices": []}

    def _envelope(self, kind: str, choice: Dict) -> Dict:
        return {**self._head, "object": kind, "choices": [choice]}

    def _choice(self, said: Delta, logprobs: Dict | None, reason: FinishReason | None) -> Dict:
        return {"text": said.text, "index": self._index, "logprobs": logprobs, "finish_reason": reason}

    _delta = _choice

    def _end(self, reason: FinishReason | None) -> Dict:
        return self._choice(Delta(), None, reason)

    def _name(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")

    def _logprobs_of(self, tokens: Sequence[Token]) -> Dict | None:
        """Return the log-probabilities of the next tokens."""
        if not self._logprobs:
            return None
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "text_offset": [self._next_offset(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
        }

    def _next_offset(self, token: int) -> int:
        """Return where the character begins that holds the first byte of the next token, and go on behind the token.

        A token that adds no text, as a control token, stands where the next one begins.
        """
        piece = self.answer.piece(token)
        self._offset += len(self._decoder.decode(piece[:1]))
        is_whole = piece and not self._decoder.getstate()[0]
        offset = self._offset - 1 if is_whole else self._offset
        self._offset += len(self._decoder.decode(piece[1:]))
        return offset

    def _top(self, token: Token) -> dict[str, float]:
        """Return the likely tokens by name, and the chosen one. Parts of characters have one name, U+FFFD: the most
        likely of them, which comes first, is shown."""
        top = {self._name(id): logprob for id, logprob in reversed(token.top_logprobs)}
        return {**top, self._name(token.id): token.logprob}


class ChatCompletion(Completion):
    """One answer as dictionaries of `create_chat_completion`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    _n_calls = 0

    def _choice(self, said: Delta, logprobs: Dict | None, reason: FinishReason | None) -> Dict:
        message: Dict = {"role": "assistant", "content": said.text or (None if said.tool_calls else "")}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.tool_calls:
            message["tool_calls"] = [call.dictionary() for call in said.tool_calls]
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, said: Delta, logprobs: Dict | None, reason: FinishReason | None) -> Dict:
        delta: Dict = {"reasoning_content": said.reasoning} if said.reasoning else {}
        if said.text or not (said.reasoning or said.tool_calls):
            delta["content"] = said.text
        if said.tool_calls:
            delta["tool_calls"] = [call.dictionary(n) for n, call in enumerate(said.tool_calls, self._n_calls)]
            self._n_calls += len(said.tool_calls)
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def opening(self) -> Iterator[Dict]:
        choice = {"index": self._index, "delta": {"role": "assistant"}, "logprobs": None, "finish_reason": None}
        yield self._envelope(self.chunk_object, choice)

    def _end(self, reason: FinishReason | None) -> Dict:
        return {"index": self._index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def _logprobs_of(self, tokens: Sequence[Token]) -> Dict | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {
                    **self._entry(token.id, token.logprob),
                    "top_logprobs": [self._entry(id, logprob) for id, logprob in token.top_logprobs],
                }
                for token in tokens
            ]
        }

    def _entry(self, token: int, logprob: float) -> Dict:
        return {"token": self._name(token), "bytes": list(self._piece(token)), "logprob": logprob}


def _joined(tokens: Sequence[Token]) -> Delta:
    """Return what tokens add to an answer together."""
    return Delta(
        "".join(token.text for token in tokens),
        "".join(token.reasoning for token in tokens),
        tuple(call for token in tokens for call in token.tool_calls),
    )
