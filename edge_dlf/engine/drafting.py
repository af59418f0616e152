"""Drafts: tokens guessed ahead, which the members then verify in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..fusion.records import Pick
from ..params import MAX_DRAFT
from .backend import Logits, Run
from .draft_length import DraftLength
from .ensemble import Ensemble
from .generation import Generation
from .prompt_lookup import lookup

TextDrafter = Callable[[Sequence[int], int, Callable[[int], bool]], tuple[list[int], list[float]]]
"""A drafter that reads the text alone: tokens so far, most tokens to draft, what tells whether a token ends the answer
-> tokens, and how likely each is."""

TEXT_DRAFTERS: Mapping[str, TextDrafter] = {"prompt lookup": lookup}
"""By a name that no expert can have: it holds a space."""

PickAlone = Callable[[Generation, str, Logits, Sequence[int]], Pick]
"""What one member alone picks after the text and some guesses: generation, member, its row (width,), guesses."""


@dataclass
class Draft:
    """Tokens guessed to follow the text of one generation.

    drafter: who guessed them; empty where nothing is drafted.
    probabilities: of each token, by the drafter.
    n_verified: how many of the tokens the members verify in this step.
    rows: rows of a drafting member that is fused too, (K, width): after the text, and after each guess that it has
        evaluated. None where the drafter is no member of the fusion.
    rivals: drafts that were not chosen. Whether their guesses were right is counted too.
    reading_s: seconds in which a drafter outside the fusion read the text first.
    """

    drafter: str = ""
    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    n_verified: int = 0
    rows: Logits | None = None
    rivals: Sequence[Draft] = ()
    reading_s: float = 0.0

    @property
    def ahead(self) -> list[int]:
        """The tokens that are verified."""
        return self.tokens[: self.n_verified]


class Drafting:
    """Builds the candidate drafts of a generation and chooses one.

    lengths: for each set of members, what chooses the length of drafts.
    """

    def __init__(self, ensemble: Ensemble, pick_alone: PickAlone) -> None:
        self.lengths: dict[tuple[str, ...], DraftLength] = {}
        self._ensemble = ensemble
        self._pick_alone = pick_alone
        self._kept: Logits = np.empty((0, 0), np.float32)

    def draft(self, generation: Generation) -> Draft:
        """Return the draft that promises the most tokens per second.

        Where a length was asked for, a draft by the text goes before one by a member, which costs more.
        """
        fixed, length = generation.request.n_draft, self._length(generation)
        if fixed is None and not length.drafts:
            return Draft()
        n_most = min(self._room(generation, generation.members), MAX_DRAFT if fixed is None else fixed)
        drafts, best, best_rate = [], Draft(), 0.0
        for name, drafter in TEXT_DRAFTERS.items():
            draft = Draft(name, *self._pickable(*drafter(generation.tokens, n_most, generation.request.is_end)))
            drafts.append(draft)
            rate, n = 0.0, len(draft.tokens)
            if fixed is None:
                rate, n = length.best(name, n, draft.probabilities)
            if n and (not best.drafter or rate > best_rate):
                best, best_rate, best.n_verified = draft, rate, n
        member = self._drafting_member(generation) if n_most and (fixed is None or not best.drafter) else None
        if member is not None:
            rate, n = length.best(member, n_most) if fixed is None else (0.0, n_most)
            # A member of the fusion evaluates the text anyway, so its first guess costs nothing.
            if (n or member in generation.members) and (not best.drafter or rate > best_rate):
                best = self._draft_by_member(generation, member, n_most, rate)
        best.rivals = [draft for draft in drafts if draft is not best]
        return best

    def _pickable(self, tokens: list[int], probabilities: list[float]) -> tuple[list[int], list[float]]:
        """Return a draft up to the first token that only prompts may hold."""
        n = next((n for n, token in enumerate(tokens) if token >= self._ensemble.n_vocab), len(tokens))
        return tokens[:n], probabilities[:n]

    def learn(self, generation: Generation, draft: Draft, picks: Sequence[Pick], seconds: float) -> None:
        """Note which guesses were right, and what a step with this draft took."""
        length = self._length(generation)
        for each in (draft, *draft.rivals):
            for guess, probability, pick in zip(each.tokens, each.probabilities, picks, strict=False):
                length.judged(each.drafter, probability, guess == pick.token)
                if guess != pick.token:
                    break
        if generation.request.n_draft is None:
            length.stepped(draft.drafter, draft.n_verified, len(picks), seconds - draft.reading_s, draft.reading_s)

    def evaluate_last(self, generation: Generation, draft: Draft) -> None:
        """Let the drafting member evaluate its last guess too, and add the row to the draft's."""
        assert draft.rows is not None
        n = len(draft.rows)
        self._keep(n, self._evaluate(draft.drafter, generation.seq, draft.tokens[n - 1 : n]))
        draft.rows = self._kept[: n + 1]

    def _length(self, generation: Generation) -> DraftLength:
        """Return what chooses the length of drafts for the members of this generation."""
        if generation.members not in self.lengths:
            n_bytes = {name: member.n_bytes for name, member in self._ensemble.members.items()}
            total = max(1, sum(n_bytes[name] for name in generation.members))
            self.lengths[generation.members] = DraftLength({name: n / total for name, n in n_bytes.items()})
        return self.lengths[generation.members]

    def _drafting_member(self, generation: Generation) -> str | None:
        """Return the member that would draft: the expert of the largest α of late, unless it is negative, or the base
        for the large model alone; None where there is none, or no room for it, or an expert answers alone. A corrector
        does not draft: alone it foretells nothing."""
        members, strength = generation.members, generation.strength
        experts = [name for name in generation.request.roles.experts if name not in self._ensemble.correctors]
        if experts:
            name = max(experts, key=lambda name: strength.get(name, 0.0))
            return name if len(members) > 1 and strength.get(name, 0.0) >= 0 else None
        if members != ("large",) or "base" not in self._ensemble.members:
            return None
        n_behind = generation.n_text("base") - self._ensemble.n_common("base", generation.seq, generation.text("base"))
        has_room = self._room(generation, ["base"]) == self._room(generation, members)
        return "base" if has_room and n_behind + MAX_DRAFT <= self._ensemble.n_free() else None

    def _draft_by_member(self, generation: Generation, name: str, n_most: int, rate: float) -> Draft:
        """Let a member decode ahead on its own, under the noise, filters and penalties of each position.

        rate: tokens per second that the draft has to beat; of no account where the length was asked for.
        """
        draft, is_fused = Draft(name), name in generation.members
        if not is_fused:
            self._ensemble.begin(name, generation.seq, generation.text(name))
        due: Sequence[int] = generation.text(name, self._ensemble.n_held(name, generation.seq))
        if not is_fused:
            due = self._read(draft, generation.seq, due)
        while True:
            row = self._evaluate(name, generation.seq, due)
            if is_fused:
                row = self._keep(len(draft.tokens), row)
                draft.rows = self._kept[: len(draft.tokens) + 1]
            pick = self._pick_alone(generation, name, row[0], draft.tokens)
            if pick.error:
                return draft  # the error is met again where that row is fused
            draft.tokens.append(pick.token)
            draft.probabilities.append(min(1.0, math.exp(pick.logprob)))
            if generation.request.is_end(pick.token):
                return draft  # verifying the guesses before it tells whether the answer ends there
            n_wanted = n_most
            if generation.request.n_draft is None:
                n_wanted = self._length(generation).wanted(name, n_most, draft.probabilities, rate)
            draft.n_verified = min(n_wanted, len(draft.tokens))
            if n_wanted <= len(draft.tokens):
                return draft
            if len(draft.tokens) == 1:
                self._ensemble.members[name].checkpoint(generation.seq, lasting=False)
            due = draft.tokens[-1:]

    def _read(self, draft: Draft, seq: int, tokens: Sequence[int]) -> Sequence[int]:
        """Let a drafter outside the fusion evaluate all but the last of many tokens. Returns those that are left."""
        started = self._ensemble.clock()
        while len(tokens) > MAX_DRAFT + 1:
            ahead = tokens[: min(len(tokens) - 1, self._ensemble.n_batch)]
            self._ensemble.decode({draft.drafter: [Run(seq, ahead, 0)]})
            tokens = tokens[len(ahead) :]
        draft.reading_s = self._ensemble.clock() - started
        return tokens

    def _evaluate(self, name: str, seq: int, tokens: Sequence[int]) -> Logits:
        """Return the row after the last of `tokens`, (1, width), of one member."""
        return self._ensemble.decode({name: [Run(seq, tokens, 1)]})[name]

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
