"""The number of tokens to draft: as many as promise the most tokens per second, none included."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

from ..params import MAX_DRAFT
from .backend import Logits

_MEMORY = 5
"""Steps with as many drafted tokens that are remembered. Their median tells what such a step takes."""
_N_PLAIN = 2
"""Plain steps that have to be timed before any is drafted: at first, and anew after each 1 / _SHARE steps, since other
programs come and go."""
_SLOPE = 0.1
"""Estimated cost of one more token in a batch beside its guess, in plain steps of one row, until it is measured."""
_USUAL = 0.7
"""Estimated chance of a guess, for a drafter that has made none yet."""
_DECAY = 0.97
"""Weight of earlier guesses in what is known of a drafter, after each new one."""
_PRIOR = 2.0
"""Guesses that the drafter's own probability counts for."""
_SHARE = 0.01
"""Share of the time that drafting may lose against plain steps. After 1 / _SHARE steps, what was timed before is
doubted."""


@dataclass
class Draft:
    """Tokens guessed to follow the text of one generation.

    n_most: tokens that it may have.
    probabilities: of each token, by the drafter.
    n_verified: how many of the tokens the members verify in this step.
    rows: rows of a drafting member that is fused too: after the text, and after each guess that it has evaluated. None
        where the drafter is no member of the fusion.
    """

    n_most: int
    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    n_verified: int = 0
    rows: list[Logits] | None = None

    @property
    def ahead(self) -> list[int]:
        """The tokens that are verified."""
        return self.tokens[: self.n_verified]


class Experience:
    """What was learnt of drafts for the same members, whatever the number of rows.

    usual: chance of a guess that is not made yet, by drafter.
    pays: whether drafting has lost no more than it may lately. If not, it pauses.
    """

    def __init__(self) -> None:
        self.pays = False
        self._credit = 1.0  # in plain steps
        self.usual: dict[str, float] = defaultdict(lambda: _USUAL)
        self._n_accepted: dict[tuple[str, int], float] = defaultdict(float)
        self._n_judged: dict[tuple[str, int], float] = defaultdict(float)

    def gained(self, n_steps: float) -> None:
        """Note what drafting gained against plain steps, in plain steps; negative where it lost."""
        self._credit = min(float(MAX_DRAFT), self._credit + n_steps)
        self.pays = self._credit > (0.0 if self.pays else 1.0)

    def judged(self, drafter: str, probability: float, accepted: bool) -> None:
        """Note whether a guess is the token that was picked. probability: by the drafter itself."""
        usual, key = self.usual[drafter], (drafter, _doubt(probability))
        self.usual[drafter] = usual + (1 - _DECAY) * (self.chance(drafter, probability) - usual)
        self._n_accepted[key] = _DECAY * self._n_accepted[key] + accepted
        self._n_judged[key] = _DECAY * self._n_judged[key] + 1

    def chance(self, drafter: str, probability: float) -> float:
        """Return the chance that a guess is accepted: how often those of the same drafter were that it was as sure
        of. While there are few, its own probability counts too."""
        key = drafter, _doubt(probability)
        return (self._n_accepted[key] + _PRIOR * probability) / (self._n_judged[key] + _PRIOR)


def _doubt(probability: float) -> int:
    """Return the class of guesses that are counted together: each has half the doubt of the one before."""
    return min(7, int(-math.log2(max(1 - probability, 1e-9))))


class DraftLength:
    """Chooses how many tokens to draft in steps of `n_rows` rows that the same members decode.

    A draft of n tokens that are accepted with chances a₁ … aₙ gives its row 1 + a₁ + a₁a₂ + … tokens. The step takes as
    long as steps with so many drafted tokens in all their rows took before. Whether drafting pays at all is measured:
    each drafted step gains or loses time against a plain one. Drafting pauses while its losses exceed its gains.
    """

    def __init__(self, costs: Mapping[str, float], n_rows: int = 1, experience: Experience | None = None) -> None:
        """costs: of one guess of each drafter for every row, in plain steps. They estimate steps that were never timed.
        experience: with other numbers of rows."""
        self.experience = experience or Experience()
        self._costs = costs
        self._n_rows = n_rows
        self._seconds: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=_MEMORY))
        self._renewed: set[tuple[str, int]] = set()
        self._estimates: dict[str, list[float]] = {}
        self._n_steps = 0
        self._was_plain = False

    @property
    def drafts(self) -> bool:
        """Whether the next step may draft. If not, it has to be a plain one."""
        return len(self._seconds["", 0]) >= _N_PLAIN and self.experience.pays

    def stepped(self, drafter: str, n_drafted: int, n_tokens: int, seconds: float, reading_s: float = 0.0) -> None:
        """Note a step that gave its rows `n_tokens` together.

        drafter: empty for a plain step.
        n_drafted: tokens of all drafts that were verified.
        reading_s: time in which a drafter outside the fusion read the text first, beside `seconds`.
        """
        # The first plain step after a drafted one takes longer than those that follow, as any change of sizes does.
        if drafter or self._was_plain:
            self._seconds[drafter, n_drafted].append(seconds)
            self._renewed.add((drafter, n_drafted))
            self._estimates.clear()
        self._was_plain = not drafter
        if not self._seconds["", 0]:
            return
        n_each = n_tokens / self._n_rows
        gained = _SHARE * n_each
        if drafter:  # what takes far longer than usual was disturbed by another program
            plain = max(median(self._seconds["", 0]), 1e-9)
            gained += max(-2.0, n_each - seconds / plain) - min(1.0, reading_s / plain)
        self.experience.gained(gained)
        self._n_steps += 1
        if self._n_steps % round(1 / _SHARE) == 0:
            for key in self._seconds.keys() - self._renewed | {("", 0)}:
                del self._seconds[key]
            self._renewed.clear()

    def best(self, drafter: str, drafts: Collection[Draft]) -> tuple[float, int]:
        """Return the most tokens per second that drafts promise, and the length that each of them has at most."""
        rates = [tokens / seconds for tokens, seconds in self._lengths(drafter, drafts)]
        n = max(range(len(rates)), key=rates.__getitem__)
        return rates[n], n

    def wanted(self, drafter: str, drafts: Collection[Draft], rate: float) -> int:
        """Return the best length of drafts that begin with these guesses; more than there are if more guesses pay.

        rate: tokens per second to beat, as `best` gave them. The time of the guesses made so far is spent in any case.
        """
        guess = self._costs.get(drafter, 0.0) * median(self._seconds["", 0])
        n_guessed = max(len(draft.probabilities) for draft in drafts)
        gains = [
            tokens - rate * (seconds + guess * max(0, n_guessed - max(n, 1)))
            for n, (tokens, seconds) in enumerate(self._lengths(drafter, drafts))
        ]
        return max(range(len(gains)), key=gains.__getitem__)

    def _lengths(self, drafter: str, drafts: Collection[Draft]) -> Iterator[tuple[float, float]]:
        """Yield expected tokens and seconds of steps in which each row's draft has up to 0, 1, … tokens."""
        if drafter not in self._estimates:
            self._estimates[drafter] = self._estimated(drafter)
        seconds, usual = self._estimates[drafter], self.experience.usual[drafter]
        tokens, n_drafted = float(self._n_rows), 0
        all_accepted = [1.0] * len(drafts)
        yield tokens, max(seconds[0], 1e-9)
        for n in range(1, max([draft.n_most for draft in drafts], default=0) + 1):
            for i, draft in enumerate(drafts):
                if n <= draft.n_most:
                    known = n <= len(draft.probabilities)
                    all_accepted[i] *= self.experience.chance(drafter, draft.probabilities[n - 1]) if known else usual
                    tokens += all_accepted[i]
                    n_drafted += 1
            if n_drafted >= len(seconds):
                return
            yield tokens, max(seconds[n_drafted], 1e-9)

    def _estimated(self, drafter: str) -> list[float]:
        """Return the seconds of steps with 0, 1, … drafted tokens, up to twice the most timed and one more a row."""
        plain = median(self._seconds["", 0])
        known = {n: median(timed) for (name, n), timed in self._seconds.items() if name == drafter}
        known.setdefault(0, plain)
        # A batch of one token for each row computes more, so that one more token is a smaller part of it.
        per_token = _SLOPE / (1 + _SLOPE * (self._n_rows - 1)) + self._costs.get(drafter, 0.0) / self._n_rows
        seconds = []
        for n in range(min(MAX_DRAFT * self._n_rows, 2 * max(known) + self._n_rows) + 1):
            if n == 0 or len(self._seconds.get((drafter, n), ())) > 1:
                seconds.append(known[n])
                continue
            below, above = max(m for m in known if m < n), min((m for m in known if m > n), default=0)
            slope = per_token * plain
            if above:
                between = (known[above] - known[below]) / (above - below)
                slope = between if below else min(slope, between)
            # A number of tokens that was timed only once may have been disturbed.
            seconds.append(min(known[below] + (n - below) * slope, known.get(n, math.inf)))
        return seconds
