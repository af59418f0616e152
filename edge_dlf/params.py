"""Parameters and results as frozen dataclasses; every default of the method and of sampling stands here, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from .errors import InvalidParameterError

METHODS = ("dynamic", "static", "large", "base")
SEARCHES = ("grid", "exact")
RESERVED_NAMES = frozenset(METHODS)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidParameterError(message)


@dataclass(frozen=True)
class FusionParams:
    """How the members' logits become one row: `large + Σ_t α_t (expert_t − base)`.

    method: "dynamic" (α found at each step by matching KL divergences), "static" (fixed α), "large", "base",
        or the name of an expert (that member alone).
    search: "grid" (the paper's Algorithm 1: α over 0, alpha_step, …, alpha_max, one expert at a time) or
        "exact" (the continuous optimum of the same objective in [0, alpha_max]).
    alpha: for "static" only; one float for every expert, or a mapping from expert name to float.
    plausibility: β of contrastive decoding; the fusion chooses only among tokens to which an expert with a weight gives
        at least β times the probability of its best one. 0 is off. It is a filter: logprobs are those without it.
    Raises InvalidParameterError where a value cannot be used.
    """

    method: str = "dynamic"
    search: str = "grid"
    alpha: float | Mapping[str, float] = 1.0
    alpha_max: float = 2.0
    alpha_step: float = 0.1
    plausibility: float = 0.0

    def __post_init__(self) -> None:
        _require(self.search in SEARCHES, f"search must be one of {', '.join(SEARCHES)}, not {self.search!r}")
        alphas = self.alpha.values() if isinstance(self.alpha, Mapping) else [self.alpha]
        _require(all(math.isfinite(alpha) for alpha in alphas), f"alpha must be finite, not {self.alpha!r}")
        _require(0.0 < self.alpha_max <= 100.0, f"alpha_max must lie in (0, 100], not {self.alpha_max!r}")
        _require(
            0.0 < self.alpha_step <= self.alpha_max,
            f"alpha_step must lie in (0, alpha_max], not {self.alpha_step!r}",
        )
        _require(0.0 <= self.plausibility <= 1.0, f"plausibility must lie in [0, 1], not {self.plausibility!r}")
        ratio = self.alpha_max / self.alpha_step
        _require(ratio < 1001 - 1e-9, f"alpha_max / alpha_step must not exceed 1000, not {ratio:.0f}")

    @property
    def n_grid(self) -> int:
        """Number of grid values 0, alpha_step, …, alpha_max."""
        return math.floor(self.alpha_max / self.alpha_step + 1e-9) + 1


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from a fused row, in this order: penalties and logit_bias, then, unless temperature is 0,
    top-k, top-p, min-p, temperature, draw.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
    repeat_penalty, frequency_penalty, presence_penalty: over the last `repeat_last_n` tokens (0: none, -1: all).
    logit_bias: token id -> number added to its logit. seed: None draws a new one for each request.
    Raises InvalidParameterError where a value cannot be used.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature < math.inf, f"temperature must be 0 or more, not {self.temperature!r}")
        _require(self.top_k >= 0, f"top_k must be 0 or more, not {self.top_k!r}")
        _require(0.0 < self.top_p <= 1.0, f"top_p must lie in (0, 1], not {self.top_p!r}")
        _require(0.0 <= self.min_p <= 1.0, f"min_p must lie in [0, 1], not {self.min_p!r}")
        _require(0.0 < self.repeat_penalty < math.inf, f"repeat_penalty must be above 0, not {self.repeat_penalty!r}")
        _require(self.repeat_last_n >= -1, f"repeat_last_n must be -1 or more, not {self.repeat_last_n!r}")
        for name in ("frequency_penalty", "presence_penalty"):
            _require(math.isfinite(getattr(self, name)), f"{name} must be finite, not {getattr(self, name)!r}")
        for token, bias in (self.logit_bias or {}).items():
            _require(token >= 0, f"logit_bias names token {token}, which cannot exist")
            _require(not math.isnan(bias) and bias < math.inf, f"logit_bias of token {token} must not be {bias!r}")
        _require(
            self.seed is None or 0 <= self.seed < 2**64,
            f"seed must be an integer from 0 to 2**64 - 1, not {self.seed!r}",
        )

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on the tokens before it."""
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


Overlap: TypeAlias = Literal["off", "queue", "threads"]
"""How members that have devices of their own are decoded: each once the one before is done, or handed over one after
the other without waiting for any, or handed over by a thread each."""
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)

MAX_DRAFT = 8
"""Most tokens that are drafted at once."""


def check_draft(draft: int | str) -> None:
    """Raise InvalidParameterError unless `draft` is "auto", "off" or a number of tokens up to MAX_DRAFT."""
    is_number = isinstance(draft, int) and not isinstance(draft, bool) and 0 <= draft <= MAX_DRAFT
    _require(is_number or draft in ("auto", "off"), f"draft must be auto, off or 0 to {MAX_DRAFT}, not {draft!r}")
