"""The number of tokens to draft: as many as promise the most tokens per second, none included."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence

from ..params import MAX_DRAFT

_MEMORY = 5
"""Steps with one draft length that are remembered. The shortest of them tells what such a step takes."""
_SLOPE = 0.1
"""Estimated cost of one more drafted token beside its guess, in plain steps, until it is measured."""
_USUAL = 0.7
"""Estimated chance of a guess, for a drafter that has made none yet."""
_DECAY = 0.95
"""Weight of each earlier guess in what is known of its drafter."""
_SHARE = 0.01
"""Share of the time that drafting may lose against plain steps. Also the share of steps that are plain in any case, so
that it is known whether drafting still pays."""


class DraftLength:
    """Chooses how many tokens to draft, for all generations that the same members decode.

    A draft of n tokens that are accepted with chances a₁ … aₙ gives 1 + a₁ + a₁a₂ + … tokens. It takes as long as steps
    with such a draft took before. Whether drafting pays at all is measured: each drafted step gains or loses time
    against a plain one. Drafting pauses while its losses exceed its gains.

    drafts: whether the next step may draft. If not, it has to be a plain one.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        """costs: of one guess of each drafter, in plain steps. They estimate draft lengths that were never timed."""
        self.drafts = False
        self._costs = costs
        self._seconds: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=_MEMORY))
        self._renewed: set[tuple[str, int]] = set()
        self._estimates: dict[str, list[float]] = {}
        self._usual: dict[str, float] = defaultdict(lambda: _USUAL)
        self._n_wrong: dict[str, float] = defaultdict(float)
        self._n_wrong_expected: dict[str, float] = defaultdict(float)
        self._credit = 1.0  # in plain steps
        self._n_steps = 0

    def judged(self, drafter: str, probability: float, accepted: bool) -> None:
        """Note whether a guess is the token that was picked. probability: by the drafter itself."""
        usual = self._usual[drafter]
        self._usual[drafter] = usual + (1 - _DECAY) * (self._chance(drafter, probability) - usual)
        self._n_wrong[drafter] = _DECAY * self._n_wrong[drafter] + (not accepted)
        self._n_wrong_expected[drafter] = _DECAY * self._n_wrong_expected[drafter] + 1 - probability

    def stepped(self, drafter: str, n_drafted: int, n_tokens: int, seconds: float, reading_s: float = 0.0) -> None:
        """Note a step that gave `n_tokens`.

        drafter: empty for a plain step.
        n_drafted: tokens of the draft that were verified.
        reading_s: time in which a drafter outside the fusion read the text first, beside `seconds`.
        """
        self._seconds[drafter, n_drafted].append(seconds)
        self._renewed.add((drafter, n_drafted))
        self._estimates.clear()
        plain = max(min(self._seconds["", 0]), 1e-9)
        if drafter:  # a step that takes far longer than others was disturbed by another program
            self._credit += max(-1.0, n_tokens - (seconds + reading_s) / plain)
        self._credit = min(float(MAX_DRAFT), self._credit + _SHARE * n_tokens)
        self._n_steps += 1
        is_due = self._n_steps % round(1 / _SHARE) == 0
        if is_due:
            for key in self._seconds.keys() - self._renewed - {("", 0)}:
                del self._seconds[key]
            self._renewed.clear()
        self.drafts = not is_due and self._credit > (0.0 if self.drafts else 1.0)

    def best(self, drafter: str, n_most: int, probabilities: Sequence[float] = ()) -> tuple[float, int]:
        """Return the most tokens per second that a draft of up to `n_most` tokens promises, and its length.

        probabilities: of the guesses, by the drafter itself, as far as they are known.
        """
        rates = [tokens / seconds for tokens, seconds in self._lengths(drafter, n_most, probabilities)]
        n = max(range(len(rates)), key=rates.__getitem__)
        return rates[n], n

    def wanted(self, drafter: str, n_most: int, probabilities: Sequence[float], rate: float) -> int:
        """Return the best length of the draft that begins with these guesses; more than there are if more guesses pay.

        rate: tokens per second to beat, as `best` gave them. The time of the guesses made so far is spent in any case.
        """
        guess = self._costs.get(drafter, 0.0) * min(self._seconds["", 0])
        gains = [
            tokens - rate * (seconds + guess * max(0, len(probabilities) - max(n, 1)))
            for n, (tokens, seconds) in enumerate(self._lengths(drafter, n_most, probabilities))
        ]
        return max(range(len(gains)), key=gains.__getitem__)

    def _chance(self, drafter: str, probability: float) -> float:
        """Return the chance that a guess is accepted: 1 − k (1 − probability), where k is how many times more often
        than the drafter expected its guesses were wrong."""
        ratio = (self._n_wrong[drafter] + 1) / (self._n_wrong_expected[drafter] + 1)
        return max(0.0, 1 - ratio * (1 - probability))

    def _lengths(self, drafter: str, n_most: int, probabilities: Sequence[float]) -> Iterator[tuple[float, float]]:
        """Yield expected tokens and seconds of drafts of 0, 1, … tokens."""
        if drafter not in self._estimates:
            self._estimates[drafter] = self._estimated(drafter)
        tokens = all_accepted = 1.0
        for n, seconds in enumerate(self._estimates[drafter][: n_most + 1]):
            if n:
                is_known = n <= len(probabilities)
                all_accepted *= self._chance(drafter, probabilities[n - 1]) if is_known else self._usual[drafter]
                tokens += all_accepted
            yield tokens, max(seconds, 1e-9)

    def _estimated(self, drafter: str) -> list[float]:
        """Return the seconds of steps with drafts of 0, 1, … tokens, up to one more than twice the longest timed."""
        plain = min(self._seconds["", 0])
        known = {n: min(timed) for (name, n), timed in self._seconds.items() if name == drafter}
        known.setdefault(0, plain)
        seconds = []
        for n in range(min(MAX_DRAFT, 2 * max(known) + 1) + 1):
            if n == 0 or len(self._seconds.get((drafter, n), ())) > 1:
                seconds.append(known[n])
                continue
            below, above = max(m for m in known if m < n), min((m for m in known if m > n), default=0)
            slope = (_SLOPE + self._costs.get(drafter, 0.0)) * plain
            if above:
                between = (known[above] - known[below]) / (above - below)
                slope = between if below else min(slope, between)
            # A length that was timed only once may have been disturbed.
            seconds.append(min(known[below] + (n - below) * slope, known.get(n, math.inf)))
        return seconds
