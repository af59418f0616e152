"""The decoding loop: draft → decode members → search α → fuse → select → accept → trim.

`Decoder.start` evaluates the prompts and picks the first token. Each `Decoder.step` feeds the last pick, and what a
drafter guesses to follow it, to every member in one batch each; α is searched and a token picked at each position as if
there were no draft, and picks are kept up to the first that differs from its guess. Picks depend on (seed, position,
text) alone, so that drafting changes how fast tokens come, not which. Text, stop strings and limits are the caller's.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .backend import Logits
from .draft import Drafter, MemberDrafter, NgramDrafter
from .ensemble import Ensemble, Roles, Rows
from .pace import Pace
from .params import MAX_DRAFT, FusionParams, SamplingParams

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


@dataclass
class Generation:
    """One sequence while it is decoded.

    tokens: the primary member's prompt and all picks so far; penalties look back over them, and their number is the
    position that keys the draw. n_top: how many `top_logprobs` each pick carries. n_draft: tokens to draft at each
    step, None for what gives the most tokens a second. n_most: picks that may still come. strength: each expert's
    weight of late. n_drafted, n_accepted: drafted tokens, and those of them that were kept.
    """

    seq: int
    roles: Roles
    fusion: FusionParams
    sampling: SamplingParams
    alphas: tuple[float, ...] = ()
    n_top: int = 0
    n_draft: int | None = 0
    n_most: int = MAX_DRAFT + 1
    tokens: list[int] = field(default_factory=list)
    strength: dict[str, float] = field(default_factory=dict)
    n_drafted: int = 0
    n_accepted: int = 0
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.seed = secrets.randbits(64) if seed is None else seed

    def recent(self, tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Those of `tokens` that penalties look back over."""
        window = self.sampling.repeat_last_n
        start = 0 if window < 0 else max(0, len(tokens) - window)
        return np.array(tokens[start:], np.int32)

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

    def start(self, generation: Generation, prompts: Mapping[str, Sequence[int]]) -> tuple[Pick, int]:
        """Evaluate each member's prompt and pick the first token; returns the tokens that had to be evaluated, too."""
        roles = generation.roles
        n_evaluated = self.ensemble.prefill(generation.seq, {name: prompts[name] for name in generation.members()})
        generation.tokens = list(prompts[roles.primary])
        (pick,) = self._pick([generation], self.ensemble.rows(roles))
        return pick, n_evaluated

    def step(self, generations: Sequence[Generation]) -> list[list[Pick]]:
        """Feed each generation its last pick and pick what follows: one token, or more where it is drafted for, which
        only a generation on its own is. All must share one `roles` and `fusion`."""
        if len(generations) == 1 and generations[0].n_draft != 0:
            return [self._step_drafted(generations[0])]
        roles = generations[0].roles
        for name in roles.members:
            self.ensemble.decode(name, [(generation.seq, generation.tokens[-1:]) for generation in generations])
        return [[pick] for pick in self._pick(generations, self.ensemble.rows(roles))]

    def rewind(self, generation: Generation, n_tokens: int) -> None:
        """Take back all but the first `n_tokens` of `generation.tokens`; every member then holds all of them but the
        last, as after the step that picked it."""
        n_surplus = len(generation.tokens) - n_tokens
        if n_surplus > 0:
            del generation.tokens[n_tokens:]
            for name in generation.members():
                n_held = self.ensemble.n_held(name, generation.seq)
                self.ensemble.shorten(name, generation.seq, n_held - n_surplus)

    def _step_drafted(self, generation: Generation) -> list[Pick]:
        """One step of one generation: draft, let the other members evaluate the whole draft in one batch each, keep
        what the fusion picks too."""
        seq, roles = generation.seq, generation.roles
        n_held = {name: self.ensemble.n_held(name, seq) for name in generation.members()}
        drafter, guesses = self._draft(generation)
        member = drafter.member if drafter else None
        for name in n_held:
            if name != member:
                self._evaluate(name, seq, [generation.tokens[-1], *guesses])
        if isinstance(drafter, MemberDrafter) and member in roles.experts:
            # The drafting expert has no row after its last guess; it evaluates that one only if all are accepted.
            t = roles.experts.index(drafter.name)
            rows = self._rows(roles, t, drafter.rows).part(0, len(guesses))
            picks = self._verify(generation, rows, guesses)
            if len(picks) == len(guesses) and picks[-1].from_draft:
                self._evaluate(drafter.name, seq, guesses[-1:])
                rows = self._rows(roles, t, self.ensemble.members[drafter.name].logits(), last=True)
                picks += self._verify(generation, rows, [])
        else:
            picks = self._verify(generation, self.ensemble.rows(roles), guesses)
            if member and len(picks) > len(guesses):
                self._evaluate(member, seq, guesses[-1:])
        for name, n_before in n_held.items():
            self.ensemble.shorten(name, seq, n_before + len(picks))
        if drafter:
            n_accepted = sum(pick.from_draft for pick in picks)
            generation.n_drafted += len(guesses)
            generation.n_accepted += n_accepted
            self.pace.judged(_kind(drafter), len(guesses), n_accepted)
        return picks

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
        if isinstance(drafter, MemberDrafter):
            return drafter, self._draft_by_member(generation, drafter, n)
        return drafter, repeated[:n]

    def _draft_by_member(self, generation: Generation, drafter: MemberDrafter, n_draft: int) -> list[int]:
        """Let a member decode ahead on its own, under the noise, filters and penalties of each position."""
        ahead = list(generation.tokens)
        for n in range(n_draft):
            self._evaluate(drafter.name, generation.seq, ahead[-1:])
            row = drafter.keep(n, self.ensemble.members[drafter.name].logits()[0])
            self._fuser.fuse(row, None, (), (), (drafter.name,))
            recent = generation.recent(ahead)
            ahead.append(self._fuser.select(generation.sampling, generation.seed, len(ahead), recent)[0])
        return ahead[len(generation.tokens) :]

    def _room(self, generation: Generation) -> int:
        """Tokens that may be drafted before the answer's limit or a member's context is reached."""
        held = max(self.ensemble.n_held(name, generation.seq) for name in generation.members())
        return max(0, min(generation.n_most - 1, self.ensemble.n_ctx - held - 1))

    def _evaluate(self, name: str, seq: int, tokens: list[int]) -> None:
        """Let one member evaluate `tokens`, and note what it took."""
        started = time.perf_counter()
        self.ensemble.decode(name, [(seq, tokens)])
        self.ensemble.members[name].logits()  # on a GPU, waits for the result
        self.pace.timed(name, len(tokens), time.perf_counter() - started)

    def _rows(self, roles: Roles, t: int, rows_of_t: Logits, last: bool = False) -> Rows:
        """Rows of all members, those of expert `t` given; `last`: of the last position only."""
        others = [rows_of_t if n == t else self.ensemble.members[name].logits() for n, name in enumerate(roles.experts)]
        assert roles.base is not None, "experts come with a base"
        primary, base = (self.ensemble.members[name].logits() for name in (roles.primary, roles.base))
        rows = Rows(primary, base, tuple(others))
        return rows.part(-1, None) if last else rows

    def _verify(self, generation: Generation, rows: Rows, guesses: Sequence[int]) -> list[Pick]:
        """Pick at each position of `rows` (K, …), up to the first pick that is not what was guessed there."""
        picks: list[Pick] = []
        for k, alphas in enumerate(self._weights([generation] * len(rows.primary), rows)):
            pick = self._select(generation, rows, k, alphas)
            accepted = k < len(guesses) and pick.token == guesses[k]
            picks.append(dataclasses.replace(pick, from_draft=accepted))
            if not accepted:
                break
        return picks

    def _pick(self, generations: Sequence[Generation], rows: Rows) -> list[Pick]:
        """Pick the next token of each generation from its row."""
        weights = self._weights(generations, rows)
        return [self._select(generation, rows, k, weights[k]) for k, generation in enumerate(generations)]

    def _weights(self, generations: Sequence[Generation], rows: Rows) -> list[tuple[float, ...]]:
        """α of each expert, for each row."""
        roles, fusion = generations[0].roles, generations[0].fusion
        if fusion.method != "dynamic" or rows.base is None:
            return [generation.alphas for generation in generations]
        choices = self._fuser.search(rows.primary, rows.base, rows.experts, fusion, roles.members)
        return [
            tuple(choice.alpha if t == choice.expert else 0.0 for t in range(len(roles.experts))) for choice in choices
        ]

    def _select(self, generation: Generation, rows: Rows, k: int, alphas: tuple[float, ...]) -> Pick:
        self._fuser.fuse(
            rows.primary[k],
            None if rows.base is None else rows.base[k],
            [expert[k] for expert in rows.experts],
            alphas,
            generation.roles.members,
        )
        tokens = generation.tokens
        recent = generation.recent(tokens)
        token, logprob = self._fuser.select(generation.sampling, generation.seed, len(tokens), recent)
        top_logprobs = self._fuser.top_logprobs(generation.n_top) if generation.n_top else ()
        pick = Pick(token, logprob, alphas, top_logprobs)
        generation.add(pick)
        return pick


def _kind(drafter: Drafter) -> str:
    return drafter.member or "n-gram"
