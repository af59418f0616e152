"""Given texts rather than chosen ones: how likely each of their tokens is in the fused distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..engine.generation import Generation, Pick
from ..engine.scheduler import Scheduler
from ..errors import EdgeDLFError


@dataclass(frozen=True)
class Score:
    """logprobs: natural log of each given token's probability in the fused distribution, before any filter.
    alphas: the largest α at each. is_greedy: whether each was the most likely one."""

    logprobs: tuple[float, ...]
    alphas: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Of all tokens together."""
        return math.fsum(self.logprobs)


def run_scores(scheduler: Scheduler, generations: Iterable[Generation], n_parallel: int) -> Iterator[tuple[int, Score]]:
    """The number and the score of each generation, as they are done; `n_parallel` are evaluated at once.

    generations: with tokens given, and `n_top` of 1. Raises what any of them meets.
    """
    numbered = enumerate(generations)
    running: dict[Generation, tuple[int, list[Pick]]] = {}
    is_exhausted = False
    try:
        while True:
            while not is_exhausted and len(running) <= n_parallel:
                number, generation = next(numbered, (-1, None))
                if generation is None:
                    is_exhausted = True
                    break
                running[generation] = number, []
                scheduler.add(generation)
            if not running:
                return
            if next(iter(running)) not in scheduler:
                raise EdgeDLFError("this scoring was ended by a newer request, or by close()")
            for generation, outcome in scheduler.step():
                if isinstance(outcome, EdgeDLFError):
                    raise outcome
                number, picks = running[generation]
                picks += outcome
                if not generation.unscored():
                    scheduler.remove(generation)
                    del running[generation]
                    yield number, _score(picks)
    finally:
        for generation in running:
            scheduler.remove(generation)


def _score(picks: list[Pick]) -> Score:
    return Score(
        tuple(pick.logprob for pick in picks),
        tuple(max(pick.alphas, default=0.0) for pick in picks),
        all(pick.top_logprobs[0][0] == pick.token for pick in picks),
    )
