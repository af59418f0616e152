"""Scores: how likely the tokens of a given text are in the fused distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import EdgeDLFError
from .stream import Answer, Driver
from .token import Token


@dataclass(frozen=True)
class Score:
    """How likely a given text is.

    logprobs: the natural log of each token's probability in the fused distribution, before any filter.
    alphas: the largest α at each token.
    is_greedy: whether each token was the most likely one.
    """

    logprobs: tuple[float, ...]
    alphas: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """The log-probability of all tokens together."""
        return math.fsum(self.logprobs)


def run_scores(driver: Driver, answers: Iterable[Answer]) -> Iterator[tuple[int, Score]]:
    """Yield the number and the score of each answer, as they are done.

    answers: with `forced` tokens and an `n_top` of 1, not begun. They are pulled as there is room for them.
    Raises the error of any of them.
    """
    numbers: dict[Answer, int] = {}
    try:
        for number, answer in enumerate(answers):
            numbers[answer] = number
            driver.add(answer)
            while len(numbers) > driver.n_parallel:
                yield from _step(driver, numbers)
        while numbers:
            yield from _step(driver, numbers)
    finally:
        for answer in numbers:
            driver.remove(answer)


def _step(driver: Driver, numbers: dict[Answer, int]) -> Iterator[tuple[int, Score]]:
    if next(iter(numbers)) not in driver:
        raise EdgeDLFError("this scoring was ended by a newer request, or by close()")
    for answer in driver.step():
        if answer not in numbers:
            continue
        if answer.error:
            raise answer.error
        if answer.has_ended:
            yield numbers.pop(answer), _score(answer.tokens)


def _score(tokens: Sequence[Token]) -> Score:
    return Score(
        tuple(token.logprob for token in tokens),
        tuple(token.alpha for token in tokens),
        all(token.top_logprobs[0][0] == token.id for token in tokens),
    )
