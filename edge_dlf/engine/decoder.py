"""The decoding step: plan → decode members → search or weigh → pick → commit.

In each `Decoder.step` every member evaluates, in one batch, what its KV cache lacks of each generation's text: a part
of the prompt, or the last pick and the tokens that are drafted to follow it. Where a whole text has been evaluated, the
members' rows are fused and a token is picked. The picks of a draft are kept up to the first one that differs from the
drafted token. Picks depend on (seed, position, text) alone, so drafts and batches change how fast tokens come, and not
which. Text, stop strings and limits are the caller's matter; the scheduler chooses which generations take part.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from ..errors import EdgeDLFError
from ..fusion.records import N_CANDIDATES, Draw, Pick, Trace
from .backend import Logits, Run
from .cache_index import common_prefix
from .constraint import StillComputingError, Tokens
from .draft_length import Draft
from .drafting import Drafting, Drafts
from .ensemble import Ensemble, Roles
from .generation import Generation, StepResult

if TYPE_CHECKING:
    from ..fusion.fuser import Fuser

_PATIENCE_S, _PATIENCE_ALONE_S = 0.025, 0.25
"""Seconds that a step waits for constraints: beside other generations, and with none."""
WORTH_SHARING = 16
"""Tokens of a common prefix for which a generation waits until another has read it, or a checkpoint is made."""
_TAIL, _FAR = 16, 64
"""A checkpoint is made so many tokens before the end of a text, where it is so far from the one before: a next turn of
a chat may be worded otherwise from there on."""
_MAX_LAG = 4
"""Tokens of an answer that members may have to read once more beside a draft."""


@dataclass
class _Ready:
    """A generation whose whole text this step evaluates, so that a token can be picked.

    ahead: tokens evaluated after the text: drafted ones, or the next ones of a given text that is scored.
    first: the number of its first row among those of each member.
    next: the number of the position to pick at next, of len(ahead) + 1.
    """

    generation: Generation
    ahead: list[int]
    draft: Draft | None = None
    first: dict[str, int] = field(default_factory=dict)
    next: int = 0

    @property
    def positions(self) -> range:
        """The positions whose rows are there: a drafting member evaluates its last guess only once all are kept."""
        n = len(self.ahead) + 1
        return range(self.next, n if self.draft is None or self.draft.rows is None else min(n, len(self.draft.rows)))

    def rows(self, name: str, logits: Logits | None) -> Logits | Sequence[Logits]:
        """The K rows of a member at these positions. logits: those that the step's batch gave."""
        start, stop = self.next, self.positions.stop
        if name in self.first:
            assert logits is not None
            return logits[self.first[name] + start : self.first[name] + stop]
        assert self.draft is not None
        assert self.draft.rows is not None
        return self.draft.rows[start:stop]


class Decoder:
    """Decodes generations over one ensemble. One thread at a time."""

    def __init__(self, ensemble: Ensemble, fuser: Fuser) -> None:
        self.ensemble = ensemble
        self.fuser = fuser
        self.drafting = Drafting(ensemble, self._pick_alone)
        self._patience_s = 0.0

    def begin(self, generation: Generation, waiting: Iterable[Generation] = ()) -> None:
        """Give the sequence `generation.seq` to a generation, new or interrupted. Cached tokens are kept.

        waiting: generations that may share a prefix with this one later.
        """
        prompts = [other.request.prompts for other in waiting]
        for name in generation.members:
            text, pauses = generation.text(name), not self.ensemble.can_cut(name)
            others = [*self.ensemble.texts(name), *(each[name] for each in prompts if name in each)] if pauses else []
            partings = {common_prefix(text, other) for other in others}
            self.ensemble.begin(name, generation.seq, text)
            if pauses:
                partings.add(self.ensemble.kept_parting(name, text))
                generation.pauses[name] = self._pauses(name, generation, partings)
        generation.counts.n_prefilled += self.n_due(generation)

    def _pauses(self, name: str, generation: Generation, partings: Collection[int]) -> list[int]:
        """Return the lengths of the text at which a member makes checkpoints: those at which other texts part from it,
        and one shortly before its end."""
        member, seq, n_text = self.ensemble.members[name], generation.seq, generation.n_text(name)
        n_held = self.ensemble.n_held(name, seq)
        last, pauses = member.reach(seq, max(0, n_held - 1 - member.n_rollback)), []
        for n in sorted({*partings, n_text - _TAIL}):
            if n_held < n < n_text and n - last >= (_FAR if n == n_text - _TAIL else WORTH_SHARING):
                pauses.append(n)
                last = n
        return pauses

    def n_new(self, generation: Generation) -> int:
        """Return the most tokens of the text that a member has in none of its sequences yet."""
        return max(
            generation.n_text(name) - self.ensemble.n_known(name, generation.text(name)) for name in generation.members
        )

    def n_due(self, generation: Generation) -> int:
        """Return the most tokens that a member has to evaluate before the next pick."""
        n_held, seq, prompts = self.ensemble.n_held, generation.seq, generation.request.prompts
        return generation.n_picked + max([len(prompts[name]) - n_held(name, seq) for name in generation.members])

    def step(
        self,
        generations: Sequence[Generation],
        n_prefill: int | None = None,
        on_decode: Callable[[], None] | None = None,
    ) -> list[StepResult]:
        """Evaluate what is due and pick what follows.

        A generation gets no pick while its prompt is evaluated in parts. Then it gets one in each step, or several
        where a draft is accepted. Or it gets the error that makes a pick impossible, such as a member's NaN.

        n_prefill: prompt tokens to evaluate, beside the one token that each other generation needs; None for as many as
            fit into a batch. Generations that come first are served first.
        on_decode: called just before the members compute.
        """
        self._patience_s = _PATIENCE_S if len(generations) > 1 else _PATIENCE_ALONE_S
        started, n_tokens = self.ensemble.clock(), [len(generation.tokens) for generation in generations]
        for generation in generations:
            generation.advance_constraint()
        drafts = Drafts()
        try:
            due = {generation: self.n_due(generation) for generation in generations}
            picking = sorted((each for each in generations if _may_draft(each, due[each])), key=attrgetter("seq"))
            n_room = min(self.ensemble.n_free(), self.ensemble.n_batch, self.ensemble.n_rows) - len(generations)
            drafts = self.drafting.draft(picking, n_room, on_decode)
            runs, ready = self._plan(due, drafts, n_prefill)
            logits = self.ensemble.decode(runs, on_decode)
            results = {generation: StepResult(generation) for generation in generations}
            while ready:
                picks = self._pick(ready, logits)
                ready = [each for each in ready if self._commit(each, picks, results)]
                if ready:
                    self.drafting.evaluate_last(drafts, [each.generation for each in ready])
        except BaseException:
            for generation, n in zip(generations, n_tokens, strict=True):
                del generation.tokens[n:]
                self._trim(generation, drafts.drafter)
            raise
        for generation, draft in drafts.each.items():
            self._trim(generation, drafts.drafter)
            generation.counts.n_drafted += draft.n_verified
            generation.counts.n_accepted += sum(pick.from_draft for pick in results[generation].picks)
        seconds = self.ensemble.clock() - started
        self.drafting.learn(drafts, results.values(), seconds if len(picking) == len(generations) else None)
        return list(results.values())

    def _plan(
        self, due: Mapping[Generation, int], drafts: Drafts, n_prefill: int | None
    ) -> tuple[dict[str, list[Run]], list[_Ready]]:
        """Return the tokens that each member evaluates, and the generations that can be picked for then.

        due: the most tokens that a member has to evaluate, by generation.
        """
        for generation in due:
            if generation.pauses or generation in drafts.each:
                self._make_checkpoints(generation, drafts)
        n_drafted = drafts.n_verified
        left = self.ensemble.n_batch - sum(n == 1 for n in due.values()) - n_drafted
        left = left if n_prefill is None else max(0, min(left, n_prefill - n_drafted))
        runs: dict[str, list[Run]] = defaultdict(list)
        ready = []
        for generation, n_due in due.items():
            n_given = 1 if n_due == 1 else min(n_due, left)
            left -= n_given if n_due > 1 else 0
            if n_given == n_due and not any(generation.pauses.values()):
                draft = drafts.each.get(generation)
                ready.append(_Ready(generation, draft.ahead if draft else [], draft))
            else:
                self._add_prompt(runs, generation, n_given)
        n_rows: Counter[str] = Counter()
        left = max(0, min(left, self.ensemble.n_rows - len(ready) - n_drafted))
        ready.sort(key=attrgetter("generation.seq"))  # sequences with cells of their own are read in this order
        for each in ready:
            if unscored := each.generation.unscored():
                each.ahead = list(unscored[:-1][:left])
                left -= len(each.ahead)
            self._add_text(runs, each, n_rows, drafts.drafter)
        return runs, ready

    def _make_checkpoints(self, generation: Generation, drafts: Drafts) -> None:
        """Let members keep the states to which they may have to go back: those at which they pause, and the one before
        a draft that they have to verify and could not take back otherwise."""
        pausing = []
        for name in generation.members:
            member, pauses = self.ensemble.members[name], generation.pauses.get(name, [])
            while pauses and pauses[0] <= self.ensemble.n_held(name, generation.seq):
                member.checkpoint(generation.seq, lasting=True)
                pausing.append(name)
                del pauses[0]
            draft = drafts.each.get(generation)
            if draft and drafts.drafter != name and len(draft.ahead) > member.n_rollback:
                member.checkpoint(generation.seq, lasting=False)
        self.ensemble.keep(pausing, generation.seq)

    def _add_prompt(self, runs: dict[str, list[Run]], generation: Generation, n_most: int) -> None:
        """Add a part of a prompt, but not its last token, which belongs to the step that picks."""
        for name in generation.members:
            n_held = self.ensemble.n_held(name, generation.seq)
            stop = min([n_held + n_most, generation.n_text(name) - 1, *generation.pauses.get(name, [])])
            if stop > n_held:
                runs[name].append(Run(generation.seq, generation.text(name, n_held, stop), 0))

    def _add_text(self, runs: dict[str, list[Run]], each: _Ready, n_rows: Counter[str], drafter: str) -> None:
        """Add all of a text that a member does not hold, and what comes ahead of it. The member that drafted for this
        text holds it already."""
        generation, n_ahead = each.generation, len(each.ahead)
        for name in generation.members:
            if name != drafter or each.draft is None:
                n_held = self.ensemble.n_held(name, generation.seq)
                tokens = [*generation.text(name, n_held), *each.ahead]
                runs[name].append(Run(generation.seq, tokens, n_ahead + 1))
                each.first[name] = n_rows[name]
                n_rows[name] += n_ahead + 1

    def _pick(self, ready: Sequence[_Ready], logits: Mapping[str, Logits]) -> dict[Generation, list[Pick]]:
        """Pick at every position of each generation that has its rows, those that are fused alike in one call."""
        picks: dict[Generation, list[Pick]] = {}
        for group in _fused_alike(ready):
            roles = group[0].generation.request.roles
            places = [(each.generation, each.ahead[each.next : k]) for each in group for k in each.positions]
            rows = [_rows(group, name, logits.get(name), len(places)) for name in roles.members]
            found = iter(self._select(places, rows, roles))
            for each in group:
                picks[each.generation] = [next(found) for _ in each.positions]
        return picks

    def _select(
        self,
        places: Sequence[tuple[Generation, Sequence[int]]],
        rows: Sequence[Logits | Sequence[Logits]],
        roles: Roles,
    ) -> list[Pick]:
        """Fuse the rows of each place and pick a token.

        places: K generations that are fused alike, each with the tokens that stand between its text and its row.
        rows: K rows of each member of `roles`.
        A token that the constraint forbids is picked again among those that it allows, as llama.cpp does: most often
        the first pick is right, and asking for all allowed tokens costs more.
        """
        fusion = places[0][0].request.fusion
        draws = [generation.draw(ahead) for generation, ahead in places]
        weights = [roles.weights or ()] * len(draws)
        picks = self.fuser.pick(rows, roles.members, fusion, weights, draws)
        stopped = set()
        for k, (generation, ahead) in enumerate(places):
            if generation in stopped:
                picks[k] = picks[k]._replace(error=StillComputingError())
            banned = None
            if generation.is_constrained:
                picks[k], banned = self._judged(generation, ahead, picks[k])
            own = [member[k : k + 1] for member in rows] if banned is not None or generation.request.traced else []
            if banned is not None:
                found, draw = picks[k], dataclasses.replace(draws[k], banned=banned)
                again = dataclasses.replace(fusion, method="static") if found.choice else fusion
                (picks[k],) = self.fuser.pick(own, roles.members, again, [found.weights], [draw])
                picks[k] = picks[k]._replace(choice=found.choice)
            if picks[k].error:
                stopped.add(generation)
            elif generation.request.traced and roles == generation.request.roles:
                picks[k] = self._traced(generation, own, draws[k], picks[k])
        return picks

    def _judged(self, generation: Generation, ahead: Sequence[int], pick: Pick) -> tuple[Pick, Tokens | None]:
        """Return the pick, with the error that the constraint makes of it, and all banned tokens if it is one of them.

        All picks of a step share the time that they wait for constraints: those that take longer are picked later.
        """
        if pick.error:
            return pick, None
        # What cannot be taken back cannot be picked again.
        can_wait = all(self.ensemble.members[name].can_trim for name in generation.members)
        started = time.perf_counter()
        try:
            return pick, generation.banned(ahead, pick.token, max(0.0, self._patience_s) if can_wait else None)
        except EdgeDLFError as error:
            return pick._replace(error=error), None
        finally:
            self._patience_s -= time.perf_counter() - started

    def _pick_alone(self, name: str, places: Sequence[tuple[Generation, Sequence[int]]], rows: Logits) -> list[Pick]:
        """Pick as the member `name` alone would, from its row at each place."""
        return self._select(places, [rows], Roles((name,)))

    def _traced(
        self, generation: Generation, rows: Sequence[Logits | Sequence[Logits]], draw: Draw, pick: Pick
    ) -> Pick:
        """Add to a pick why it was chosen. A member whose own row is an error is left out, and so is a corrector, whose
        own row means nothing."""
        roles, draw = generation.request.roles, dataclasses.replace(draw, n_top=N_CANDIDATES)
        alone = {}
        for name, row in zip(roles.members, rows, strict=True):
            if name in self.ensemble.correctors:
                continue
            (own,) = self.fuser.pick([row], (name,), generation.request.fusion, [()], [draw])
            if own.error is None:
                alone[name] = own
        alphas = dict(zip(roles.experts, roles.alphas(pick.weights), strict=True))
        trace = Trace(pick.choice, alphas, pick.top_logprobs[:N_CANDIDATES], alone)
        return pick._replace(trace=trace, top_logprobs=pick.top_logprobs[: generation.request.n_top])

    def _commit(self, each: _Ready, picks: dict[Generation, list[Pick]], results: dict[Generation, StepResult]) -> bool:
        """Append picks up to the first one that is not what came ahead. Returns whether picks of this step may follow,
        because the drafting member has to evaluate its last guess first."""
        generation = each.generation
        for pick in picks[generation]:
            if pick.error:
                if not results[generation].picks and not isinstance(pick.error, StillComputingError):
                    results[generation] = StepResult(generation, error=pick.error)
                self._trim(generation)
                return False
            is_kept = each.next < len(each.ahead) and pick.token == each.ahead[each.next]
            pick = pick._replace(from_draft=is_kept and each.draft is not None)
            results[generation].picks.append(pick)
            generation.append(pick)
            each.next += 1
            if not is_kept:
                return False
        return each.draft is not None and each.draft.rows is not None

    def rewind(self, generation: Generation, n_tokens: int) -> None:
        """Take back the last `n_tokens` picks. Every member then holds the text but its last token."""
        del generation.tokens[len(generation.tokens) - n_tokens :]
        self._trim(generation)

    def keep(self, generation: Generation) -> None:
        """Let the prompt cache keep the text of a generation that has ended; of members that can use no part of it,
        that was done while they read it."""
        self.ensemble.keep(filter(self.ensemble.can_cut, generation.members), generation.seq)

    def _trim(self, generation: Generation, drafter: str = "") -> None:
        """Let every member hold all of the text but its last token, as after a step that drafted nothing."""
        for name in {*generation.members, drafter}:
            if name in self.ensemble.members:
                self.ensemble.shorten(name, generation.seq, generation.n_text(name) - 1)


def _may_draft(generation: Generation, n_due: int) -> bool:
    """Whether members have no more to read than drafts go with: what they took back of the answer, they read again
    beside the next draft, unless that is much."""
    return n_due <= 1 + (_MAX_LAG if generation.n_picked else 0) and not any(generation.pauses.values())


def _rows(group: Sequence[_Ready], name: str, logits: Logits | None, n_rows: int) -> Logits | Sequence[Logits]:
    """Return the `n_rows` rows of a member at the positions of these generations: in one piece where they lie so, which
    the kernels take faster.

    logits: those that the step's batch gave.
    """
    first, last = group[0], group[-1]
    if logits is not None and name in first.first and name in last.first:
        start, stop = first.first[name] + first.next, last.first[name] + last.positions.stop
        if stop - start == n_rows:
            return logits if n_rows == len(logits) else logits[start:stop]
    return [row for each in group for row in each.rows(name, logits)]


def _fused_alike(ready: Sequence[_Ready]) -> list[list[_Ready]]:
    """Group generations of the same roles and parameters, so that one call of the fuser serves each group."""
    groups: list[list[_Ready]] = []
    for each in ready:
        request = each.generation.request
        for group in groups:
            first = group[0].generation.request
            if first.roles == request.roles and first.fusion == request.fusion:
                group.append(each)
                break
        else:
            groups.append([each])
    return groups
