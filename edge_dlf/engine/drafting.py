"""Drafts: tokens guessed ahead, which the members then verify in one batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..fusion.records import Pick
from ..params import MAX_DRAFT
from .backend import Logits, Run
from .draft_length import Draft, DraftLength, Experience
from .ensemble import Ensemble
from .generation import Generation, StepResult
from .prompt_lookup import lookup

TextDrafter = Callable[[Sequence[int], int, Callable[[int], bool]], tuple[list[int], list[float]]]
"""A drafter that reads the text alone: tokens so far, most tokens to draft, what tells whether a token ends the answer
-> tokens, and how likely each is."""

TEXT_DRAFTERS: Mapping[str, TextDrafter] = {"prompt lookup": lookup}
"""By a name that no expert can have: it holds a space."""

PickAlone = Callable[[str, Sequence[tuple[Generation, Sequence[int]]], Logits], list[Pick]]
"""What one member alone picks: its name, generations with the guesses that follow their texts, its rows after them."""


@dataclass
class Drafts:
    """What one drafter guesses in a step, for some of its generations.

    drafter: empty where nothing is drafted.
    rivals: drafts that were not chosen. Whether their guesses were right is counted too.
    length: what chose the length of each; None where it was asked for.
    reading_s: seconds in which a drafter outside the fusion read the texts first.
    """

    drafter: str = ""
    each: dict[Generation, Draft] = field(default_factory=dict)
    rivals: Sequence[Drafts] = ()
    length: DraftLength | None = None
    reading_s: float = 0.0

    @property
    def n_verified(self) -> int:
        """Tokens of all drafts that are verified."""
        return sum(draft.n_verified for draft in self.each.values())

    def verify(self, n: int) -> None:
        """Let up to `n` tokens of each draft be verified."""
        for draft in self.each.values():
            draft.n_verified = min(n, draft.n_most, len(draft.tokens))


class Drafting:
    """Builds the candidate drafts for the generations of a step, and chooses those of one drafter."""

    def __init__(self, ensemble: Ensemble, pick_alone: PickAlone) -> None:
        self._lengths: dict[tuple[tuple[str, ...], int], DraftLength] = {}
        self._experience: dict[tuple[str, ...], Experience] = {}
        self._ensemble = ensemble
        self._pick_alone = pick_alone
        self._kept: Logits = np.empty((ensemble.n_rows, ensemble.n_vocab), np.float32)
        self._n_kept = 0

    def draft(
        self, generations: Sequence[Generation], n_room: int, on_decode: Callable[[], None] | None = None
    ) -> Drafts:
        """Return the drafts that promise the most tokens per second, all of them by one drafter.

        generations: those that lack one token of their text. Nothing is drafted for several of them unless the same
            members decode all, and can take back what was wrong at no cost.
        n_room: tokens that may be drafted in all, with which the batch and the caches are full.
        on_decode: called just before a member computes.

        Where a length was asked for, drafts by the text go before those by a member, which cost more. A generation that
        asks for another length than the first one is decoded plainly meanwhile.
        """
        asking = [generation for generation in generations if generation.request.n_draft != 0]
        no_room = n_room < len(generations)
        if not asking or no_room or (len(generations) > 1 and not self._are_alike(generations)):
            return Drafts()
        fixed, length = asking[0].request.n_draft, self._length(asking[0].members, len(generations))
        best, best_rate, rivals = Drafts(), 0.0, []
        if fixed is not None or length.drafts:
            n_most = MAX_DRAFT if fixed is None else fixed
            asking = [generation for generation in asking if generation.request.n_draft == fixed]
            for name in TEXT_DRAFTERS:
                drafts = self._drafts_by_text(asking, name, n_most, n_room)
                rate, n = length.best(name, drafts.each.values()) if fixed is None else (0.0, n_most)
                drafts.verify(n)
                if drafts.n_verified and (not best.drafter or rate > best_rate):
                    best, best_rate = drafts, rate
                rivals.append(drafts)
            if fixed is None or not best.drafter:
                drafts = self._drafts_by_member(asking, n_most, n_room)
                rate, n = length.best(drafts.drafter, drafts.each.values()) if fixed is None else (0.0, n_most)
                # A member of the fusion evaluates the text anyway, so its first guess costs nothing.
                is_worth = n or drafts.drafter in asking[0].members
                if drafts.each and is_worth and (not best.drafter or rate > best_rate):
                    self._guess(drafts, length if fixed is None else None, rate, on_decode)
                    best = drafts
        best.length = length if fixed is None else None
        best.rivals = [drafts for drafts in rivals if drafts is not best]
        return best

    def _are_alike(self, generations: Sequence[Generation]) -> bool:
        """Whether drafts for all of them go into the same batches, and members can take back any part of these."""
        members = generations[0].members
        return all(generation.members == members for generation in generations) and all(
            member.can_trim for member in self._ensemble.members.values()
        )

    def _pickable(self, tokens: list[int], probabilities: list[float]) -> tuple[list[int], list[float]]:
        """Return a draft up to the first token that only prompts may hold."""
        n = next((n for n, token in enumerate(tokens) if token >= self._ensemble.n_vocab), len(tokens))
        return tokens[:n], probabilities[:n]

    def learn(self, drafts: Drafts, results: Iterable[StepResult], seconds: float | None) -> None:
        """Note which guesses were right, and what the step took; `seconds` is None where it did other work too."""
        if not (drafts.each or drafts.rivals or drafts.length):
            return
        results = [result for result in results if result.picks]
        if not results:
            return
        experience = self._experience[results[0].generation.members]
        for each in (drafts, *drafts.rivals):
            for result in results:
                if draft := each.each.get(result.generation):
                    for guess, probability, pick in zip(draft.tokens, draft.probabilities, result.picks, strict=False):
                        experience.judged(each.drafter, probability, guess == pick.token)
                        if guess != pick.token:
                            break
        if drafts.length and seconds is not None:
            n_tokens = sum(len(result.picks) for result in results)
            took = seconds - drafts.reading_s
            drafts.length.stepped(drafts.drafter, drafts.n_verified, n_tokens, took, drafts.reading_s)

    def evaluate_last(self, drafts: Drafts, generations: Sequence[Generation]) -> None:
        """Let the drafting member evaluate its last guess for these generations too, and add the rows to the drafts."""
        last = {each: drafts.each[each].tokens[len(drafts.each[each].rows or ()) - 1 :][:1] for each in generations}
        self._evaluate(drafts, last)

    def _length(self, members: tuple[str, ...], n_rows: int) -> DraftLength:
        """Return what chooses the length of drafts for so many generations of these members."""
        if (members, n_rows) not in self._lengths:
            n_bytes = {name: member.n_bytes for name, member in self._ensemble.members.items()}
            total = max(1, sum(n_bytes[name] for name in members))
            costs = {name: n / total for name, n in n_bytes.items()}
            experience = self._experience.setdefault(members, Experience())
            self._lengths[members, n_rows] = DraftLength(costs, n_rows, experience)
        return self._lengths[members, n_rows]

    def _drafts_by_text(self, generations: Sequence[Generation], name: str, n_most: int, n_room: int) -> Drafts:
        """Return what the text alone tells of generations that have something to draft."""
        drafts = Drafts(name)
        for generation in generations:
            n = min(n_most, self._room(generation, generation.members))
            guesses = TEXT_DRAFTERS[name](generation.tokens, n, generation.request.is_end)
            tokens, probabilities = self._pickable(*guesses)
            if tokens:
                drafts.each[generation] = Draft(len(tokens), tokens, probabilities)
        for draft in drafts.each.values():
            draft.n_most = min(draft.n_most, n_room // len(drafts.each))
        return drafts

    def _drafts_by_member(self, generations: Sequence[Generation], n_most: int, n_room: int) -> Drafts:
        """Return drafts without a guess yet, for those generations that the same member would draft for, of which
        there are most."""
        n_free = self._ensemble.n_free() // len(generations)
        drafters = {generation: self._drafting_member(generation, n_free) for generation in generations}
        counts = Counter(name for name in drafters.values() if name)
        if not counts:
            return Drafts()
        drafts = Drafts(max(counts, key=counts.__getitem__))
        n_most = min(n_most, n_room // counts[drafts.drafter])
        for generation, name in drafters.items():
            n = min(n_most, self._room(generation, generation.members))
            if n > 0 and name == drafts.drafter:
                drafts.each[generation] = Draft(n)
        return drafts

    def _drafting_member(self, generation: Generation, n_free: int) -> str | None:
        """Return the member that would draft: the expert of the largest α of late, unless it is negative, or the base
        for the large model alone; None where there is none, or no room for it, or an expert answers alone. A corrector
        does not draft: alone it foretells nothing. n_free: positions of the caches that it may fill."""
        members, strength = generation.members, generation.strength
        experts = [name for name in generation.request.roles.experts if name not in self._ensemble.correctors]
        if experts:
            name = max(experts, key=lambda name: strength.get(name, 0.0))
            return name if len(members) > 1 and strength.get(name, 0.0) >= 0 else None
        if members != ("large",) or "base" not in self._ensemble.members:
            return None
        n_behind = generation.n_text("base") - self._ensemble.n_common("base", generation.seq, generation.text("base"))
        has_room = self._room(generation, ["base"]) == self._room(generation, members)
        return "base" if has_room and n_behind + MAX_DRAFT <= n_free else None

    def _guess(
        self, drafts: Drafts, length: DraftLength | None, rate: float, on_decode: Callable[[], None] | None
    ) -> None:
        """Let a member decode ahead on its own, a token of every draft at a time, under the noise, filters and
        penalties of each position.

        length: what chooses the length; None where it was asked for.
        rate: tokens per second that drafts have to beat.
        """
        n_wanted, self._n_kept = MAX_DRAFT, 0
        due: Mapping[Generation, Sequence[int]] = self._begun(drafts)
        while due:
            rows = self._evaluate(drafts, due, on_decode)
            picks = self._pick_alone(drafts.drafter, [(each, drafts.each[each].tokens) for each in due], rows)
            for generation, pick in zip(due, picks, strict=True):
                draft = drafts.each[generation]
                if pick.error:  # it is met again where that row is fused
                    draft.n_most = len(draft.tokens)
                    continue
                if generation.request.is_end(pick.token):  # verifying the guesses before it tells whether it ends there
                    draft.n_most = len(draft.tokens)
                draft.tokens.append(pick.token)
                draft.probabilities.append(min(1.0, math.exp(pick.logprob)))
            if length:
                n_wanted = length.wanted(drafts.drafter, drafts.each.values(), rate)
            due = {
                each: draft.tokens[-1:]
                for each, draft in drafts.each.items()
                if len(draft.tokens) < min(n_wanted, draft.n_most)
            }
            for each in due:
                if len(drafts.each[each].tokens) == 1:
                    self._ensemble.members[drafts.drafter].checkpoint(each.seq, lasting=False)
        drafts.verify(n_wanted)

    def _begun(self, drafts: Drafts) -> dict[Generation, list[int]]:
        """Return the tokens after which the drafter makes its first guesses. One outside the fusion reads the rest of
        each text first."""
        started, name = self._ensemble.clock(), drafts.drafter
        due = {}
        for generation, draft in drafts.each.items():
            if name in generation.members:
                draft.rows = []
                due[generation] = generation.text(name, self._ensemble.n_held(name, generation.seq))
                continue
            tokens = generation.text(name, self._ensemble.begin(name, generation.seq, generation.text(name)))
            while len(tokens) > min(MAX_DRAFT + 1, self._ensemble.n_batch // len(drafts.each)):
                ahead = tokens[: min(len(tokens) - 1, self._ensemble.n_batch)]
                self._ensemble.decode({name: [Run(generation.seq, ahead, 0)]})
                tokens = tokens[len(ahead) :]
            due[generation] = tokens
        drafts.reading_s = self._ensemble.clock() - started
        return due

    def _evaluate(
        self,
        drafts: Drafts,
        due: Mapping[Generation, Sequence[int]],
        on_decode: Callable[[], None] | None = None,
    ) -> Logits:
        """Let the drafter read these tokens. Returns its row after the last of each, and adds it to the draft if the
        drafter is fused too: a backend's own rows are gone with its next call."""
        runs = [Run(generation.seq, tokens, 1) for generation, tokens in due.items()]
        rows = self._ensemble.decode({drafts.drafter: runs}, on_decode)[drafts.drafter]
        for generation, row in zip(due, rows, strict=True):
            if (own := drafts.each[generation].rows) is not None:
                kept: Logits = self._kept[self._n_kept]
                kept[:] = row[: self._ensemble.n_vocab]
                self._n_kept += 1
                own.append(kept)
        return rows

    def _room(self, generation: Generation, members: Iterable[str]) -> int:
        """Count the tokens that may be drafted before the answer's limit or a member's context is reached."""
        longest = max(generation.n_text(name) for name in members)
        return max(0, min(generation.n_left - 1, self._ensemble.n_ctx - longest))
