"""How many tokens to draft: what gives the most tokens a second by measured costs and acceptance, none included."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

_SLOPE = 0.15
"""Guess for what one more token in a batch costs, relative to a batch of one, until it has been measured: a low one,
since a length that is never tried is never measured."""
_MEMORY = 12
"""Timings of one member at one batch size that count."""
_DECAY = 0.97
"""Weight of an outcome after each later one."""
_PRIOR = (0.7, 0.4)
"""Accepted and rejected tokens that a drafter starts with."""
_RETRY = 48
"""Steps after which a choice that the estimates speak against is tried again: they may be old."""


@dataclass
class _Acceptance:
    accepted: float = _PRIOR[0]
    rejected: float = _PRIOR[1]

    def record(self, n_drafted: int, n_accepted: int) -> None:
        for n in range(min(n_accepted + 1, n_drafted)):
            self.accepted *= _DECAY
            self.rejected *= _DECAY
            if n < n_accepted:
                self.accepted += 1
            else:
                self.rejected += 1

    @property
    def rate(self) -> float:
        return self.accepted / (self.accepted + self.rejected)


@dataclass
class Pace:
    """Chooses the length of the next draft.

    A draft of k tokens that are accepted one by one with probability p gives 1 + p + … + p^k tokens. Drafted by a
    member it costs k single steps of that member, one more if all k are accepted, and a batch of k + 1 of every other
    member; drafted by nobody, a batch of k + 1 of every member.
    """

    costs: dict[str, dict[int, deque[float]]] = field(default_factory=lambda: defaultdict(dict))
    acceptance: dict[str, _Acceptance] = field(default_factory=lambda: defaultdict(_Acceptance))
    _n_plain: int = 0

    def timed(self, member: str, n_tokens: int, seconds: float) -> None:
        """Note what a batch of `n_tokens` of one sequence took."""
        self.costs[member].setdefault(n_tokens, deque(maxlen=_MEMORY)).append(seconds)

    def judged(self, drafter: str, n_drafted: int, n_accepted: int) -> None:
        """Note how many drafted tokens were accepted."""
        self.acceptance[drafter].record(n_drafted, n_accepted)

    def cost(self, member: str, n_tokens: int) -> float:
        """Seconds that a batch of `n_tokens` takes: measured, else between or beyond the sizes that were."""
        known = self.costs[member]
        if n_tokens in known:
            return median(known[n_tokens])
        below = max((n for n in known if n < n_tokens), default=None)
        above = min((n for n in known if n > n_tokens), default=None)
        if below is None:
            return median(known[above]) if above is not None else 0.0
        low = median(known[below])
        if above is not None:
            return low + (median(known[above]) - low) * (n_tokens - below) / (above - below)
        return low + _SLOPE * self.cost(member, 1) * (n_tokens - below)

    def rate(self, drafter: str, member: str | None, members: Sequence[str], n_draft: int) -> float:
        """Expected tokens a second of a draft of `n_draft`."""
        p = self.acceptance[drafter].rate
        tokens = sum(p**n for n in range(n_draft + 1))
        seconds = sum(self.cost(name, n_draft + 1) for name in members if name != member)
        if member is not None:
            seconds += (n_draft + p**n_draft) * self.cost(member, 1)
        return tokens / max(seconds, 1e-9)

    def choose(self, drafter: str, member: str | None, members: Sequence[str], n_most: int) -> int:
        """How many of at most `n_most` tokens to draft; 0 where plain decoding is expected to be faster."""
        if any(not self.costs[name] for name in members):
            return 0
        rates = [self.rate(drafter, member, members, n) for n in range(n_most + 1)]
        best = max(range(n_most + 1), key=rates.__getitem__)
        self._n_plain = 0 if best else self._n_plain + 1
        if self._n_plain >= _RETRY and n_most:
            self._n_plain = 0
            return 1
        return best
