"""GBNF grammars, by llama.cpp's own sampler."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ..errors import InvalidParameterError
from .model import Model
from .runtime import initialise

_DEEPEST = 200
"""Most groups within groups: llama.cpp's parser is recursive."""
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_stderr_lock = threading.Lock()


class Grammar:
    """A `Constraint` by a GBNF grammar over the first `n_vocab` tokens of a model, with the state of one answer.

    Raises InvalidParameterError for text that is no grammar.
    """

    def __init__(self, model: Model, text: str, n_vocab: int) -> None:
        log = initialise()
        depths = accumulate((char == "(") - (char == ")") for char in text)
        if max(depths, default=0) > _DEEPEST or not text.strip() or "\0" in text:
            raise InvalidParameterError("the grammar cannot be used: it is empty, nested too deeply, or no text")
        self._model = model
        self._n_vocab = n_vocab
        self._has_ended = False
        with log.listening(), _complaints() as lines:
            self._sampler = lib.llama_sampler_init_grammar(model.vocab, text.encode("utf-8", "replace"), b"root")
        if not self._sampler:
            raise InvalidParameterError(f"the grammar cannot be used: {lines[0] if lines else log.reason()}")

    def __del__(self) -> None:
        if getattr(self, "_sampler", None):
            lib.llama_sampler_free(self._sampler)

    def allows(self, guesses: Sequence[int], token: int) -> bool:
        with self._after(guesses) as sampler:
            return sampler is None or bool(len(_allowed(sampler, np.array([token]))))

    def banned(self, guesses: Sequence[int]) -> npt.NDArray[np.int64]:
        with self._after(guesses) as sampler:
            if sampler is None:
                return np.empty(0, np.int64)
            every = np.arange(self._n_vocab)
            return np.setdiff1d(every, _allowed(sampler, every), assume_unique=True)

    def accept(self, token: int) -> None:
        # What follows an end, as a draft's later guesses do, is never used; llama.cpp would end the process over it.
        self._has_ended = self._has_ended or self._model.is_eog(token)
        if not self._has_ended:
            lib.llama_sampler_accept(self._sampler, token)

    @contextmanager
    def _after(self, guesses: Sequence[int]) -> Iterator[Any]:
        """The sampler after `guesses`; None where the grammar does not allow them, or the answer has ended."""
        if self._has_ended:
            yield None
            return
        if not guesses:
            yield self._sampler
            return
        state = lib.llama_sampler_clone(self._sampler)
        try:
            for token in guesses:
                # A token that is not allowed would end the process.
                if self._model.is_eog(token) or not len(_allowed(state, np.array([token]))):
                    yield None
                    return
                lib.llama_sampler_accept(state, token)
            yield state
        finally:
            lib.llama_sampler_free(state)


def _allowed(sampler: Any, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Tokens out of `tokens` that the grammar allows next."""
    candidates = np.zeros(len(tokens), _CANDIDATE)
    candidates["id"] = tokens
    array = lib.llama_token_data_array(
        data=candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data)),
        size=len(tokens),
        selected=-1,
        sorted=False,
    )
    lib.llama_sampler_apply(sampler, ctypes.byref(array))
    allowed: npt.NDArray[np.int64] = tokens[np.isfinite(candidates["logit"])]
    return allowed


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Catch what llama.cpp writes about a grammar: it goes to stderr, not to the logger. Yields a list of lines."""
    lines: list[str] = []
    with _stderr_lock, tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read(2000).decode("utf-8", "replace")
            first = text.strip().splitlines()[:1]
            lines += [line.removeprefix("parse: error parsing grammar: ")[:200] for line in first]
