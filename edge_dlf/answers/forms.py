"""Answers that keep to a form, JSON of a schema or a GBNF grammar: each is kept to it by a process of its own.

A form is read once for all answers that keep to it at a time, such as the choices of a request or the rows of a batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from ..engine.constraint import StillComputingError, Tokens
from ..errors import InvalidParameterError, require, shown
from ..system.workers import Connection, WorkerEndedError, Workers
from .form_worker import ERROR, MEMORY_BYTES, NO, READING_S, TOKEN_S, YES, prepare
from .gbnf import OPTIONS

_START = {"name": "start", "lark_grammar": f"{OPTIONS}start: @json"}
_WHITESPACE = r"\x20|\n[\x20\t]{0,20}"
"""Between the parts of JSON: without a bound, a model may go on with it for ever."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""What maps names to schemas, which may be named as a keyword is."""
_EXACT, _MOST = 2**53, 2**63 - 1024
"""Whole numbers up to which a double tells all apart, and the largest double of 64 bits."""
_PREPARE = f"{prepare.__module__}:{prepare.__name__}"


def json_grammar(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return llguidance's grammar of JSON of a schema. Raises InvalidParameterError for one that it would change."""
    require("x-guidance" not in schema, "x-guidance of a JSON schema is not offered: it could make what is no JSON")
    try:
        held = _held(schema)
    except RecursionError:
        raise InvalidParameterError("the JSON schema cannot be used: it is nested too deeply") from None
    return {"json_schema": {**held, "x-guidance": {"whitespace_pattern": _WHITESPACE}}}


def _held(schema: Any) -> Any:
    """Return a schema whose numbers llguidance, which reads them as doubles, holds: bounds beyond what a double tells
    apart are moved inwards to the next one. Raises InvalidParameterError for a constant that it would change."""
    if isinstance(schema, Mapping):
        return {key: _held_under(key, value) for key, value in schema.items()}
    return [*map(_held, schema)] if isinstance(schema, list | tuple) else schema


def _held_under(key: str, value: Any) -> Any:
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _held(schema) for name, schema in value.items()}
    if key in ("const", "enum"):
        _require_exact(value)
        return value
    is_lower = key in ("minimum", "exclusiveMinimum")
    is_bound = (is_lower or key in ("maximum", "exclusiveMaximum")) and isinstance(value, int | float)
    if not is_bound or not abs(value) > _EXACT:
        return _held(value)
    sign = 1 if is_lower else -1
    require(sign * value <= _MOST, f"the JSON schema cannot be used: {key} {shown(value)} is beyond 64 bits")
    inwards = float(max(sign * value, -_MOST))
    return sign * int(inwards if inwards >= sign * value else math.nextafter(inwards, math.inf))


def _require_exact(value: Any) -> None:
    """Raise InvalidParameterError for a constant that holds a whole number which is no double."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            _require_exact(part)
    is_exact = not isinstance(value, int) or abs(value) <= _EXACT
    require(is_exact, f"the JSON schema cannot be used: {shown(value)} is beyond 2**53; give it as text")


_Question: TypeAlias = tuple[tuple[int, ...], int]
"""Tokens after those of the answer that the worker knows, and the token in question."""
_T = TypeVar("_T")


class Forms:
    """Forms over one vocabulary.

    pieces: bytes of each token, none for those that stand for no text. ends: tokens that end an answer.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int]) -> None:
        self._n_vocab = len(pieces)
        material = {"pieces": [piece.hex() for piece in pieces], "ends": list(ends)}
        self._workers = Workers(_PREPARE, json.dumps(material).encode())
        self._read: WeakValueDictionary[tuple[str, str], Connection] = WeakValueDictionary()
        """Processes that have read a form, by its kind and text, as long as an answer keeps to it."""

    def grammar(self, text: str) -> Form:
        """Return the form of a GBNF grammar. Raises InvalidParameterError for one that cannot be kept to."""
        return self._form("grammar", text)

    def schema(self, schema: Mapping[str, Any]) -> Form:
        """Return the form of JSON of a schema. Raises InvalidParameterError for one that cannot be kept to."""
        try:
            text = json.dumps({"grammars": [_START, {**json_grammar(schema), "name": "json"}]})
        except InvalidParameterError:
            raise
        except (TypeError, ValueError) as error:
            raise InvalidParameterError(f"the JSON schema cannot be used: {error}") from None
        return self._form("JSON schema", text)

    def calls(self, grammar: str) -> Form:
        """Return the form of a grammar of llguidance that `call_grammar` made. Raises InvalidParameterError."""
        return self._form("JSON schema", grammar)

    def end(self) -> None:
        """End all forms, those that are being read too. Their answers fail; later ones are kept to."""
        self._read.clear()
        self._workers.end()

    def close(self) -> None:
        """End the process that they come from. Calling it twice is no error."""
        self._read.clear()
        self._workers.close()

    def _form(self, kind: str, text: str) -> Form:
        if (known := self._read.get((kind, text))) is not None:
            with suppress(WorkerEndedError):
                return Form(kind, known, self._n_vocab)
        try:
            reader = self._workers.worker()
            reader.send(kind.encode(), text.encode("utf-8", "replace"))
            if (reply := reader.receive()).startswith(ERROR):
                raise InvalidParameterError(f"the {kind} cannot be used: {reply[1:].decode()}")
            self._read[kind, text] = reader
            return Form(kind, reader, self._n_vocab)
        except WorkerEndedError:
            raise InvalidParameterError(
                f"the {kind} cannot be used: it is nested too deeply, or takes more than {READING_S:g} s or "
                f"{MEMORY_BYTES >> 20} MiB to read"
            ) from None


class Form:
    """A `Constraint` that another process keeps to, with the state of one answer. reader: what has read the form."""

    def __init__(self, kind: str, reader: Connection, n_vocab: int) -> None:
        self._kind, self._reader, self._worker, self._n_vocab = kind, reader, reader.fork(), n_vocab
        self._told: list[int] = []
        """Tokens of the answer, of which the worker knows `_n_told`."""
        self._n_told = 0
        self._asked: _Question | None = None
        """The question that the worker has not answered."""
        self._allowed: set[_Question] = set()
        self._banned: dict[tuple[int, ...], Tokens] = {}
        """What is known of the tokens after some text, which includes those that the worker was not told."""

    def banned(self, ahead: Sequence[int], token: int, patience_s: float | None) -> Tokens | None:
        question = (*self._told[self._n_told :], *ahead), token
        while not self._is_known(question):
            if self._asked is None:
                self._ask(ahead, token)
                question = tuple(ahead), token
            if not self._worker.has_come(patience_s):
                raise StillComputingError
            self._hear()
        return None if question in self._allowed else self._banned[question[0]]

    def accept(self, token: int) -> None:
        self._told.append(token)

    def is_computing(self, patience_s: float) -> bool:
        return self._asked is not None and not self._worker.has_come(patience_s)

    def _is_known(self, question: _Question) -> bool:
        """Tell whether the answer to a question is known, maybe from all tokens that are banned there."""
        text, token = question
        if text in self._banned:
            banned = self._banned[text]
            at = int(np.searchsorted(banned, token))
            if at == len(banned) or banned[at] != token:
                self._allowed.add(question)
        return question in self._allowed or text in self._banned

    def _ask(self, ahead: Sequence[int], token: int) -> None:
        new = self._told[self._n_told :]
        self._n_told = len(self._told)
        if new:
            self._allowed.clear()
            self._banned.clear()
        self._asked = tuple(ahead), token
        self._worker_does(
            lambda: self._worker.send(json.dumps({"taken": new, "ahead": [*ahead], "token": token}).encode())
        )

    def _hear(self) -> None:
        """Take in the answer to the question. Raises InvalidParameterError if the answer cannot go on."""
        assert self._asked
        question, self._asked = self._asked, None
        reply = self._worker_does(self._worker.receive)
        if reply.startswith(ERROR):
            raise InvalidParameterError(f"the {self._kind} cannot be kept to: {reply[1:].decode()}")
        if reply == YES:
            self._allowed.add(question)
        else:
            bits = np.frombuffer(reply, np.uint8, offset=len(NO))
            self._banned[question[0]] = np.flatnonzero(np.unpackbits(bits, count=self._n_vocab, bitorder="little") == 0)

    def _worker_does(self, what: Callable[[], _T]) -> _T:
        try:
            return what()
        except WorkerEndedError:
            raise InvalidParameterError(
                f"the {self._kind} cannot be kept to: one token takes more than {TOKEN_S:g} s, or all of the answer "
                f"more than {MEMORY_BYTES >> 20} MiB"
            ) from None
