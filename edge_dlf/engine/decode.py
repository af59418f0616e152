"""The decoding loop: draft → decode members → search α → fuse → select → accept → trim.

Each `Decoder.step` lets every member evaluate, in one batch, what each generation's text has beyond what the member
holds: a part of the prompt, the last pick, or that and what a drafter guesses to follow it. Where a whole text has been
evaluated, α is searched and a token picked; a draft's picks are kept up to the first that differs from its guess. Picks
depend on (seed, position, text) alone, so that drafting and batching change how fast tokens come, not which. Text, stop
strings and limits are the caller's; which generations take part in a step is the scheduler's.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

from ..errors import EdgeDLFError
from .backend import N_ROWS, Run
from .ensemble import Ensemble
from .generation import Generation, Outcome
from .pace import Contest
from .picker import Picker
from .speculation import Speculation

if TYPE_CHECKING:
    from ..fusion.fuser import Fuser


class Decoder:
    """Decodes generations over one ensemble. One thread at a time.

    contest: whether what drafts save is worth the time that they take.
    """

    def __init__(self, ensemble: Ensemble, fuser: Fuser, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ensemble = ensemble
        self.picker = Picker(fuser)
        self.speculation = Speculation(ensemble, self.picker, clock)
        self.contest = Contest()
        self._clock = clock

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
            return self.speculation.step(generation)
        started = self._clock()
        if self.contest.drafts:
            outcome = self.speculation.step(generation)
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
            for generation, pick in zip(owners, self.picker.pick(owners, rows, ahead), strict=True):
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
        groups = _fused_alike(sorted(whole, key=attrgetter("seq")))  # as streams lie
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
