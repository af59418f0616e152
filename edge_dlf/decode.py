"""The decoding loop: draft → decode members → search α → fuse → select → accept → trim.

Each `Decoder.step` lets every member evaluate, in one batch, what each generation's text has beyond what the member
holds: a part of the prompt, the last pick, or that and what a drafter guesses to follow it. Where a whole text has been
evaluated, α is searched and a token picked; a draft's picks are kept up to the first that differs from its guess. Picks
depend on (seed, position, text) alone, so that drafting and batching change how fast tokens come, not which. Text, stop
strings and limits are the caller's; which generations take part in a step is the scheduler's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from .backend import N_ROWS, Logits, Run
from .draft import QUOTES, Draft, RowKeeper, quote
from .ensemble import Ensemble, Roles, Rows
from .errors import EdgeDLFError
from .explain import explain
from .generation import Generation, Outcome, Pick
from .pace import FUSION, Contest, Pace, Way
from .params import MAX_DRAFT, AlphaChoice, Draw, Picked, Trace

if TYPE_CHECKING:
    from .fusion import Fuser


class Decoder:
    """Decodes generations over one ensemble. One thread at a time.

    pace: what members cost and how often drafts are accepted, learnt from all that was decoded. contest: whether what
    drafts save is worth the time that they take.
    """

    def __init__(self, ensemble: Ensemble, fuser: Fuser, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ensemble = ensemble
        self.pace = Pace({name: member.n_bytes for name, member in ensemble.members.items()})
        self.contest = Contest()
        self._fuser = fuser
        self._clock = clock
        self._evaluating = 0.0
        self._kept = RowKeeper()

    def begin(self, generation: Generation) -> None:
        """Give the sequence `generation.seq` to a generation, new or broken off; what is in a cache already is not
        evaluated again."""
        for name in generation.roles.members:
            self.ensemble.begin(name, generation.seq, generation.whole_text(name))
        generation.n_prefilled += self.n_due(generation)

    def n_new(self, generation: Generation) -> int:
        """The most tokens of the text that a member has not in its cache yet, in any sequence."""
        return max(
            generation.n_text(name) - self.ensemble.n_known(name, generation.whole_text(name))
            for name in generation.roles.members
        )

    def n_due(self, generation: Generation) -> int:
        """The most tokens that a member has to evaluate before the next pick."""
        n_held, seq, prompts = self.ensemble.n_held, generation.seq, generation.prompts
        n_picked = len(generation.tokens) - generation.n_prompt
        return n_picked + max([len(prompts[name]) - n_held(name, seq) for name in generation.roles.members])

    def step(self, generations: Sequence[Generation], n_prefill: int | None = None) -> list[Outcome]:
        """Evaluate what is due and pick what follows. Of each generation: no pick while its prompt is evaluated in
        parts, then one, or more where they are given, or where it is drafted for, which only a generation on its own
        is; or the error that makes a pick impossible, such as a member's NaN.

        n_prefill: tokens of prompts to evaluate, beside the one that each other generation needs; None for as many as
        fit into a batch. Generations that come first are served first.
        """
        for generation in generations:
            generation.settle()
        if len(generations) == 1 and generations[0].n_draft != 0 and self.n_due(generations[0]) == 1:
            return [self._step_alone(generations[0])]
        return self._step_plainly(generations, n_prefill)

    def _step_alone(self, generation: Generation) -> Outcome:
        """One step of one generation whose prompt has been evaluated."""
        if generation.n_draft is not None:
            return self._step_drafted(generation)
        started = self._clock()
        if self.contest.drafts:
            outcome = self._step_drafted(generation)
        else:
            (outcome,) = self._step_plainly([generation], None)
        if isinstance(outcome, list):
            self.contest.timed(len(outcome), self._clock() - started)
        return outcome

    def _step_plainly(self, generations: Sequence[Generation], n_prefill: int | None) -> list[Outcome]:
        """As `step`, without drafts."""
        groups, given, runs = self._plan(generations, n_prefill)
        self.ensemble.decode_all(runs)
        outcomes: dict[Generation, Outcome] = {generation: [] for generation in generations}
        first: Counter[str] = Counter()
        for group in groups:
            roles = group[0].roles
            owners = [generation for generation in group for _ in range(len(given[generation]) + 1)]
            ahead = [given[generation][:k] for generation in group for k in range(len(given[generation]) + 1)]
            rows = self.ensemble.rows(roles, first, len(owners))
            first.update(roles.members * len(owners))
            for generation, pick in zip(owners, self._pick(owners, rows, ahead), strict=True):
                outcome = outcomes[generation]
                if isinstance(pick, EdgeDLFError) or isinstance(outcome, EdgeDLFError):
                    outcomes[generation] = pick if isinstance(pick, EdgeDLFError) else outcome
                else:
                    outcome.append(pick)
                    generation.add(pick)
        return list(outcomes.values())

    def _plan(
        self, generations: Sequence[Generation], n_prefill: int | None
    ) -> tuple[list[list[Generation]], dict[Generation, tuple[int, ...]], dict[str, list[Run]]]:
        """Generations whose whole text will have been evaluated, those that are fused alike together; the given tokens
        that are evaluated after the text; and what each member has to evaluate, with their rows in that order."""
        due = {generation: self.n_due(generation) for generation in generations}
        left = self.ensemble.n_batch - sum(n == 1 for n in due.values())
        left = left if n_prefill is None else min(left, n_prefill)
        runs: dict[str, list[Run]] = defaultdict(list)
        whole = []
        for generation, n_due in due.items():
            n_given = 1 if n_due == 1 else min(n_due, left)
            left -= n_given if n_due > 1 else 0
            if n_given == n_due:
                whole.append(generation)
            else:
                self._add_runs(runs, generation, n_given)
        groups = _fused_alike(whole)
        given: dict[Generation, tuple[int, ...]] = {}
        left = max(0, min(left, max(N_ROWS, self.ensemble.n_seq_max) - len(whole)))
        for generation in chain(*groups):
            given[generation] = generation.unscored()[:-1][:left]
            left -= len(given[generation])
            self._add_runs(runs, generation, None, given[generation])
        return groups, given, runs

    def _add_runs(
        self, runs: dict[str, list[Run]], generation: Generation, n_most: int | None, given: Sequence[int] = ()
    ) -> None:
        """What the members have to evaluate of one generation: at most `n_most` tokens of its prompt, and not the last,
        which is for the step that picks; or, if that is None, all, and the tokens `given`."""
        for name in generation.roles.members:
            n_held, n_text = self.ensemble.n_held(name, generation.seq), generation.n_text(name)
            stop = n_text if n_most is None else min(n_held + n_most, n_text - 1)
            n_rows = len(given) + 1 if n_most is None else 0
            if stop > n_held:
                runs[name].append(Run(generation.seq, [*generation.text(name, n_held, stop), *given], n_rows))

    def rewind(self, generation: Generation, n_tokens: int) -> None:
        """Take back all but the first `n_tokens` of `generation.tokens`; every member then holds all of them but the
        last, as after the step that picked it."""
        n_surplus = len(generation.tokens) - n_tokens
        if n_surplus > 0:
            del generation.tokens[n_tokens:]
            for name in generation.roles.members:
                n_held = self.ensemble.n_held(name, generation.seq)
                self.ensemble.shorten(name, generation.seq, n_held - n_surplus)

    def _step_drafted(self, generation: Generation) -> Outcome:
        """One step of one generation: draft, let the other members evaluate the whole draft in one batch each, keep
        what the fusion picks too. What an interrupt leaves is taken back."""
        seq, n_tokens = generation.seq, len(generation.tokens)
        n_held = {name: self.ensemble.n_held(name, seq) for name in generation.roles.members}
        started, self._evaluating = self._clock(), 0.0
        self.pace.begin_step()
        picks: list[Pick] = []
        try:
            draft, others = self._draft(generation)
            error = self._pick_drafted(generation, draft, picks)
        except BaseException:
            del generation.tokens[n_tokens:], picks[:]
            raise
        finally:
            for name, n_before in n_held.items():
                self.ensemble.shorten(name, seq, n_before + len(picks))
        n_accepted = sum(pick.from_draft for pick in picks)
        if draft.way.member not in (None, *n_held):
            self.ensemble.shorten(
                draft.way.drafter, seq, generation.n_text(draft.way.drafter) - len(picks) + n_accepted
            )
        generation.n_drafted += draft.n
        generation.n_accepted += n_accepted
        for judged in (draft, *others):
            self._judge(judged, picks)
        self.pace.timed(FUSION, draft.n + 1, self._clock() - started - self._evaluating)
        return picks or error or []

    def _pick_drafted(self, generation: Generation, draft: Draft, picks: list[Pick]) -> EdgeDLFError | None:
        """Verify a draft; as `_verify`."""
        seq, roles, guesses = generation.seq, generation.roles, draft.guesses[: draft.n]
        self._evaluate_all(seq, {name: [*generation.last(name), *guesses] for name in draft.way.batched})
        if draft.rows is None:
            return self._verify(generation, self.ensemble.rows(roles, {}, draft.n + 1), guesses, picks)
        # The drafting expert evaluates its last guess only once all are accepted.
        t, n_rows = roles.experts.index(draft.way.drafter), min(len(draft.rows), draft.n + 1)
        error = self._verify(generation, self._rows(roles, n_rows, t, draft.rows), guesses, picks)
        if sum(pick.from_draft for pick in picks) == draft.n == n_rows:
            last = self._evaluate(draft.way.drafter, seq, guesses[-1:])
            error = self._verify(generation, self._rows(roles, 1, t, last, n_rows), [], picks)
        return error

    def _judge(self, draft: Draft, picks: Sequence[Pick]) -> None:
        """Note which guesses were right, verified or not, up to the first that was not."""
        for guess, probability, pick in zip(draft.guesses, draft.probabilities, picks, strict=False):
            self.pace.judged(draft.way.drafter, probability, guess == pick.token)
            if guess != pick.token:
                break

    def _draft(self, generation: Generation) -> tuple[Draft, list[Draft]]:
        """The draft that promises the most tokens a second, or that of the length asked for; and what else there was to
        judge."""
        roles, fixed = generation.roles, generation.n_draft
        n_most = min(self._room(generation, roles.members), MAX_DRAFT if fixed is None else fixed)
        quoted = Draft(Way(QUOTES, roles.members), *quote(generation.tokens, n_most))
        own = self._way_of_member(generation)
        if fixed is not None:
            if quoted.guesses or not own:
                quoted.n = len(quoted.guesses)
                return quoted, []
            return self._draft_by_member(generation, own, n_most, None), []
        rate = 0.0
        if own:
            rate, n = self.pace.best(own, self.pace.usual(own, n_most))
            if not n and not own.is_fused:
                self.pace.declined(own)
                own = None
        of_quoted, n = self.pace.best(quoted.way, self.pace.chances(quoted.way, quoted.probabilities))
        if n and of_quoted > rate:
            quoted.n = n
            return quoted, []
        if not own:
            return Draft(quoted.way), [quoted]
        return self._draft_by_member(generation, own, n_most, rate), [quoted]

    def _way_of_member(self, generation: Generation) -> Way | None:
        """How a member of the fusion, or the base for the large model alone, would draft."""
        name, members = generation.drafting_member(), generation.roles.members
        if name is None:
            return None
        if name in members:
            return Way(name, tuple(other for other in members if other != name), name)
        n_known = self.ensemble.n_common(name, generation.seq, generation.whole_text(name))
        n_behind = generation.n_text(name) - n_known
        has_room = self._room(generation, [name]) == self._room(generation, members)
        has_room = has_room and n_behind + MAX_DRAFT <= self.ensemble.n_free()
        return Way(name, members, name, is_fused=False, n_behind=n_behind) if has_room else None

    def _draft_by_member(self, generation: Generation, way: Way, n_most: int, rate: float | None) -> Draft:
        """Let a member decode ahead on its own, under the noise, filters and penalties of each position: `n_most`
        tokens, or while that promises more than `rate` tokens a second."""
        draft, name = Draft(way), way.drafter
        due = generation.last(name)
        if not way.is_fused:
            n_held = self.ensemble.begin(name, generation.seq, generation.whole_text(name))
            due = generation.whole_text(name)[n_held:]
        while True:
            row = self._evaluate(name, generation.seq, due)[-1:]
            if way.is_fused:
                row = self._kept.keep(len(draft.guesses), row)
                draft.rows = self._kept.rows[: len(draft.guesses) + 1]
            if not n_most:
                return draft
            drawn = generation.draw(draft.guesses)
            (picked,) = self._choose([generation], Rows(row, None, ()), [()], [drawn], [draft.guesses], (name,))
            if isinstance(picked, EdgeDLFError):  # met again where that row is fused
                return draft
            draft.guesses.append(picked.token)
            draft.probabilities.append(min(1.0, math.exp(picked.logprob)))
            n_wanted = n_most
            if rate is not None:
                n_wanted = self.pace.length(way, self.pace.chances(way, draft.probabilities), n_most, rate)
            draft.n = min(n_wanted, len(draft.guesses))
            if n_wanted <= len(draft.guesses):
                return draft
            due = draft.guesses[-1:]

    def _room(self, generation: Generation, members: Iterable[str]) -> int:
        """Tokens that may be drafted before the answer's limit or a member's context is reached."""
        longest = max(generation.n_text(name) for name in members)
        return max(0, min(generation.n_most - 1, self.ensemble.n_ctx - longest))

    def _evaluate(self, name: str, seq: int, tokens: Sequence[int]) -> Logits:
        """Rows after each of `tokens`, or after the last where they are many; notes what one member needs for them."""
        while len(tokens) > MAX_DRAFT + 1:
            ahead = tokens[: min(len(tokens) - 1, self.ensemble.n_batch)]
            self.ensemble.decode(name, [Run(seq, ahead, 0)])
            tokens = tokens[len(ahead) :]
        started = self._clock()
        self.ensemble.decode(name, [Run(seq, tokens, len(tokens))])
        rows = self.ensemble.members[name].logits()  # on a GPU, waits for the result
        elapsed = self._clock() - started
        self._evaluating += elapsed
        self.pace.timed(name, len(tokens), elapsed)
        return rows

    def _evaluate_all(self, seq: int, due: Mapping[str, Sequence[int]]) -> None:
        """As `_evaluate`, several members. Where they overlap it cannot be told how long which of them took, nor does
        that matter to what all of them cost: each is noted with a share by its size."""
        if not self.ensemble.overlaps:
            for name, tokens in due.items():
                self._evaluate(name, seq, tokens)
            return
        started = self._clock()
        self.ensemble.decode_all({name: [Run(seq, tokens, len(tokens))] for name, tokens in due.items()})
        for name in due:
            self.ensemble.members[name].logits()
        elapsed = self._clock() - started
        self._evaluating += elapsed
        n_bytes = sum(self.ensemble.members[name].n_bytes for name in due)
        for name, tokens in due.items():
            self.pace.timed(name, len(tokens), elapsed * self.ensemble.members[name].n_bytes / n_bytes)

    def _rows(self, roles: Roles, n_rows: int, t: int, rows_of_t: Logits, first: int = 0) -> Rows:
        """`n_rows` rows of all members from row `first` on, those of expert `t` given."""
        own = Roles(roles.primary, roles.base, tuple(name for name in roles.experts if name != roles.experts[t]))
        rows = self.ensemble.rows(own, dict.fromkeys(roles.members, first), n_rows)
        experts = [*rows.experts[:t], rows_of_t[:n_rows], *rows.experts[t:]]
        return Rows(rows.primary, rows.base, tuple(experts))

    def _verify(
        self, generation: Generation, rows: Rows, guesses: Sequence[int], picks: list[Pick]
    ) -> EdgeDLFError | None:
        """Pick at each position of `rows` (K, …), up to the first pick that is not what was guessed there, and append
        to `picks`. Returns what makes the next pick impossible."""
        drafts = [guesses[:k] for k in range(len(rows.primary))]
        for k, pick in enumerate(self._pick([generation] * len(drafts), rows, drafts)):
            if isinstance(pick, EdgeDLFError):
                return pick
            accepted = k < len(guesses) and pick.token == guesses[k]
            picks.append(dataclasses.replace(pick, from_draft=accepted))
            generation.add(picks[-1])
            if not accepted:
                break
        return None

    def _pick(
        self, generations: Sequence[Generation], rows: Rows, guesses: Sequence[Sequence[int]]
    ) -> list[Pick | EdgeDLFError]:
        """The token that follows each generation's text and `guesses`, by its row."""
        roles, fusion = generations[0].roles, generations[0].fusion
        choices: Sequence[AlphaChoice | EdgeDLFError | None] = [None] * len(generations)
        if fusion.method == "dynamic" and rows.base is not None:
            choices = self._fuser.search(rows.primary, rows.base, rows.experts, fusion, roles.members)
        weights = [
            generation.alphas if choice is None else _weights(choice, len(rows.experts))
            for generation, choice in zip(generations, choices, strict=True)
        ]
        draws = [generation.draw(draft) for generation, draft in zip(generations, guesses, strict=True)]
        picked = self._choose(generations, rows, weights, draws, guesses, roles.members)
        traces: Sequence[Trace | None] = [None] * len(generations)
        if any(generation.traced for generation in generations):
            members = dict(zip(roles.members, rows.members, strict=True))
            traces = explain(self._fuser, members, roles.experts, draws, choices, weights, picked)
        outcomes: list[Pick | EdgeDLFError] = []
        for k, (generation, choice, taken) in enumerate(zip(generations, choices, picked, strict=True)):
            if isinstance(choice, EdgeDLFError):
                outcomes.append(choice)
            elif isinstance(taken, EdgeDLFError):
                outcomes.append(taken)
            else:
                top, trace = taken.top_logprobs[: generation.n_top], traces[k] if generation.traced else None
                outcomes.append(Pick(taken.token, taken.logprob, weights[k], top, trace=trace))
        return outcomes

    def _choose(
        self,
        generations: Sequence[Generation],
        rows: Rows,
        weights: Sequence[tuple[float, ...]],
        draws: Sequence[Draw],
        guesses: Sequence[Sequence[int]],
        names: Sequence[str],
    ) -> list[Picked | EdgeDLFError]:
        """A token from each fused row. One that the generation's constraint forbids is chosen again among those it
        allows, as llama.cpp does: most often the first choice is right, and asking for all that are allowed costs
        more."""
        picked = self._fuser.pick(rows.primary, rows.base, rows.experts, weights, draws, names)
        for k, (generation, choice) in enumerate(zip(generations, picked, strict=True)):
            constraint = generation.constraint
            if not constraint or not isinstance(choice, Picked):
                continue
            before = [*generation.unsettled(), *guesses[k]]
            if constraint.allows(before, choice.token):
                continue
            (picked[k],) = self._fuser.pick(
                rows.primary[k : k + 1],
                None if rows.base is None else rows.base[k : k + 1],
                [expert[k : k + 1] for expert in rows.experts],
                weights[k : k + 1],
                [dataclasses.replace(draws[k], banned=constraint.banned(before))],
                names,
            )
        return picked


def _fused_alike(generations: Iterable[Generation]) -> list[list[Generation]]:
    """Generations by roles and fusion, so that one search serves each group."""
    groups: list[list[Generation]] = []
    for generation in generations:
        for group in groups:
            if (group[0].roles, group[0].fusion) == (generation.roles, generation.fusion):
                group.append(generation)
                break
        else:
            groups.append([generation])
    return groups


def _weights(choice: AlphaChoice | EdgeDLFError, n_experts: int) -> tuple[float, ...]:
    """α of each expert; zeros in place of an error."""
    if isinstance(choice, EdgeDLFError):
        return (0.0,) * n_experts
    return tuple(choice.alpha if t == choice.expert else 0.0 for t in range(n_experts))
