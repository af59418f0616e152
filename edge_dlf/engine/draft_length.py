"""How many tokens to draft: the number that promises the most tokens per second, none included."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..params import MAX_DRAFT

OTHER = ""
"""The cost of everything in a step but the members' own decoding."""


@dataclass(frozen=True)
class Candidate:
    """One way to draft.

    drafter: the name under which its acceptance is counted.
    verifiers: members that evaluate the whole draft in one batch.
    member: the member that decodes ahead; None where guesses cost nothing.
    is_fused: whether the rows of that member are fused too, so that it evaluates the last token in any case.
    n_behind: tokens that it has to evaluate before its first guess.
    """

    drafter: str
    verifiers: tuple[str, ...]
    member: str | None = None
    is_fused: bool = True
    n_behind: int = 1


class DraftLength:
    """Placeholder until the measured rule replaces it."""

    def __init__(self, n_bytes: Mapping[str, int]) -> None:
        self._seconds: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._accepted: dict[str, float] = defaultdict(lambda: 0.7)

    def timed(self, member: str, n_tokens: int, seconds: float) -> None:
        self._seconds[member, n_tokens].append(seconds)

    def judged(self, drafter: str, probability: float, accepted: bool) -> None:
        self._accepted[drafter] += 0.05 * (accepted - self._accepted[drafter])

    def _cost(self, member: str, n: int) -> float:
        while n > 1 and not self._seconds[member, n]:
            n -= 1
        return median(self._seconds[member, n] or [0.0])

    def best(self, candidate: Candidate, n_most: int) -> tuple[float, int]:
        a, best, n_best = self._accepted[candidate.drafter], 0.0, 0
        for n in range(n_most + 1):
            seconds = sum(self._cost(name, n + 1) for name in (*candidate.verifiers, OTHER))
            if candidate.member:
                seconds += max(n, 1 if candidate.is_fused else 0) * self._cost(candidate.member, 1)
            rate = sum(a**k for k in range(n + 1)) / max(seconds, 1e-9)
            if rate > best:
                best, n_best = rate, n
        return best, n_best

    def goes_on(self, candidate: Candidate, probabilities: Sequence[float], n_most: int) -> bool:
        return len(probabilities) < min(n_most, MAX_DRAFT)
