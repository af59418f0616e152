"""One sequence while it is decoded: its text, what decides its picks, and what a step gives it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import EdgeDLFError
from ..fusion.records import N_CANDIDATES, Draw, Trace
from ..params import MAX_DRAFT, FusionParams, SamplingParams
from .constraint import Constraint
from .ensemble import Roles

_NO_TOKENS = np.empty(0, np.int32)


def _never(token: int) -> bool:
    return False


class Pick(NamedTuple):
    """One selected token.

    logprob: natural log of its probability in the fused distribution, before penalties and filters.
    alphas: the weight of each expert of the generation's roles. top_logprobs: (id, logprob), best first.
    from_draft: whether it had been drafted. trace: why it was chosen, if that was asked for.
    """

    token: int
    logprob: float
    alphas: tuple[float, ...]
    top_logprobs: tuple[tuple[int, float], ...]
    from_draft: bool = False
    trace: Trace | None = None


@dataclass(eq=False)
class Generation:
    """One sequence while it is decoded.

    prompts: tokens for each of `members`. n_prompt: those of the primary member. tokens: its prompt and all picks so
    far; penalties look back over them, and their number is the position that keys the draw. seq: its number in every
    member's cache. n_top: how many `top_logprobs` each pick carries. traced: whether it carries a `trace` too. n_draft:
    tokens to draft at each step, None for what gives the most tokens a second. n_most: picks that may still come. ends:
    whether a token ends the answer, so that nothing is drafted after it.
    strength: each expert's weight of late. n_prefilled: tokens that had to be evaluated before picks could go on.
    n_drafted, n_accepted: drafted tokens, and those that were kept. constraint: what the picks must make up;
    n_settled: those that it has taken in. scored: the tokens that picks are to be, which are given rather than chosen.
    """

    roles: Roles
    prompts: Mapping[str, Sequence[int]]
    fusion: FusionParams
    sampling: SamplingParams
    seq: int = 0
    alphas: tuple[float, ...] = ()
    n_top: int = 0
    traced: bool = False
    scored: tuple[int, ...] = ()
    n_draft: int | None = 0
    n_most: int = MAX_DRAFT + 1
    ends: Callable[[int], bool] = _never
    constraint: Constraint | None = None
    n_prompt: int = field(init=False)
    tokens: list[int] = field(init=False)
    strength: dict[str, float] = field(default_factory=dict)
    n_prefilled: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_settled: int = 0
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        self.tokens = list(self.prompts[self.roles.primary])
        self.n_prompt = len(self.tokens)

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

    def last(self, name: str) -> list[int]:
        """The last token of the prompt of the member `name` and all picks."""
        return self.text(name, self.n_text(name) - 1, self.n_text(name))

    def draw(self, guesses: Sequence[int] = ()) -> Draw:
        """What choosing the next token needs, were the text followed by `guesses`."""
        recent = self._recent(guesses) if self.sampling.penalises else _NO_TOKENS
        n_top = max(self.n_top, N_CANDIDATES) if self.traced else self.n_top
        position = len(self.tokens) + len(guesses)
        scored = self.scored[position - self.n_prompt] if self.scored else None
        return Draw(self.sampling, self.seed, position, recent, n_top, scored, self.fusion.plausibility)

    def _recent(self, guesses: Sequence[int]) -> npt.NDArray[np.int32]:
        """The tokens that penalties look back over, were the text followed by `guesses`."""
        window = self.sampling.repeat_last_n
        start = 0 if window < 0 else max(0, len(self.tokens) + len(guesses) - window)
        return np.array([*self.tokens[start:], *guesses[max(0, start - len(self.tokens)) :]], np.int32)

    def unscored(self) -> tuple[int, ...]:
        """What is left of `scored`."""
        return self.scored[len(self.tokens) - self.n_prompt :]

    def settle(self) -> None:
        """Let the constraint take in the picks of the steps before: those of a step that runs may be taken back."""
        if self.constraint:
            for token in self.unsettled():
                self.constraint.accept(token)
                self.n_settled += 1

    def unsettled(self) -> list[int]:
        """Picks that the constraint has not taken in yet."""
        return self.tokens[self.n_prompt + self.n_settled :]

    def drafting_member(self) -> str | None:
        """The member that drafts: of the experts the one with the most weight of late; for the large model the base."""
        if self.roles.experts:
            return max(self.roles.experts, key=lambda name: self.strength.get(name, 0.0))
        return "base" if self.roles.primary == "large" else None

    def add(self, pick: Pick) -> None:
        """Append a pick."""
        self.tokens.append(pick.token)
        for name, alpha in zip(self.roles.experts, pick.alphas, strict=False):
            self.strength[name] = 0.8 * self.strength.get(name, 0.0) + 0.2 * alpha


Outcome: TypeAlias = "list[Pick] | EdgeDLFError"
"""What a step gave a generation: picks, or why there is none."""
