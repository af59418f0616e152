"""The decoding loop: decode members → search α → fuse → select.

`Decoder.start` evaluates the prompts and picks the first token; each `Decoder.step` feeds the last pick to every member
and picks the next. Text, stop strings and limits belong to the caller.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .ensemble import Ensemble, Roles, Rows
from .params import FusionParams, SamplingParams

if TYPE_CHECKING:
    from .fusion import Fuser


@dataclass(frozen=True)
class Pick:
    """One selected token.

    logprob: natural log of its probability in the fused distribution, before penalties and filters.
    alphas: the weight of each expert of the generation's roles. top_logprobs: (id, logprob), best first.
    """

    token: int
    logprob: float
    alphas: tuple[float, ...]
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass
class Generation:
    """One sequence while it is decoded.

    tokens: the primary member's prompt and all picks so far; penalties look back over them, and their number is the
    position that keys the draw. n_top: how many `top_logprobs` each pick carries.
    """

    seq: int
    roles: Roles
    fusion: FusionParams
    sampling: SamplingParams
    alphas: tuple[float, ...] = ()
    n_top: int = 0
    tokens: list[int] = field(default_factory=list)
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.seed = secrets.randbits(64) if seed is None else seed

    def recent(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The tokens that penalties look back over."""
        window = self.sampling.repeat_last_n
        start = 0 if window < 0 else max(0, len(self.tokens) - window)
        return np.array(self.tokens[start:], np.int32)


class Decoder:
    """Decodes generations over one ensemble. One thread at a time."""

    def __init__(self, ensemble: Ensemble, fuser: Fuser) -> None:
        self.ensemble = ensemble
        self._fuser = fuser

    def start(self, generation: Generation, prompts: Mapping[str, Sequence[int]]) -> tuple[Pick, int]:
        """Evaluate each member's prompt and pick the first token; returns the tokens that had to be evaluated, too."""
        roles = generation.roles
        n_evaluated = self.ensemble.prefill(generation.seq, {name: prompts[name] for name in roles.members})
        generation.tokens = list(prompts[roles.primary])
        (pick,) = self._pick([generation], self.ensemble.rows(roles))
        return pick, n_evaluated

    def step(self, generations: Sequence[Generation]) -> list[Pick]:
        """Feed each generation its last pick and pick its next token; all must share one `roles` and `fusion`."""
        roles = generations[0].roles
        self.ensemble.decode(roles, [(generation.seq, generation.tokens[-1:]) for generation in generations])
        return self._pick(generations, self.ensemble.rows(roles))

    def _pick(self, generations: Sequence[Generation], rows: Rows) -> list[Pick]:
        roles, fusion = generations[0].roles, generations[0].fusion
        if fusion.method == "dynamic" and rows.base is not None:
            choices = self._fuser.search(rows.primary, rows.base, rows.experts, fusion, roles.members)
            weights = [
                tuple(choice.alpha if t == choice.expert else 0.0 for t in range(len(roles.experts)))
                for choice in choices
            ]
        else:
            weights = [generation.alphas for generation in generations]
        return [
            self._select(generation, rows, k, alphas)
            for k, (generation, alphas) in enumerate(zip(generations, weights, strict=True))
        ]

    def _select(self, generation: Generation, rows: Rows, k: int, alphas: tuple[float, ...]) -> Pick:
        self._fuser.fuse(
            rows.primary[k],
            None if rows.base is None else rows.base[k],
            [expert[k] for expert in rows.experts],
            alphas,
            generation.roles.members,
        )
        position = len(generation.tokens)
        token, logprob = self._fuser.select(generation.sampling, generation.seed, position, generation.recent())
        top_logprobs = self._fuser.top_logprobs(generation.n_top) if generation.n_top else ()
        generation.tokens.append(token)
        return Pick(token, logprob, alphas, top_logprobs)
