"""What the fusion is asked about one row, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import EdgeDLFError
from ..params import SamplingParams

N_CANDIDATES = 5
"""Number of likely tokens that a trace lists for the fusion and for each member."""


@dataclass(frozen=True)
class Draw:
    """How a token is chosen from one fused row.

    sampling: penalties, filters and temperature
    seed: keys the noise, together with `position`
    position: number of tokens before this one
    recent: token ids that penalties look back over, (N,) int32; may be empty where there are no penalties
    n_top: number of likely tokens to list
    scored: a token that is given rather than chosen
    plausibility: as in FusionParams
    banned: token ids that cannot be chosen, ascending
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
class AlphaChoice:
    """Result of one α search: the pair (expert, α) and the quantities by which it was chosen.

    expert: index into the experts
    alpha: its weight; all other experts have 0
    objective: J(α) = Σ_t [(KL(P̃‖P) − a_t)² + (KL(P‖P̃) − b_t)²], in nats²
    kl_forward, kl_reverse: KL(P̃‖P), KL(P‖P̃) of the fused row, in nats
    target_forward, target_reverse: the means over t of a_t = KL(Q_t‖Q) and b_t = KL(Q‖Q_t), in nats
    """

    expert: int
    alpha: float
    objective: float
    kl_forward: float
    kl_reverse: float
    target_forward: float
    target_reverse: float


class Pick(NamedTuple):
    """A token chosen from one fused row.

    token: its id; −1 where `error` says why none could be chosen
    logprob: natural log of its probability in the fused distribution, before penalties and filters
    top_logprobs: the likeliest tokens of the fused distribution, (id, logprob), best first
    weights: α of each expert, in their order; of each member with "weighted" and "blend"; () for one member
    choice: result of the α search, if there was one
    from_draft: True if the token had been drafted
    trace: why the token was chosen, if that was asked for
    """

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    weights: tuple[float, ...]
    choice: AlphaChoice | None
    error: EdgeDLFError | None = None
    from_draft: bool = False
    trace: Trace | None = None


@dataclass(frozen=True)
class Trace:
    """Why a step chose its token.

    choice: result of the α search; None where α was not searched
    alphas: weight of each expert, by name
    fused: the likeliest tokens of the fused distribution, (id, logprob), best first
    members: by name, what each member alone would have chosen under the same penalties, filters and noise
    """

    choice: AlphaChoice | None
    alphas: Mapping[str, float]
    fused: tuple[tuple[int, float], ...]
    members: Mapping[str, Pick]
