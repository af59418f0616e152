"""The decoding loop: draft → decode members → search α → fuse → select → accept → trim.

Each `Decoder.step` lets every member evaluate, in one batch, what each generation's text has beyond what the member
holds: a part of the prompt, the last pick, or that and what a drafter guesses to follow it. Where a whole text has been
evaluated, α is searched and a token picked; a draft's picks are kept up to the first that differs from its guess. Picks
depend on (seed, position, text) alone, so that drafting and batching change how fast tokens come, not which. Text, stop
strings and limits are the caller's; which generations take part in a step is the scheduler's.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .backend import Logits, Run
from .draft import Drafter, MemberDrafter, NgramDrafter
from .ensemble import Ensemble, Roles, Rows
from .errors import EdgeDLFError
from .pace import Pace
from .params import MAX_DRAFT, Draw, FusionParams, SamplingParams

if TYPE_CHECKING:
    from .fusion import Fuser


@dataclass(frozen=True)
class Pick:
    """One selected token.

    logprob: natural log of its probability in the fused distribution, before penalties and filters.
    alphas: the weight of each expert of the generation's roles. top_logprobs: (id, logprob), best first.
    from_draft: whether it had been drafted.
    """

    token: int
    logprob: float
    alphas: tuple[float, ...]
    top_logprobs: tuple[tuple[int, float], ...]
    from_draft: bool = False


@dataclass(eq=False)
class Generation:
    """One sequence while it is decoded.

    prompts: tokens for each of `members`. tokens: the primary member's prompt and all picks so far; penalties look
    back over them, and their number is the position that keys the draw. seq: its number in every member's cache.
    n_top: how many `top_logprobs` each pick carries. n_draft: tokens to draft at each step, None for what gives the
    most tokens a second. n_most: picks that may still come. strength: each expert's weight of late. n_prefilled: tokens
    that had to be evaluated before picks could go on. n_drafted, n_accepted: drafted tokens, and those that were kept.
    """

    roles: Roles
    prompts: Mapping[str, Sequence[int]]
    fusion: FusionParams
    sampling: SamplingParams
    seq: int = 0
    alphas: tuple[float, ...] = ()
    n_top: int = 0
    n_draft: int | None = 0
    n_most: int = MAX_DRAFT + 1
    tokens: list[int] = field(init=False)
    strength: dict[str, float] = field(default_factory=dict)
    n_prefilled: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        self.tokens = list(self.prompts[self.roles.primary])

    @property
    def n_prompt(self) -> int:
        """Tokens of the primary member's prompt."""
        return len(self.prompts[self.roles.primary])

    def n_text(self, name: str) -> int:
        """Tokens of the prompt of the member `name` and of all picks."""
        return len(self.prompts[name]) + len(self.tokens) - self.n_prompt

    def whole_text(self, name: str) -> list[int]:
        """The prompt of the member `name`, and all picks."""
        return self.text(name, 0, self.n_text(name))

    def text(self, name: str, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of the prompt of the member `name` and all picks."""
        prompt = self.prompts[name]
        shift = self.n_prompt - len(prompt)
        return [*prompt[start:stop], *self.tokens[max(start + shift, self.n_prompt) : max(stop + shift, self.n_prompt)]]

    def draw(self, guesses: Sequence[int] = ()) -> Draw:
        """What choosing the next token needs, were the text followed by `guesses`."""
        window = self.sampling.repeat_last_n
        start = 0 if window < 0 else max(0, len(self.tokens) + len(guesses) - window)
        recent = np.array([*self.tokens[start:], *guesses[max(0, start - len(self.tokens)) :]], np.int32)
        return Draw(self.sampling, self.seed, len(self.tokens) + len(guesses), recent, self.n_top)

    def members(self) -> tuple[str, ...]:
        """Members that must hold the prompt: those of the roles, and the base where it drafts for the large model."""
        drafts_outside = self.n_draft and self.roles.members == ("large",)
        return (*self.roles.members, *(["base"] if drafts_outside else []))

    def drafting_member(self) -> str | None:
        """The member that drafts: of the experts the one with the most weight of late."""
        if self.roles.experts:
            return max(self.roles.experts, key=lambda name: self.strength.get(name, 0.0))
        return "base" if len(self.members()) > 1 else None

    def add(self, pick: Pick) -> None:
        """Append a pick."""
        self.tokens.append(pick.token)
        for name, alpha in zip(self.roles.experts, pick.alphas, strict=False):
            self.strength[name] = 0.8 * self.strength.get(name, 0.0) + 0.2 * alpha


Outcome: TypeAlias = "list[Pick] | EdgeDLFError"
"""What a step gave a generation: picks, or why there is none."""


class Decoder:
    """Decodes generations over one ensemble. One thread at a time.

    pace: what members cost and how often drafts are accepted, learnt from all that was decoded.
    """

    def __init__(self, ensemble: Ensemble, fuser: Fuser) -> None:
        self.ensemble = ensemble
        self.pace = Pace()
        self._fuser = fuser
        self._ngrams = NgramDrafter()
        self._drafters = {name: MemberDrafter(name) for name in ensemble.members if name != "large"}

    def begin(self, generation: Generation) -> None:
        """Give the sequence `generation.seq` to a generation, new or broken off; what is in a cache already is not
        evaluated again."""
        for name in generation.members():
            self.ensemble.begin(name, generation.seq, generation.whole_text(name))
        generation.n_prefilled += self.n_due(generation)

    def n_new(self, generation: Generation) -> int:
        """The most tokens of the text that a member has not in its cache yet, in any sequence."""
        return max(
            generation.n_text(name) - self.ensemble.n_known(name, generation.whole_text(name))
            for name in generation.members()
        )

    def n_due(self, generation: Generation) -> int:
        """The most tokens that a member has to evaluate before the next pick."""
        return max(self._n_due(generation, name) for name in generation.members())

    def _n_due(self, generation: Generation, name: str) -> int:
        return generation.n_text(name) - self.ensemble.n_held(name, generation.seq)

    def step(self, generations: Sequence[Generation], n_prefill: int | None = None) -> list[Outcome]:
        """Evaluate what is due and pick what follows. Of each generation: no pick while its prompt is evaluated in
        parts, then one, or more where it is drafted for, which only a generation on its own is; or the error that makes
        a pick impossible, such as a member's NaN.

        n_prefill: tokens of prompts to evaluate, beside the one that each other generation needs; None for as many as
        fit into a batch. Generations that come first are served first.
        """
        if len(generations) == 1 and generations[0].n_draft != 0 and self.n_due(generations[0]) == 1:
            return [self._step_drafted(generations[0])]
        groups, runs = self._plan(generations, n_prefill)
        for name, member_runs in runs.items():
            self.ensemble.decode(name, member_runs)
        outcomes: dict[Generation, Outcome] = {generation: [] for generation in generations}
        first: Counter[str] = Counter()
        for group in groups:
            roles = group[0].roles
            rows = self.ensemble.rows(roles, first, len(group))
            first.update(roles.members * len(group))
            for generation, pick in zip(group, self._pick(group, rows, [()] * len(group)), strict=True):
                outcomes[generation] = pick if isinstance(pick, EdgeDLFError) else [pick]
                if isinstance(pick, Pick):
                    generation.add(pick)
        return list(outcomes.values())

    def _plan(
        self, generations: Sequence[Generation], n_prefill: int | None
    ) -> tuple[list[list[Generation]], dict[str, list[Run]]]:
        """Generations whose whole text will have been evaluated, those that are fused alike together, and what each
        member has to evaluate, with their rows in that order."""
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
        for generation in chain(*groups):
            self._add_runs(runs, generation, None)
        return groups, runs

    def _add_runs(self, runs: dict[str, list[Run]], generation: Generation, n_most: int | None) -> None:
        """What the members have to evaluate of one generation: at most `n_most` tokens of its prompt, and not the last,
        which is for the step that picks; or, if that is None, all."""
        for name in generation.members():
            n_held, n_text = self.ensemble.n_held(name, generation.seq), generation.n_text(name)
            stop = n_text if n_most is None else min(n_held + n_most, n_text - 1)
            n_rows = int(n_most is None and name in generation.roles.members)
            if stop > n_held:
                runs[name].append(Run(generation.seq, generation.text(name, n_held, stop), n_rows))

    def rewind(self, generation: Generation, n_tokens: int) -> None:
        """Take back all but the first `n_tokens` of `generation.tokens`; every member then holds all of them but the
        last, as after the step that picked it."""
        n_surplus = len(generation.tokens) - n_tokens
        if n_surplus > 0:
            del generation.tokens[n_tokens:]
            for name in generation.members():
                n_held = self.ensemble.n_held(name, generation.seq)
                self.ensemble.shorten(name, generation.seq, n_held - n_surplus)

    def _step_drafted(self, generation: Generation) -> Outcome:
        """One step of one generation: draft, let the other members evaluate the whole draft in one batch each, keep
        what the fusion picks too."""
        seq, roles = generation.seq, generation.roles
        n_held = {name: self.ensemble.n_held(name, seq) for name in generation.members()}
        drafter, guesses = self._draft(generation)
        member = drafter.member if drafter else None
        for name in n_held:
            if name != member:
                self._evaluate(name, seq, [generation.tokens[-1], *guesses])
        picks: list[Pick] = []
        if isinstance(drafter, MemberDrafter) and member in roles.experts:
            # The drafting expert has no row after its last guess; it evaluates that one only if all are accepted.
            t = roles.experts.index(drafter.name)
            error = self._verify(generation, self._rows(roles, len(guesses), t, drafter.rows), guesses, picks)
            if sum(pick.from_draft for pick in picks) == len(guesses):
                self._evaluate(drafter.name, seq, guesses[-1:])
                last = self.ensemble.members[drafter.name].logits()
                error = self._verify(generation, self._rows(roles, 1, t, last, len(guesses)), [], picks)
        else:
            error = self._verify(generation, self.ensemble.rows(roles, {}, len(guesses) + 1), guesses, picks)
            if member and len(picks) > len(guesses):
                self._evaluate(member, seq, guesses[-1:])
        for name, n_before in n_held.items():
            self.ensemble.shorten(name, seq, n_before + len(picks))
        if drafter:
            n_accepted = sum(pick.from_draft for pick in picks)
            generation.n_drafted += len(guesses)
            generation.n_accepted += n_accepted
            self.pace.judged(_kind(drafter), len(guesses), n_accepted)
        return picks or error or []

    def _draft(self, generation: Generation) -> tuple[Drafter | None, list[int]]:
        """The drafter whose draft promises the most tokens a second, and its guesses; no drafter where none pays."""
        n_most = min(self._room(generation), MAX_DRAFT if generation.n_draft is None else generation.n_draft)
        members = generation.members()
        drafters: list[Drafter] = []
        repeated = self._ngrams.draft(generation.tokens, n_most)
        if repeated:
            drafters.append(self._ngrams)
        if name := generation.drafting_member():
            drafters.append(self._drafters[name])
        plans = []
        for drafter in drafters:
            most = min(n_most, len(repeated)) if drafter is self._ngrams else n_most
            n = most
            if generation.n_draft is None:
                n = self.pace.choose(_kind(drafter), drafter.member, members, most)
            if n:
                plans.append((self.pace.rate(_kind(drafter), drafter.member, members, n), n, drafter))
        if not plans:
            return None, []
        _, n, drafter = max(plans, key=lambda plan: plan[0])
        guesses = self._draft_by_member(generation, drafter, n) if isinstance(drafter, MemberDrafter) else repeated[:n]
        return (drafter, guesses) if guesses else (None, [])

    def _draft_by_member(self, generation: Generation, drafter: MemberDrafter, n_draft: int) -> list[int]:
        """Let a member decode ahead on its own, under the noise, filters and penalties of each position."""
        name, seq, guesses = drafter.name, generation.seq, list[int]()
        n_held = self.ensemble.n_held(name, seq)
        for n in range(n_draft):
            self._evaluate(name, seq, [*generation.tokens[-1:], *guesses][-1:])
            row = drafter.keep(n, self.ensemble.members[name].logits()[0])
            (picked,) = self._fuser.pick(row[None], None, (), [()], [generation.draw(guesses)], (name,))
            if isinstance(picked, EdgeDLFError):  # that row will be met without a draft, if at all
                self.ensemble.shorten(name, seq, n_held + n)
                break
            guesses.append(picked.token)
        return guesses

    def _room(self, generation: Generation) -> int:
        """Tokens that may be drafted before the answer's limit or a member's context is reached."""
        held = max(self.ensemble.n_held(name, generation.seq) for name in generation.members())
        return max(0, min(generation.n_most - 1, self.ensemble.n_ctx - held - 1))

    def _evaluate(self, name: str, seq: int, tokens: list[int]) -> None:
        """Let one member evaluate `tokens`, and note what it took."""
        started = time.perf_counter()
        self.ensemble.decode(name, [Run(seq, tokens, len(tokens))])
        self.ensemble.members[name].logits()  # on a GPU, waits for the result
        self.pace.timed(name, len(tokens), time.perf_counter() - started)

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
        names = generations[0].roles.members
        weights = self._weights(generations, rows)
        none = (0.0,) * len(rows.experts)
        picked = self._fuser.pick(
            rows.primary,
            rows.base,
            rows.experts,
            [none if isinstance(alphas, EdgeDLFError) else alphas for alphas in weights],
            [generation.draw(draft) for generation, draft in zip(generations, guesses, strict=True)],
            names,
        )
        outcomes: list[Pick | EdgeDLFError] = []
        for alphas, choice in zip(weights, picked, strict=True):
            if isinstance(alphas, EdgeDLFError):
                outcomes.append(alphas)
            elif isinstance(choice, EdgeDLFError):
                outcomes.append(choice)
            else:
                outcomes.append(Pick(choice.token, choice.logprob, alphas, choice.top_logprobs))
        return outcomes

    def _weights(self, generations: Sequence[Generation], rows: Rows) -> list[tuple[float, ...] | EdgeDLFError]:
        """α of each expert, for each row."""
        roles, fusion = generations[0].roles, generations[0].fusion
        if fusion.method != "dynamic" or rows.base is None:
            return [generation.alphas for generation in generations]
        return [
            choice
            if isinstance(choice, EdgeDLFError)
            else tuple(choice.alpha if t == choice.expert else 0.0 for t in range(len(roles.experts)))
            for choice in self._fuser.search(rows.primary, rows.base, rows.experts, fusion, roles.members)
        ]


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


def _kind(drafter: Drafter) -> str:
    return drafter.member or "n-gram"
