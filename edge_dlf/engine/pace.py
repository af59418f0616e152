"""How many tokens to draft: what gives the most tokens a second by measured costs and acceptance, none included."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ..params import MAX_DRAFT

FUSION = ""
"""The cost of everything but the members' own decoding: search, fusion and choice."""

_SLOPE = 0.15
"""Guess for what one more token in a batch costs, relative to a batch of one, until it has been measured: a low one,
since a length that is never tried is never measured."""
_MEMORY = 5
"""Timings of one member at one batch size that count."""
_PATIENCE = 128, 8192
"""Steps after which timings that were not renewed are doubted, for the first time and at most: it doubles each time."""
_RENEWAL = 8
"""Steps between one look at the age of timings and the next."""
_CHANGE = 0.05
"""By how much what a batch takes has to change for costs to be summed up anew."""
_MARGIN, _MARGIN_OUTSIDE = 0.02, 0.2
"""By how much a draft has to be better than none, by one that is outside the fusion and would have to read the text."""
_EDGES = (0.2, 0.4, 0.6, 0.75, 0.87, 0.95, 0.99)
"""Between these probabilities, which a drafter gives to its own guesses, acceptance is counted apart."""
_DECAY = 0.97
"""Weight of an outcome after each later one that is counted with it."""
_TRUST = 3.0
"""Outcomes that a drafter's own probability, corrected by how it fared at large, counts for."""
_USUAL, _USUAL_DECAY = 0.7, 0.9
"""The chance of a guess that is not known yet: at first, and the weight of what it was after each guess."""
_OBLIVION = 400
"""Steps over which a member that drafted in vain gets another chance."""
_SPREAD = 32
"""Tokens over which a member outside the fusion is expected to draft once it has read the text."""
_TURN = 8
"""Steps of one kind whose speed is compared with that of the other kind."""
_TURN_DECAY, _OUTLIER = 0.5, 9.0
"""Weight of a turn after the next one of its kind; the longest that a step counts for, in usual ones: the longest draft
may take as long."""
_BETWEEN = 32, 4096
"""Steps of the quicker kind before the other is tried, at first and at most; at most they double each time."""
_SHARE = 0.01
"""Of all time that is lost by trying the slower kind once that is tried as seldom as can be."""


@dataclass(frozen=True)
class Way:
    """One way of drafting.

    drafter: what its acceptance is known by. batched: members that evaluate the whole draft in one batch. member: the
    one that decodes ahead, None where guesses cost nothing. is_fused: whether its rows are fused too, so that it has to
    evaluate the last token in any case, and the last guess once all are accepted. n_behind: tokens that it has to
    evaluate before its first guess.
    """

    drafter: str
    batched: tuple[str, ...]
    member: str | None = None
    is_fused: bool = True
    n_behind: int = 1


class _Timings:
    """What a batch of one size took lately. median: of these times. step: when it was last timed."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_MEMORY)
        self.median = math.nan
        self.step = 0
        self._patience = _PATIENCE[0]

    def add(self, seconds: float, step: int) -> None:
        if self.is_old(step):
            self.seconds.clear()
            self._patience = min(2 * self._patience, _PATIENCE[1])
        self.seconds.append(seconds)
        self.median = median(self.seconds)
        self.step = step

    def is_old(self, step: int) -> bool:
        return bool(self.seconds) and step - self.step > self._patience


class _Acceptance:
    """How often the guesses of one drafter are accepted, by the probability that it gave them itself."""

    def __init__(self) -> None:
        self.usual = _USUAL
        self._accepted = [0.0] * (len(_EDGES) + 1)
        self._judged = [0.0] * (len(_EDGES) + 1)
        self._all_accepted = self._all_expected = 0.0

    def note(self, probability: float, is_accepted: bool) -> None:
        self.usual = _USUAL_DECAY * self.usual + (1 - _USUAL_DECAY) * self.chance(probability)
        level = _level(probability)
        self._accepted[level] = _DECAY * self._accepted[level] + is_accepted
        self._judged[level] = _DECAY * self._judged[level] + 1
        self._all_accepted = _DECAY * self._all_accepted + is_accepted
        self._all_expected = _DECAY * self._all_expected + probability

    def forget(self) -> None:
        self.usual += (_USUAL - self.usual) / _OBLIVION

    def chance(self, probability: float) -> float:
        level, candour = _level(probability), (self._all_accepted + _TRUST) / (self._all_expected + _TRUST)
        return (self._accepted[level] + _TRUST * probability * min(candour, 1.0)) / (self._judged[level] + _TRUST)


def _level(probability: float) -> int:
    return bisect_right(_EDGES, probability)


class Contest:
    """Which steps give more tokens a second by the clock: those that may draft, or plain ones.

    Choosing drafts takes time of its own, which beside small models is more than drafts save. So both kinds take turns,
    the slower one the less often the slower it is: where both are about even, a text that changes is soon noticed.
    drafts: the kind of the next step.
    """

    def __init__(self) -> None:
        self.drafts = True
        self._rates = dict.fromkeys((True, False), math.nan)
        self._sums = dict.fromkeys((True, False), (0.0, 0.0))
        self._steps: list[tuple[int, float]] = []
        self._is_trial = False
        self._n_left = self._n_between = _BETWEEN[0]

    def timed(self, n_tokens: int, seconds: float) -> None:
        """Note what the step gave, and how long it took."""
        self._steps.append((n_tokens, seconds))
        if len(self._steps) < _TURN:
            return
        # A much longer step is another program's doing; one that is longer by its draft counts.
        most = _OUTLIER * median(seconds for _, seconds in self._steps)
        tokens, seconds = self._sums[self.drafts]
        tokens = _TURN_DECAY * tokens + sum(n for n, _ in self._steps)
        seconds = _TURN_DECAY * seconds + sum(min(s, most) for _, s in self._steps)
        self._sums[self.drafts] = tokens, seconds
        self._rates[self.drafts] = tokens / max(seconds, 1e-9)
        self._steps.clear()
        own, other = self._rates[self.drafts], self._rates[not self.drafts]
        if self._is_trial:
            self._decide(own, other)
            return
        self._n_left -= _TURN
        if own < other or self._n_left <= 0:
            self._is_trial, self.drafts = True, not self.drafts

    def _decide(self, own: float, other: float) -> None:
        """Go on with the quicker kind; `own` is the rate of the one that was tried, `other` of that before."""
        self._is_trial = False
        if own < other:
            self.drafts = not self.drafts
            n_most = int(_TURN / _SHARE * (other / own - 1))
            self._n_between = max(_BETWEEN[0], min(2 * self._n_between, n_most, _BETWEEN[1]))
        else:
            self._n_between = _BETWEEN[0]
        self._n_left = self._n_between


@dataclass
class Pace:
    """Chooses the length of drafts.

    A draft of n guesses that are accepted with chances a₁ … aₙ gives 1 + a₁ + a₁a₂ + … tokens. Drafted by a member of
    the fusion it costs n single steps of that member, one more if all are accepted, and a batch of n + 1 of every other
    member; drafted by nobody, a batch of n + 1 of every member. The rate to beat is that of the best fixed length; the
    best length for guesses at hand is the one that is furthest ahead of it.

    sizes: of each member's weights in bytes, by which the cost of one that was never timed is guessed.
    """

    sizes: Mapping[str, int]

    _costs: dict[str, dict[int, _Timings]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(_Timings)))
    _acceptance: dict[str, _Acceptance] = field(default_factory=lambda: defaultdict(_Acceptance))
    _known: dict[str, list[int]] = field(default_factory=dict)
    _sums: dict[tuple[str, ...], list[float]] = field(default_factory=dict)
    _step: int = 0

    def begin_step(self) -> None:
        """Count a step: what was measured long ago is doubted."""
        self._step += 1
        if self._step % _RENEWAL == 0:
            self._known.clear()
            self._sums.clear()

    def timed(self, member: str, n_tokens: int, seconds: float) -> None:
        """Note what a batch of `n_tokens` of one sequence took."""
        timings = self._costs[member][n_tokens]
        before = timings.median
        timings.add(seconds, self._step)
        if len(timings.seconds) <= 2 or abs(timings.median - before) > _CHANGE * before:
            self._known.pop(member, None)
            self._sums.clear()

    def judged(self, drafter: str, probability: float, is_accepted: bool) -> None:
        """Note whether a guess is what was picked; `probability`: the drafter's own."""
        self._acceptance[drafter].note(probability, is_accepted)

    def chances(self, way: Way, probabilities: Sequence[float]) -> list[float]:
        """The chances that guesses are accepted to which their drafter gives these probabilities."""
        return [self._acceptance[way.drafter].chance(probability) for probability in probabilities]

    def cost(self, member: str, n_tokens: int) -> float:
        """Seconds that a batch of `n_tokens` takes: measured lately, else guessed from the next smaller size that was,
        and no more than the next larger."""
        timings = self._costs[member]
        own = timings.get(n_tokens)
        if own and n_tokens > 1 and own.is_old(self._step):
            own = None
        if own and len(own.seconds) > 1:
            return own.median
        known = self._sizes(member)
        place = bisect_left(known, n_tokens)
        below, above = known[:place], known[place + 1 if own else place :]
        if not below and not above:
            return own.median if own else self._guess_by_size(member)
        guess = timings[above[0]].median if above else math.inf
        if below:
            guess = min(guess, timings[below[-1]].median + _SLOPE * timings[below[0]].median * (n_tokens - below[-1]))
        # Timed once, which something else may have disturbed: a size that seems dear is not timed again for long.
        return (own.median + guess) / 2 if own else guess

    def _sizes(self, member: str) -> list[int]:
        """Sizes of batches whose timings count, ascending; ages are looked at every few steps."""
        if member not in self._known:
            timings = self._costs[member].items()
            self._known[member] = sorted(n for n, own in timings if n == 1 or not own.is_old(self._step))
        return self._known[member]

    def _guess_by_size(self, member: str) -> float:
        """What one token costs a member that was never timed, by what it costs another one."""
        others = [name for name in self.sizes if name != member and 1 in self._costs[name]]
        if not others or member not in self.sizes:
            return 0.0
        return max(self.cost(name, 1) * self.sizes[member] / max(self.sizes[name], 1) for name in others)

    def n_dared(self, way: Way) -> int:
        """The longest draft to try: its batch is at most twice the largest that was timed."""
        return max(0, min(2 * max(self._costs[name], default=0) for name in way.batched) - 1)

    def _of_batches(self, way: Way) -> list[float]:
        """Seconds that batches of 1 to MAX_DRAFT + 1 tokens, or fewer that may be tried yet, take of each member that
        evaluates whole drafts, and their fusion."""
        if way.batched not in self._sums:
            sizes, members = range(1, min(MAX_DRAFT, self.n_dared(way)) + 2), (*way.batched, FUSION)
            self._sums[way.batched] = [sum([self.cost(name, n) for name in members]) for n in sizes]
        return self._sums[way.batched]

    def usual(self, way: Way, n_draft: int) -> list[float]:
        """The chances of `n_draft` guesses that are not known yet."""
        return [self._acceptance[way.drafter].usual] * n_draft

    def declined(self, way: Way) -> None:
        """Note that a member was not let draft: what is known of its acceptance grows old."""
        self._acceptance[way.drafter].forget()

    def best(self, way: Way, chances: Sequence[float]) -> tuple[float, int]:
        """Expected tokens a second at the best length for guesses with these chances, and that length: 0 where plain
        decoding is not slower."""
        best, n_best = 0.0, 0
        margin = 1.0 + (_MARGIN if way.is_fused else _MARGIN_OUTSIDE)
        for n, (tokens, seconds) in enumerate(self._lengths(way, chances, len(chances), 0)):
            rate = tokens / max(seconds, 1e-9)
            if n == 0 or rate > best * (1.0 if n_best else margin):
                best, n_best = rate, n
        return best, n_best

    def length(self, way: Way, chances: Sequence[float], n_most: int, rate: float) -> int:
        """How many tokens to draft where the guesses that there are have these `chances`; more than there are: go on.

        rate: tokens a second to beat.
        """
        best, most = 0, 0.0
        for n, (tokens, seconds) in enumerate(self._lengths(way, chances, n_most, len(chances))):
            gain = tokens - rate * seconds
            if n == 0 or gain > most + (0.0 if best else _MARGIN):
                best, most = n, gain
        return best

    def _lengths(
        self, way: Way, chances: Sequence[float], n_most: int, n_evaluated: int
    ) -> Iterator[tuple[float, float]]:
        """Expected tokens and seconds of drafts of 0, 1, … tokens where the drafting member has evaluated `n_evaluated`
        tokens anyway."""
        usual, tokens, all_accepted = self._acceptance[way.drafter].usual, 1.0, 1.0
        single = self.cost(way.member, 1) if way.member else 0.0
        reading = self._reading(way.member, way.n_behind - 1) if way.member and not way.is_fused else 0.0
        for n, seconds in enumerate(self._of_batches(way)[: n_most + 1]):
            if n:
                all_accepted *= chances[n - 1] if n <= len(chances) else usual
                tokens += all_accepted
            if way.is_fused:
                last = all_accepted if n >= max(n_evaluated, 1) else 0.0
                seconds += (max(n, n_evaluated, 1) + last) * single
            elif n:
                seconds += n * single + reading
            yield tokens, seconds

    def _reading(self, member: str, n_tokens: int) -> float:
        """Seconds, of those that a member needs to read what it is behind, that count for one step: the whole text
        serves many of them."""
        return n_tokens * self.cost(member, 8) / 8 / (1 if n_tokens < 8 else _SPREAD)
