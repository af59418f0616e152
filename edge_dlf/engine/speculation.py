"""A step that drafts: guess ahead, let the other members evaluate the guesses in one batch, keep what is picked too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import EdgeDLFError
from ..params import MAX_DRAFT
from .backend import Logits, Run
from .draft import QUOTES, Draft, RowKeeper, quote
from .ensemble import Ensemble, Roles, Rows
from .generation import Generation, Outcome, Pick
from .pace import FUSION, Pace, Way
from .picker import Picker


class Speculation:
    """Drafts for one generation at a time, and verifies by what the fusion picks at each position.

    pace: what members cost and how often drafts are accepted, learnt from all that was decoded here.
    """

    def __init__(self, ensemble: Ensemble, picker: Picker, clock: Callable[[], float]) -> None:
        self.pace = Pace({name: member.n_bytes for name, member in ensemble.members.items()})
        self._ensemble = ensemble
        self._picker = picker
        self._clock = clock
        self._evaluating = 0.0
        self._kept = RowKeeper()

    def step(self, generation: Generation) -> Outcome:
        """One step of one generation: draft, let the other members evaluate the whole draft in one batch each, keep
        what the fusion picks too. What an interrupt leaves is taken back."""
        seq, n_tokens = generation.seq, len(generation.tokens)
        n_held = {name: self._ensemble.n_held(name, seq) for name in generation.roles.members}
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
                self._ensemble.shorten(name, seq, n_before + len(picks))
        n_accepted = sum(pick.from_draft for pick in picks)
        if draft.way.member not in (None, *n_held):
            self._ensemble.shorten(
                draft.way.drafter, seq, generation.n_text(draft.way.drafter) - len(picks) + n_accepted
            )
        generation.n_drafted += draft.n
        generation.n_accepted += n_accepted
        for judged in (draft, *others):
            self._judge(judged, picks)
        self.pace.timed(FUSION, draft.n + 1, self._clock() - started - self._evaluating)
        return picks or error or []

    def _pick_drafted(self, generation: Generation, draft: Draft, picks: list[Pick]) -> EdgeDLFError | None:
        """Verify a draft; as `verify`."""
        seq, roles, guesses = generation.seq, generation.roles, draft.guesses[: draft.n]
        self._evaluate_all(seq, {name: [*generation.last(name), *guesses] for name in draft.way.batched})
        if draft.rows is None:
            return self.verify(generation, self._ensemble.rows(roles, {}, draft.n + 1), guesses, picks)
        # The drafting expert evaluates its last guess only once all are accepted.
        t, n_rows = roles.experts.index(draft.way.drafter), min(len(draft.rows), draft.n + 1)
        error = self.verify(generation, self._rows(roles, n_rows, t, draft.rows), guesses, picks)
        if sum(pick.from_draft for pick in picks) == draft.n == n_rows:
            last = self._evaluate(draft.way.drafter, seq, guesses[-1:])
            error = self.verify(generation, self._rows(roles, 1, t, last, n_rows), [], picks)
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
        quoted = Draft(Way(QUOTES, roles.members), *quote(generation.tokens, n_most, generation.ends))
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
        if quoted.guesses:
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
        n_known = self._ensemble.n_common(name, generation.seq, generation.whole_text(name))
        n_behind = generation.n_text(name) - n_known
        has_room = self._room(generation, [name]) == self._room(generation, members)
        has_room = has_room and n_behind + MAX_DRAFT <= self._ensemble.n_free()
        return Way(name, members, name, is_fused=False, n_behind=n_behind) if has_room else None

    def _draft_by_member(self, generation: Generation, way: Way, n_most: int, rate: float | None) -> Draft:
        """Let a member decode ahead on its own, under the noise, filters and penalties of each position: `n_most`
        tokens, or while that promises more than `rate` tokens a second."""
        draft, name = Draft(way), way.drafter
        chances: list[float] = []
        due = generation.last(name)
        if not way.is_fused:
            n_held = self._ensemble.begin(name, generation.seq, generation.whole_text(name))
            due = generation.whole_text(name)[n_held:]
        while True:
            row = self._evaluate(name, generation.seq, due)[-1:]
            if way.is_fused:
                row = self._kept.keep(len(draft.guesses), row)
                draft.rows = self._kept.rows[: len(draft.guesses) + 1]
            if not n_most:
                return draft
            drawn = generation.draw(draft.guesses)
            (picked,) = self._picker.choose([generation], Rows(row, None, ()), [()], [drawn], [draft.guesses], (name,))
            if isinstance(picked, EdgeDLFError):  # met again where that row is fused
                return draft
            if generation.ends(picked.token):
                n_most = len(draft.guesses)  # verifying those before it tells whether the answer ends there
            draft.guesses.append(picked.token)
            draft.probabilities.append(min(1.0, math.exp(picked.logprob)))
            n_wanted = n_most
            if rate is not None:
                chances += self.pace.chances(way, draft.probabilities[-1:])
                n_wanted = self.pace.length(way, chances, n_most, rate)
            draft.n = min(n_wanted, len(draft.guesses))
            if n_wanted <= len(draft.guesses):
                return draft
            due = draft.guesses[-1:]

    def _room(self, generation: Generation, members: Iterable[str]) -> int:
        """Tokens that may be drafted before the answer's limit or a member's context is reached."""
        longest = max(generation.n_text(name) for name in members)
        return max(0, min(generation.n_most - 1, self._ensemble.n_ctx - longest))

    def _evaluate(self, name: str, seq: int, tokens: Sequence[int]) -> Logits:
        """Rows after each of `tokens`, or after the last where they are many; notes what one member needs for them."""
        while len(tokens) > MAX_DRAFT + 1:
            ahead = tokens[: min(len(tokens) - 1, self._ensemble.n_batch)]
            self._ensemble.decode(name, [Run(seq, ahead, 0)])
            tokens = tokens[len(ahead) :]
        started = self._clock()
        self._ensemble.decode(name, [Run(seq, tokens, len(tokens))])
        rows = self._ensemble.members[name].logits()  # on a GPU, waits for the result
        elapsed = self._clock() - started
        self._evaluating += elapsed
        self.pace.timed(name, len(tokens), elapsed)
        return rows

    def _evaluate_all(self, seq: int, due: Mapping[str, Sequence[int]]) -> None:
        """As `_evaluate`, several members. Where they overlap it cannot be told how long which of them took, nor does
        that matter to what all of them cost: each is noted with a share by its size."""
        if not self._ensemble.overlaps:
            for name, tokens in due.items():
                self._evaluate(name, seq, tokens)
            return
        started = self._clock()
        self._ensemble.decode_all({name: [Run(seq, tokens, len(tokens))] for name, tokens in due.items()})
        for name in due:
            self._ensemble.members[name].logits()
        elapsed = self._clock() - started
        self._evaluating += elapsed
        n_bytes = sum(self._ensemble.members[name].n_bytes for name in due)
        for name, tokens in due.items():
            self.pace.timed(name, len(tokens), elapsed * self._ensemble.members[name].n_bytes / n_bytes)

    def _rows(self, roles: Roles, n_rows: int, t: int, rows_of_t: Logits, first: int = 0) -> Rows:
        """`n_rows` rows of all members from row `first` on, those of expert `t` given."""
        own = Roles(roles.primary, roles.base, tuple(name for name in roles.experts if name != roles.experts[t]))
        rows = self._ensemble.rows(own, dict.fromkeys(roles.members, first), n_rows)
        experts = [*rows.experts[:t], rows_of_t[:n_rows], *rows.experts[t:]]
        return Rows(rows.primary, rows.base, tuple(experts))

    def verify(
        self, generation: Generation, rows: Rows, guesses: Sequence[int], picks: list[Pick]
    ) -> EdgeDLFError | None:
        """Pick at each position of `rows` (K, …), up to the first pick that is not what was guessed there, and append
        to `picks`. Returns what makes the next pick impossible."""
        drafts = [guesses[:k] for k in range(len(rows.primary))]
        for k, pick in enumerate(self._picker.pick([generation] * len(drafts), rows, drafts)):
            if isinstance(pick, EdgeDLFError):
                return pick
            accepted = k < len(guesses) and pick.token == guesses[k]
            picks.append(pick._replace(from_draft=accepted))
            generation.add(pick)
            if not accepted:
                break
        return None
