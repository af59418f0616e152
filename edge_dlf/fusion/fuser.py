"""From the members' rows of logits to tokens: `Fuser.pick`, and the checked `search_alpha` and `fuse_logits`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError, EdgeDLFError, InvalidParameterError
from ..params import FusionParams, SamplingParams
from .kernels.fuse import GROUP
from .kernels.pick import DRAW, PICK, pick_rows
from .kernels.threads import Threads
from .records import AlphaChoice, Draw, Pick
from .rows import Float32Array, Float64Array, Int64Array, Rows, non_finite, row_addresses
from .search import AlphaSearch

_NO_TOKENS: Int64Array = np.empty(0, np.int64)
_NO_BIASES: Float64Array = np.empty(0)
_GREEDY = Draw(SamplingParams(temperature=0.0), seed=0, position=0, recent=np.empty(0, np.int32))


class Fuser:
    """Searches α, fuses rows of `n_vocab` logits and chooses tokens. Keeps its scratch memory. Not for concurrent use.

    Rows are read in place. They may be wider than `n_vocab`; the rest of a row is padding and is ignored.
    """

    def __init__(self, n_vocab: int, n_threads: int = 1) -> None:
        n_groups, n_slots = -(-n_vocab // GROUP), 2 * n_threads
        self.n_vocab = n_vocab
        self._fused: Float32Array = np.empty((n_slots, n_vocab), np.float32)
        self._maxima: Float32Array = np.empty((n_slots, n_groups), np.float32)
        self._masses: Float32Array = np.empty((n_slots, n_groups), np.float32)
        self._candidates: Int64Array = np.empty((n_threads, n_vocab), np.int64)
        self._threads = Threads(n_threads)
        self._search = AlphaSearch(n_vocab, self._threads)

    def pick(
        self,
        members: Sequence[Rows],
        names: Sequence[str],
        params: FusionParams,
        weights: Sequence[Sequence[float]],
        draws: Sequence[Draw],
    ) -> list[Pick]:
        """Fuse each of K rows and choose a token from it.

        With method="weighted" the fused row is Σ_m w_m logits_m, so that fused(v) ∝ exp Σ_m w_m log p_m(v). With the
        other methods a single member answers alone, and its row is taken as it is; several members are fused to
        large + Σ_t α_t (expert_t − base), and with method="dynamic" α is searched first. No row is normalised.

        members: rows of large, base, expert 1, …, expert T, or of one member; with "weighted", of any members
        names: of the members, for errors
        weights: α of each expert for each row, (K, T); with "weighted", the weight of each member, (K, M). Ignored
            where α is searched or one member answers alone
        draws: how to choose from each row, (K,)

        A token is impossible in the weighted fusion if a member with a positive weight gives it −inf. A member with
        a negative weight that gives it −inf is left out for this token: its log p counts as 0.

        A row from which nothing can be picked has `error` set: NonFiniteLogitsError where a member that takes part
        returned NaN, +inf or no finite logit, DecodeError where no token is possible for every member with a positive
        weight, InvalidParameterError where every token is banned.
        Raises ValueError where the shapes do not fit.
        """
        if not draws:
            return []
        addresses = row_addresses(members, len(draws), self.n_vocab)
        choices: list[AlphaChoice | None] = [None] * len(draws)
        errors: dict[int, EdgeDLFError] = {}
        is_weighted = params.method == "weighted"
        if len(members) == 1 and not is_weighted:
            weights = [()] * len(draws)
        elif params.method == "dynamic":
            choices, found = self._search.search(addresses, names, params)
            errors.update(found)
            n_experts = len(members) - 2
            weights = [choice.weights(n_experts) if choice else (0.0,) * n_experts for choice in choices]
        terms = _weighted_terms(tuple(names)) if is_weighted else _difference_terms(len(members))
        factors = np.array(weights if is_weighted else [(1.0, *row) for row in weights], np.float64)
        if factors.shape != (len(draws), len(terms)):
            n_weights = len(terms) if is_weighted else len(terms) - 1
            raise ValueError(f"weights must be K = {len(draws)} times {n_weights} numbers")
        picks, top_tokens, top_logprobs = self._choose(addresses, terms, factors, draws)
        results = []
        for k, (token, logprob, member, fault, n_top) in enumerate(picks.tolist()):
            error = errors.get(k) or _error(names, member, fault, token, draws[k])
            if error:
                results.append(Pick(-1, -math.inf, (), tuple(weights[k]), choices[k], error))
            else:
                top = tuple(zip(top_tokens[k, :n_top].tolist(), top_logprobs[k, :n_top].tolist(), strict=True))
                results.append(Pick(token, logprob, top, tuple(weights[k]), choices[k]))
        return results

    def _choose(
        self, addresses: Int64Array, terms: Int64Array, factors: Float64Array, draws: Sequence[Draw]
    ) -> tuple[npt.NDArray[Any], Int64Array, Float64Array]:
        """Run the kernel. Returns its picks (K,) and the likeliest tokens and their logprobs, (K, n_top)."""
        n_rows, n_top = len(draws), min(self.n_vocab, max(draw.n_top for draw in draws))
        picks = np.zeros(n_rows, PICK)
        top_tokens, top_logprobs = np.empty((n_rows, n_top), np.int64), np.empty((n_rows, n_top))
        self._threads.run(
            pick_rows, addresses, terms, factors, *self._draw_tables(draws), self._fused, self._maxima, self._masses,
            self._candidates, picks, top_tokens, top_logprobs, np.zeros(2 * n_rows, np.int64),
        )  # fmt: skip
        return picks, top_tokens, top_logprobs

    def _draw_tables(self, draws: Sequence[Draw]) -> tuple[npt.NDArray[Any], Int64Array, Int64Array, Float64Array]:
        """The draws as the kernel takes them: records (K,), and all rows' recent tokens, biased tokens and biases."""
        records = np.empty(len(draws), DRAW)
        recent, bias_tokens, biases = [], [], []
        n_recent = n_biases = 0
        for k, draw in enumerate(draws):
            x = draw.sampling
            tokens = draw.recent if x.penalises else _NO_TOKENS
            biased, values = _biases(draw, self.n_vocab)
            records[k] = (
                x.temperature, x.top_p, x.min_p, x.repeat_penalty, x.frequency_penalty, x.presence_penalty,
                draw.plausibility,
                min(x.top_k, self.n_vocab), min(draw.n_top, self.n_vocab),
                n_recent, len(tokens), n_biases, len(biased), -1 if draw.scored is None else draw.scored,
                draw.seed, draw.position,
            )  # fmt: skip
            n_recent, n_biases = n_recent + len(tokens), n_biases + len(biased)
            if len(tokens):
                recent.append(tokens.astype(np.int64))
            if len(biased):
                bias_tokens.append(biased)
                biases.append(values)
        return (
            records,
            np.concatenate(recent) if n_recent else _NO_TOKENS,
            np.concatenate(bias_tokens) if n_biases else _NO_TOKENS,
            np.concatenate(biases) if n_biases else _NO_BIASES,
        )


@lru_cache
def _weighted_terms(names: tuple[str, ...]) -> Int64Array:
    """Terms of the weighted row, (M, 3), as `kernels.fuse` reads them: each member."""
    return np.array([(m, -1, name not in ("large", "base")) for m, name in enumerate(names)], np.int64)


@lru_cache
def _difference_terms(n_members: int) -> Int64Array:
    """Terms of the fused row, (1 + T, 3), as `kernels.fuse` reads them: the first member, then each expert − base."""
    return np.array([(0, -1, 0), *((t, 1, 1) for t in range(2, n_members))], np.int64)


def _error(names: Sequence[str], member: int, fault: int, token: int, draw: Draw) -> EdgeDLFError | None:
    """The reason why nothing can be picked from a row, if there is one."""
    if fault and member < 0:
        return DecodeError("no token is possible for every member with a positive weight")
    if fault:
        return non_finite(names[member], fault)
    if token < 0:
        what = "logit_bias" if draw.banned is None else "what the answer must look like"
        return InvalidParameterError(f"{what} bans every token")
    return None


def _biases(draw: Draw, n_vocab: int) -> tuple[Int64Array, Float64Array]:
    """Tokens of logit_bias and banned tokens, ascending, and what is added to their logits."""
    bias = dict(draw.sampling.logit_bias or {})
    if draw.banned is None and not bias:
        return _NO_TOKENS, _NO_BIASES
    banned = _NO_TOKENS if draw.banned is None else draw.banned
    tokens = np.union1d(banned, np.array([token for token in bias if token < n_vocab], np.int64)) if bias else banned
    values = np.full(len(tokens), -np.inf)
    if bias:
        is_free = ~np.isin(tokens, banned)
        values[is_free] = [bias[token] for token in tokens[is_free].tolist()]
    return tokens, values


def search_alpha(
    large_logits: npt.ArrayLike,
    base_logits: npt.ArrayLike,
    expert_logits: npt.ArrayLike,
    params: FusionParams | None = None,
) -> AlphaChoice:
    """Find the pair (expert, α) that minimises J(α) = Σ_t [(KL(P̃‖P) − a_t)² + (KL(P‖P̃) − b_t)²], the paper's Eq. 6.

    large_logits, base_logits: (V,)
    expert_logits: (V,) or (T, V)

    Raises InvalidParameterError where the shapes do not fit, NonFiniteLogitsError where a row has NaN, +inf or no
    finite value.
    """
    members, names = _members(large_logits, base_logits, expert_logits)
    n_vocab = members[0].shape[1]
    search = AlphaSearch(n_vocab, Threads(1))
    choices, errors = search.search(row_addresses(members, 1, n_vocab), names, params or FusionParams())
    for error in errors.values():
        raise error
    assert choices[0] is not None
    return choices[0]


def fuse_logits(
    large_logits: npt.ArrayLike, base_logits: npt.ArrayLike, expert_logits: npt.ArrayLike, alpha: npt.ArrayLike
) -> Float32Array:
    """Compute large + Σ_t α_t (expert_t − base), unnormalised, (V,) float32.

    Where base or expert_t gives −inf, log Q_t − log Q counts as 0. Shapes and errors are those of `search_alpha`.

    alpha: (T,), or a number for a single expert
    """
    members, names = _members(large_logits, base_logits, expert_logits)
    n_experts = len(members) - 2
    alphas = np.atleast_1d(np.asarray(alpha, np.float64))
    if alphas.shape != (n_experts,) or not np.isfinite(alphas).all():
        raise InvalidParameterError(f"alpha must be {n_experts} finite numbers, one for each expert, not {alpha!r}")
    fuser = Fuser(members[0].shape[1])
    (pick,) = fuser.pick(members, names, FusionParams(method="static"), [alphas.tolist()], [_GREEDY])
    if pick.error:
        raise pick.error
    fused: Float32Array = fuser._fused[-1]
    return fused


def _members(large: npt.ArrayLike, base: npt.ArrayLike, expert: npt.ArrayLike) -> tuple[list[Float32Array], list[str]]:
    """Check the shapes. Returns each member's row as (1, V), and the members' names."""
    try:
        arrays = [np.require(x, np.float32, ["C", "W", "A"]) for x in (large, base, expert)]
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(f"logits must be arrays of numbers: {error}") from None
    if arrays[0].ndim != 1 or not arrays[0].size:
        raise InvalidParameterError(f"large_logits must have shape (V,), not {arrays[0].shape}")
    n_vocab = arrays[0].size
    if arrays[1].shape != (n_vocab,):
        raise InvalidParameterError(f"base_logits must have shape ({n_vocab},), not {arrays[1].shape}")
    experts = np.atleast_2d(arrays[2])
    if experts.ndim != 2 or experts.shape[1] != n_vocab or not len(experts):
        raise InvalidParameterError(
            f"expert_logits must have shape ({n_vocab},) or (T, {n_vocab}), not {arrays[2].shape}"
        )
    names = ["large", "base", *(f"expert {t}" for t in range(len(experts)))]
    return [arrays[0][None], arrays[1][None], *(row[None] for row in experts)], names


def warm_up() -> None:
    """Load every kernel that a step may use: 1 s from the disk cache, up to a minute where they must be compiled."""
    rows = np.array([[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, -np.inf]]], np.float32)
    Fuser(2).pick(list(rows), ("large", "base", "expert"), FusionParams(), [()], [_GREEDY])
