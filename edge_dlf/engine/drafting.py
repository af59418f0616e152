"""Drafts: tokens guessed ahead, which the members then verify in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..fusion.records import Pick
from ..params import MAX_DRAFT
from .backend import Logits, Run
from .draft_length import Candidate, DraftLength
from .ensemble import Ensemble
from .generation import Generation
from .prompt_lookup import lookup

LOOKUP = "prompt lookup"

PickAlone = Callable[[Generation, str, Logits, Sequence[int]], Pick]
"""What one member alone picks after the text and some guesses: generation, member, its row (1, width), guesses."""


@dataclass
class Draft:
    """Tokens guessed to follow the text of one generation.

    probabilities: of each token, by the drafter.
    n_verified: how many of the tokens the members verify.
    rows: rows of a drafting member that is fused too, (K, width): after the text, and after each guess that it has
        evaluated. None where the drafter is no member of the fusion.
    """

    candidate: Candidate
    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    n_verified: int = 0
    rows: Logits | None = None

    @property
    def ahead(self) -> list[int]:
        """The tokens that are verified."""
        return self.tokens[: self.n_verified]


class Drafting:
    """Builds the candidate drafts of a generation and chooses one.

    length: what members cost and how often drafts are accepted, learnt from all that was decoded here.
    decoding_s: seconds in which the drafting member decoded, since the last draft began.
    """

    def __init__(self, ensemble: Ensemble, pick_alone: PickAlone) -> None:
        self.length = DraftLength({name: member.n_bytes for name, member in ensemble.members.items()})
        self._ensemble = ensemble
        self._pick_alone = pick_alone
        self._kept: Logits = np.empty((0, 0), np.float32)
        self._looked_up: Draft | None = None
        self.decoding_s = 0.0

    def draft(self, generation: Generation) -> Draft:
        """Return the draft that promises the most tokens per second, or one of the length that was asked for."""
        self.decoding_s = 0.0
        members, fixed = generation.members, generation.request.n_draft
        n_most = min(self._room(generation, members), MAX_DRAFT if fixed is None else fixed)
        looked_up = Draft(Candidate(LOOKUP, members), *lookup(generation.tokens, n_most, generation.request.is_end))
        candidate = self._member_candidate(generation)
        self._looked_up = looked_up
        if fixed is not None:
            rate, n = 0.0, n_most
            n_lookup = len(looked_up.tokens)
            prefers_lookup = bool(n_lookup) or candidate is None
        else:
            rate, n = self.length.best(candidate, n_most) if candidate else (0.0, 0)
            rate_lookup, n_lookup = self.length.best(looked_up.candidate, len(looked_up.tokens))
            prefers_lookup = candidate is None or (n_lookup > 0 and rate_lookup > rate)
        if candidate is None or prefers_lookup or not (n or candidate.is_fused):
            looked_up.n_verified = n_lookup
            return looked_up
        return self._draft_by_member(generation, candidate, n, fixed is not None)

    def judge(self, draft: Draft, picks: Sequence[Pick]) -> None:
        """Count which guesses were right, verified or not, up to the first that was not."""
        for each in (draft, *([self._looked_up] if self._looked_up and self._looked_up is not draft else [])):
            for guess, probability, pick in zip(each.tokens, each.probabilities, picks, strict=False):
                self.length.judged(each.candidate.drafter, probability, guess == pick.token)
                if guess != pick.token:
                    break

    def evaluate_last(self, generation: Generation, draft: Draft) -> None:
        """Let the drafting member evaluate its last guess too, and add the row to the draft's."""
        assert draft.rows is not None
        name, n = draft.candidate.drafter, len(draft.rows)
        self._keep(n, self._evaluate(name, generation.seq, draft.tokens[n - 1 : n]))
        draft.rows = self._kept[: n + 1]

    def _member_candidate(self, generation: Generation) -> Candidate | None:
        """Describe the member that would draft: the expert of the largest α of late, unless it is negative, or the base
        for the large model alone; None where there is none, or no room for it, or an expert answers alone."""
        members, experts, strength = generation.members, generation.request.roles.experts, generation.strength
        if experts:
            name = max(experts, key=lambda name: strength.get(name, 0.0))
            if len(members) == 1 or strength.get(name, 0.0) < 0:
                return None
            return Candidate(name, tuple(other for other in members if other != name), name)
        if members != ("large",) or "base" not in self._ensemble.members:
            return None
        n_behind = generation.n_text("base") - self._ensemble.n_common("base", generation.seq, generation.text("base"))
        has_room = self._room(generation, ["base"]) == self._room(generation, members)
        if not has_room or n_behind + MAX_DRAFT > self._ensemble.n_free():
            return None
        return Candidate("base", members, "base", is_fused=False, n_behind=n_behind)

    def _draft_by_member(self, generation: Generation, candidate: Candidate, n_most: int, is_fixed: bool) -> Draft:
        """Let a member decode ahead on its own, under the noise, filters and penalties of each position."""
        draft, name = Draft(candidate), candidate.drafter
        due = generation.text(name)[-1:]
        if not candidate.is_fused:
            due = generation.text(name)[self._ensemble.begin(name, generation.seq, generation.text(name)) :]
        while True:
            row = self._evaluate(name, generation.seq, due)
            if candidate.is_fused:
                row = self._keep(len(draft.tokens), row)
                draft.rows = self._kept[: len(draft.tokens) + 1]
            if len(draft.tokens) >= n_most:
                return draft
            pick = self._pick_alone(generation, name, row[0], draft.tokens)
            if pick.error or generation.request.is_end(pick.token):
                return draft  # verifying the guesses before it tells whether the answer ends there
            draft.tokens.append(pick.token)
            draft.probabilities.append(min(1.0, math.exp(pick.logprob)))
            draft.n_verified = len(draft.tokens)
            if not is_fixed and not self.length.goes_on(candidate, draft.probabilities, n_most):
                return draft
            if len(draft.tokens) >= n_most:
                return draft
            due = draft.tokens[-1:]

    def _evaluate(self, name: str, seq: int, tokens: Sequence[int]) -> Logits:
        """Return the row after the last of `tokens`, (1, width), of one member."""
        while len(tokens) > MAX_DRAFT + 1:
            ahead = tokens[: min(len(tokens) - 1, self._ensemble.n_batch)]
            self._ensemble.decode({name: [Run(seq, ahead, 0)]})
            tokens = tokens[len(ahead) :]
        logits, seconds = self._ensemble.decode({name: [Run(seq, tokens, 1)]})
        self.length.timed(name, len(tokens), seconds[name])
        self.decoding_s += seconds[name]
        return logits[name]

    def _keep(self, n: int, row: Logits) -> Logits:
        """Keep the drafting member's row `n`: a backend's own is gone with its next call."""
        if self._kept.shape[1] != row.shape[1]:
            self._kept = np.empty((MAX_DRAFT + 1, row.shape[1]), np.float32)
        kept: Logits = self._kept[n : n + 1]
        kept[:] = row
        return kept

    def _room(self, generation: Generation, members: Iterable[str]) -> int:
        """Count the tokens that may be drafted before the answer's limit or a member's context is reached."""
        longest = max(generation.n_text(name) for name in members)
        return max(0, min(generation.n_left - 1, self._ensemble.n_ctx - longest))
