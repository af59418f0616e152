"""What the fusion is asked for one row, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..params import SamplingParams

N_CANDIDATES = 5
"""Most likely tokens that a trace lists of each member and of the fusion."""


@dataclass(frozen=True)
class Draw:
    """What choosing a token from one fused row needs.

    position: number of tokens before it, which with `seed` keys the noise. recent: the tokens that penalties look back
    over, (N,) int32; none are needed where there are no penalties. n_top: how many likely tokens to list. scored: a
    token that is given rather than to be chosen. plausibility: as in FusionParams. banned: tokens that cannot be
    chosen, ascending; None for none.
    """

    sampling: SamplingParams
    seed: int
    position: int
    recent: npt.NDArray[np.int32]
    n_top: int = 0
    scored: int | None = None
    plausibility: float = 0.0
    banned: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Picked:
    """A token chosen from one fused row: its log-probability there before penalties and filters, and the most likely
    tokens, (id, logprob), best first."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class AlphaChoice:
    """Result of one α search: the pair (expert, α) and the quantities that it was chosen by.

    expert: index into the experts. alpha: its weight; all other experts have 0.
    objective: J(α) = Σ_t [(KL(P̃‖P) − a_t)² + (KL(P‖P̃) − b_t)²], in nats².
    kl_forward, kl_reverse: KL(P̃‖P), KL(P‖P̃) of the fused row, in nats.
    target_forward, target_reverse: the means over t of a_t = KL(Q_t‖Q) and b_t = KL(Q‖Q_t), in nats.
    """

    expert: int
    alpha: float
    objective: float
    kl_forward: float
    kl_reverse: float
    target_forward: float
    target_reverse: float


@dataclass(frozen=True)
class Trace:
    """Why a step chose its token.

    choice: of α; None where it was not searched. alphas: the weight of each expert, by name. fused: the fused
    distribution's most likely tokens, (id, logprob), best first. members: name -> what that member alone would have
    chosen, under the same penalties, filters and noise, and its own most likely tokens.
    """

    choice: AlphaChoice | None
    alphas: Mapping[str, float]
    fused: tuple[tuple[int, float], ...]
    members: Mapping[str, Picked]
