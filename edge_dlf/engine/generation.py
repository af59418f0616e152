"""One sequence that is being decoded: what was asked, how far it is, and what it took."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import EdgeDLFError
from ..fusion.records import N_CANDIDATES, Draw, Pick
from ..params import FusionParams, SamplingParams
from .constraint import Constraint, Tokens
from .ensemble import Roles

_NO_TOKENS = np.empty(0, np.int32)
_STRENGTH_DECAY = 0.8


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked of one sequence.

    prompts: the tokens of each member's prompt.
    max_tokens: the longest answer.
    n_top: how many `top_logprobs` each pick carries.
    traced: whether each pick carries a `trace`.
    n_draft: tokens to draft at each step; None for the number that gives the most tokens per second.
    is_end: tells whether a token ends the answer. Nothing is drafted after such a token.
    forced: the tokens that the picks have to be, where a given text is scored.
    """

    roles: Roles
    prompts: Mapping[str, Sequence[int]]
    fusion: FusionParams
    sampling: SamplingParams
    max_tokens: int = 2**31
    n_top: int = 0
    traced: bool = False
    n_draft: int | None = 0
    is_end: Callable[[int], bool] = lambda token: False
    forced: tuple[int, ...] = ()


@dataclass
class Counts:
    """What a generation took.

    n_prefilled: prompt tokens that were not in the KV cache and had to be evaluated.
    prefill_s: seconds of the steps up to the first token, that one included.
    n_steps, n_decoded, decode_s: steps after the first token, the tokens they gave, and their seconds.
    n_drafted, n_accepted: tokens that were drafted, and those of them that were kept.
    """

    n_prefilled: int = 0
    prefill_s: float = 0.0
    n_steps: int = 0
    n_decoded: int = 0
    decode_s: float = 0.0
    n_drafted: int = 0
    n_accepted: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one step gave one generation: picks, or the error that makes a pick impossible, or nothing yet."""

    generation: Generation
    picks: list[Pick] = field(default_factory=list)
    error: EdgeDLFError | None = None


class Generation:
    """The state of one sequence. The engine alone changes it.

    seq: the number of the sequence in every member's KV cache.
    pauses: lengths of a member's text at which it stops reading for a checkpoint; none where it can be cut anywhere.
    tokens: the first member's prompt and all picks so far. Their number keys the noise of the next pick.
    strength: a moving average of each expert's α, which begins at a fixed α.
    counts: what it took so far.
    """

    def __init__(self, request: GenerationRequest, constraint: Constraint | None = None, seq: int = 0) -> None:
        self.request = request
        self.seq = seq
        self.tokens = array("i", request.prompts[request.roles.members[0]])  # prompt lookup searches its bytes
        self.n_prompt = len(self.tokens)
        roles = request.roles
        self.strength = dict(zip(roles.experts, roles.alphas(), strict=False))
        self.counts = Counts()
        self.pauses: dict[str, list[int]] = {}
        self._penalises = request.sampling.penalises
        self._constraint = constraint
        self._n_constrained = 0
        self._seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members that take part."""
        return self.request.roles.members

    @property
    def n_picked(self) -> int:
        """Tokens picked so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def n_left(self) -> int:
        """Tokens that the answer may still have."""
        return self.request.max_tokens - self.n_picked

    def n_text(self, member: str) -> int:
        """Count the tokens of the member's prompt and all picks."""
        return len(self.request.prompts[member]) + self.n_picked

    def text(self, member: str, start: int = 0, stop: int | None = None) -> list[int]:
        """Return tokens `start` to `stop` of the member's prompt and all picks."""
        prompt = self.request.prompts[member]
        shift = self.n_prompt - len(prompt)
        last = None if stop is None else max(stop + shift, self.n_prompt)
        return [*prompt[start:stop], *self.tokens[max(start + shift, self.n_prompt) : last]]

    def unscored(self) -> tuple[int, ...]:
        """Return the forced tokens that have not been picked yet."""
        return self.request.forced[self.n_picked :]

    def draw(self, ahead: Sequence[int] = ()) -> Draw:
        """Describe the choice of the token that follows the text and `ahead`."""
        request = self.request
        n_top = max(request.n_top, N_CANDIDATES) if request.traced else request.n_top
        position = len(self.tokens) + len(ahead)
        forced = request.forced[position - self.n_prompt] if request.forced else None
        recent = self._recent(ahead) if self._penalises else _NO_TOKENS
        return Draw(request.sampling, self._seed, position, recent, n_top, forced, request.fusion.plausibility)

    def _recent(self, ahead: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return the tokens that penalties look back over, where the text is followed by `ahead`."""
        window = self.request.sampling.repeat_last_n
        start = 0 if window < 0 else max(0, len(self.tokens) + len(ahead) - window)
        return np.array([*self.tokens[start:], *ahead[max(0, start - len(self.tokens)) :]], np.int32)

    def advance_constraint(self) -> None:
        """Advance the constraint over the picks of earlier steps. Picks of the current step may be rolled back."""
        if self._constraint:
            for token in self._unconstrained():
                self._constraint.accept(token)
                self._n_constrained += 1

    @property
    def is_constrained(self) -> bool:
        """Whether some tokens may not follow."""
        return self._constraint is not None

    def banned(self, ahead: Sequence[int], token: int, patience_s: float | None) -> Tokens | None:
        """Return None if `token` may follow the text and `ahead`, or else all tokens that may not; as `Constraint`."""
        if self._constraint is None:
            return None
        return self._constraint.banned([*self._unconstrained(), *ahead], token, patience_s)

    def is_waiting(self, patience_s: float = 0.0) -> bool:
        """Whether a pick has to wait for the constraint, which is given so long to come to an end."""
        return self._constraint is not None and self._constraint.is_computing(patience_s)

    def _unconstrained(self) -> Sequence[int]:
        return self.tokens[self.n_prompt + self._n_constrained :]

    def append(self, pick: Pick) -> None:
        """Append a pick to the text."""
        self.tokens.append(pick.token)
        roles = self.request.roles
        for name, alpha in zip(roles.experts, roles.alphas(pick.weights), strict=False):
            self.strength[name] = _STRENGTH_DECAY * self.strength.get(name, 0.0) + (1 - _STRENGTH_DECAY) * alpha

    def count_step(self, n_picks: int, seconds: float) -> None:
        """Count a step that took part of the time and gave `n_picks` tokens."""
        counts = self.counts
        if self.n_picked == n_picks:
            counts.prefill_s += seconds
        else:
            counts.n_steps += 1
            counts.n_decoded += n_picks
            counts.decode_s += seconds
