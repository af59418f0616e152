"""The checked face of the kernels: the search for α, the fused row, and the choice of a token from it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EdgeDLFError, InvalidParameterError, NonFiniteLogitsError
from ..params import FusionParams, SamplingParams
from . import kernels
from .records import AlphaChoice, Draw, Picked

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int64]

_WHAT = {kernels.HAS_NAN: "NaN", kernels.HAS_INF: "+inf", kernels.NONE_FINITE: "no finite value"}
_NEWTON_STEPS = 20
_NOBODY: Ids = np.empty(0, np.int32)
_NO_TOKENS: Tokens = np.empty(0, np.int64)
_NO_BIASES: Doubles = np.empty(0)
_GREEDY = Draw(SamplingParams(temperature=0.0), seed=0, position=0, recent=_NOBODY)


class Fuser:
    """Search, fusion and selection for rows of `n_vocab` logits, with all scratch held from step to step.

    Rows are read in place and may be wider than `n_vocab`; what lies beyond is ignored. Not for concurrent use.
    """

    def __init__(self, n_vocab: int, n_threads: int = 1) -> None:
        n_groups, n_slots = -(-n_vocab // kernels.GROUP), 2 * n_threads
        self.n_vocab = n_vocab
        self._fused: Floats = np.empty((n_slots, n_vocab), np.float32)
        self._maxima: Floats = np.empty((n_slots, n_groups), np.float32)
        self._masses: Floats = np.empty((n_slots, n_groups), np.float32)
        self._candidates: npt.NDArray[np.int64] = np.empty((n_threads, n_vocab), np.int64)
        # 16 floats more than a block: rows a multiple of 4096 bytes apart would make stores and loads collide
        self._blocks: Floats = np.empty((n_threads, 3, kernels.BLOCK + 16), np.float32)
        self._team = kernels.Team(n_threads - 1)
        self._wide: Doubles | None = None
        self._members: tuple[Floats, ...] = ()
        self._at: Addresses = np.empty((0, 0), np.int64)
        self._ints: Ids = np.empty(0, np.int32)
        self._reals: Doubles = np.empty(0)
        self._rooms: tuple[npt.NDArray[Any], ...] = ()
        self._room_shape: tuple[int, ...] = ()

    def search(
        self, large: Floats, base: Floats, experts: Sequence[Floats], params: FusionParams, names: Sequence[str]
    ) -> list[AlphaChoice | NonFiniteLogitsError]:
        """The α search for each of K rows; arrays (K, width ≥ V), C-contiguous; names: of large, base, each expert.

        In place of a choice, NonFiniteLogitsError where a row holds NaN, +inf or no finite value.
        """
        if not len(large):
            return []
        alphas = _grid(params.n_grid, params.alpha_step)
        at = self._addresses((large, base, *experts))
        curves, targets, found = self._curves(at, alphas)
        results: list[AlphaChoice | NonFiniteLogitsError] = []
        for k, (expert, grid, doubt, member, fault, *rest) in enumerate(found.tolist()):
            if fault:
                results.append(NonFiniteLogitsError(names[member], _WHAT[fault]))
                continue
            choice = AlphaChoice(expert, *rest)
            if doubt == kernels.VALUE and params.search == "grid":
                pair = np.empty((2, 3))
                self._careful(at[k, [0, 1, 2 + expert]], alphas[[0, grid]], pair, targets[k, expert])
                choice = _choice(expert, choice.alpha, pair[1], pair[0], targets[k])
            elif doubt:
                self._choose_carefully(at[k], alphas, curves[k], targets[k], found[k : k + 1])
                choice = _found(found[k : k + 1])
            if params.search == "exact" and targets[k].max() > kernels.NOISE:
                choice = self._refine(choice, at[k : k + 1], curves[k], targets[k], alphas, params.alpha_max)
            results.append(choice)
        return results

    def _addresses(self, members: Sequence[Floats]) -> Addresses:
        """Of each row of each member, (K, members); those of the last call where the arrays are the same."""
        if len(members) == len(self._members) and all(map(operator.is_, members, self._members)):
            return self._at
        n_rows = len(members[0])
        for rows in members:
            fits = rows.shape[0] == n_rows and rows.shape[1] >= self.n_vocab
            if not (fits and rows.dtype == np.float32 and rows.flags.c_contiguous):
                raise ValueError(
                    f"rows must be (K, {self.n_vocab} or more), float32, C-contiguous, as many of each member"
                )
        places = [(kernels.address(rows), rows.strides[0]) for rows in members]
        self._at = np.array([[start + k * stride for start, stride in places] for k in range(n_rows)], np.int64)
        self._members = tuple(members)
        return self._at

    def _curves(self, at: Addresses, alphas: Doubles) -> tuple[Doubles, Doubles, npt.NDArray[Any]]:
        """Λ, Λ', Λ'' (K, T, G, 3) at the grid values, the targets a, b (K, T, 2), and `kernels.FOUND` (K,).

        at: (K, 2 + T).
        """
        n_rows, n_experts, n_grid = len(at), at.shape[1] - 2, len(alphas)
        curves, targets = np.empty((n_rows, n_experts, n_grid, 3)), np.empty((n_rows, n_experts, 2))
        found = np.empty(n_rows, kernels.FOUND)
        sync = self._team.run(
            kernels.search_rows, at, self.n_vocab, alphas, *self._room(n_rows, n_experts, n_grid),
            curves, targets, found, self._blocks, np.zeros(2 * n_rows, np.int64),
        )  # fmt: skip
        if sync[3]:
            for k in np.flatnonzero(found["doubt"] == kernels.ALL):
                self._choose_carefully(at[k], alphas, curves[k], targets[k], found[k : k + 1])
        return curves, targets, found

    def _room(self, *shape: int) -> tuple[npt.NDArray[Any], ...]:
        """Scratch of the search for (K, T, G): keys, heads, codes and sums. Its memory is kept as large as it was."""
        if shape != self._room_shape:
            n_rows, n_experts, n_grid = self._room_shape = shape
            n_chunks, n_pairs = -(-self.n_vocab // kernels.CHUNK), n_rows * n_experts
            n_keys, n_codes = n_rows * (2 + n_experts) * n_chunks * 2, n_rows * (2 + n_experts)
            n_heads, n_sums = n_pairs * 10, n_pairs * n_chunks * (n_grid + 3) * 3
            if len(self._ints) < n_keys + n_codes:
                self._ints = np.empty(n_keys + n_codes, np.int32)
            if len(self._reals) < n_heads + n_sums:
                self._reals = np.empty(n_heads + n_sums)
            self._rooms = (
                self._ints[:n_keys].reshape(n_rows, 2 + n_experts, n_chunks, 2),
                self._reals[:n_heads].reshape(n_rows, n_experts, 10),
                self._ints[n_keys : n_keys + n_codes].reshape(n_rows, 2 + n_experts),
                self._reals[n_heads : n_heads + n_sums].reshape(n_rows, n_experts, n_chunks, n_grid + 3, 3),
            )
        return self._rooms

    def _choose_carefully(
        self, at: Addresses, alphas: Doubles, curves: Doubles, targets: Doubles, found: npt.NDArray[Any]
    ) -> None:
        """As `kernels.search_rows` for one row, in float64."""
        for t in range(len(curves)):
            self._careful(at[[0, 1, 2 + t]], alphas, curves[t], targets[t])
        kernels.choose(curves, targets, alphas, found)
        found["doubt"] = kernels.SURE

    def _careful(self, at: Addresses, alphas: Doubles, curve: Doubles, target: Doubles) -> None:
        """`curve` (G, 3) and `target` (2,) of large, base and one expert, in float64."""
        if self._wide is None:
            self._wide = np.empty((3, self.n_vocab))
        kernels.careful_curve(at, alphas, curve, target, self._wide)

    def _refine(
        self,
        best: AlphaChoice,
        at: Addresses,
        curves: Doubles,
        targets: Doubles,
        alphas: Doubles,
        alpha_max: float,
    ) -> AlphaChoice:
        """The least of the grid's best and the minima of J inside the cells around each local minimum of the grid."""
        for t in range(len(curves)):
            grid = [_choice(t, float(a), curves[t, k], curves[t, 0], targets) for k, a in enumerate(alphas)]
            j = [math.inf, *(choice.objective for choice in grid), math.inf]
            for k in range(len(grid)):
                if j[k] >= j[k + 1] <= j[k + 2]:
                    low = grid[max(k - 1, 0)].alpha
                    high = grid[k + 1].alpha if k + 1 < len(grid) else alpha_max
                    best = self._descend(best, at[:, [0, 1, 2 + t]], t, (low, grid[k].alpha, high), targets)
        return best

    def _descend(
        self, best: AlphaChoice, at: Addresses, t: int, cell: tuple[float, float, float], targets: Doubles
    ) -> AlphaChoice:
        """Newton's method on J' within a cell, halving it where a step would leave it; the least J met, or `best`."""
        low, alpha, high = cell
        if low == alpha:  # J' vanishes at α = 0
            alpha = 0.5 * (low + high)
        for _ in range(_NEWTON_STEPS):
            start, here = self._curves(at, np.array([0.0, alpha]))[0][0, 0]
            choice = _choice(t, alpha, here, start, targets)
            best = choice if choice.objective < best.objective else best
            slope, curvature = _slope(choice, here, start)
            low, high = (low, alpha) if slope > 0 else (alpha, high)
            following = alpha - slope / curvature if curvature > 0 else math.inf
            if not low < following < high:
                following = 0.5 * (low + high)
            if abs(following - alpha) < 1e-5:
                break
            alpha = following
        return best

    def pick(
        self,
        large: Floats,
        base: Floats | None,
        experts: Sequence[Floats],
        alphas: Sequence[Sequence[float]],
        draws: Sequence[Draw],
        names: Sequence[str],
    ) -> list[Picked | EdgeDLFError]:
        """Fuse each of K rows, `large + Σ α (expert − base)`, and choose a token from it; arrays as for `search`.

        alphas (K, T). base: None if nothing is fused. In place of a token, NonFiniteLogitsError where a row that takes
        part holds NaN, +inf or no finite value, InvalidParameterError where every token is banned.
        """
        if not len(large):
            return []
        at = self._addresses((large,) if base is None else (large, base, *experts))
        n_rows, n_top = len(at), min(self.n_vocab, max(draw.n_top for draw in draws))
        weights = np.array(alphas, np.float64).reshape(n_rows, len(experts))
        picked = np.zeros(n_rows, kernels.PICKED)
        top_tokens, top_logprobs = np.empty((n_rows, n_top), np.int64), np.empty((n_rows, n_top))
        self._team.run(
            kernels.pick_rows, at, weights, *self._tables(draws), self._fused, self._maxima, self._masses,
            self._candidates, picked, top_tokens, top_logprobs, np.zeros(2 * n_rows, np.int64),
        )  # fmt: skip
        results: list[Picked | EdgeDLFError] = []
        for k, (token, logprob, member, fault, n_best) in enumerate(picked.tolist()):
            if fault:
                results.append(NonFiniteLogitsError(names[member], _WHAT[fault]))
            elif token < 0:
                what = "logit_bias" if draws[k].banned is None else "what the answer must look like"
                results.append(InvalidParameterError(f"{what} bans every token"))
            else:
                best = zip(top_tokens[k, :n_best].tolist(), top_logprobs[k, :n_best].tolist(), strict=True)
                results.append(Picked(token, logprob, tuple(best)))
        return results

    def _tables(self, draws: Sequence[Draw]) -> tuple[npt.NDArray[Any], Tokens, Tokens, Doubles]:
        """`draws` for the kernel: a record for each; recent tokens, tokens of logit_bias, biases of all."""
        records, recent, n_recent = np.empty(len(draws), kernels.DRAW), [], 0
        bias_tokens, biases, n_biases = [], [], 0
        for k, draw in enumerate(draws):
            x = draw.sampling
            tokens, (own, values) = draw.recent if x.penalises else _NOBODY, _biases(draw, self.n_vocab)
            records[k] = (
                x.temperature, x.top_p, x.min_p, x.repeat_penalty, x.frequency_penalty, x.presence_penalty,
                draw.plausibility,
                min(x.top_k, self.n_vocab), min(draw.n_top, self.n_vocab),
                n_recent, len(tokens), n_biases, len(own), -1 if draw.scored is None else draw.scored,
                draw.seed, draw.position,
            )  # fmt: skip
            recent.append(tokens)
            n_recent += len(tokens)
            bias_tokens.append(own)
            biases.append(values)
            n_biases += len(own)
        return (
            records,
            np.concatenate(recent, dtype=np.int64) if n_recent else _NO_TOKENS,
            np.concatenate(bias_tokens) if n_biases else _NO_TOKENS,
            np.concatenate(biases) if n_biases else _NO_BIASES,
        )


def _biases(draw: Draw, n_vocab: int) -> tuple[Tokens, Doubles]:
    """Tokens of logit_bias and banned ones, ascending, and what is added to their logits."""
    bias = dict(draw.sampling.logit_bias or {})
    if draw.banned is None and not bias:
        return _NO_TOKENS, _NO_BIASES
    banned = _NO_TOKENS if draw.banned is None else draw.banned
    tokens = np.union1d(banned, np.array([token for token in bias if token < n_vocab], np.int64)) if bias else banned
    values = np.full(len(tokens), -np.inf)
    if bias:
        free = ~np.isin(tokens, banned)
        values[free] = [bias[token] for token in tokens[free].tolist()]
    return tokens, values


@lru_cache
def _grid(n_grid: int, alpha_step: float) -> Doubles:
    return np.round(np.arange(n_grid) * alpha_step, 12)


def _choice(expert: int, alpha: float, here: Doubles, start: Doubles, targets: Doubles) -> AlphaChoice:
    """J and its parts from Λ, Λ' at α (`here`) and at 0 (`start`), and the targets of every expert (T, 2)."""
    found = np.zeros(1, kernels.FOUND)
    found["expert"] = expert
    kernels.describe(alpha, here, start, targets, found)
    return _found(found)


def _found(found: npt.NDArray[Any]) -> AlphaChoice:
    ((expert, _grid_index, _doubt, _member, _fault, *rest),) = found.tolist()
    return AlphaChoice(expert, *rest)


def _slope(choice: AlphaChoice, here: Doubles, start: Doubles) -> tuple[float, float]:
    """dJ/dα, and d²J/dα² but for the third cumulant, both divided by 2T."""
    x, y = choice.kl_forward - choice.target_forward, choice.kl_reverse - choice.target_reverse
    dx, dy = choice.alpha * float(here[2]), float(here[1]) - float(start[1])
    return x * dx + y * dy, dx * dx + dy * dy + (x + y) * float(here[2])


def search_alpha(
    large_logits: npt.ArrayLike,
    base_logits: npt.ArrayLike,
    expert_logits: npt.ArrayLike,
    params: FusionParams | None = None,
) -> AlphaChoice:
    """The pair (expert, α) that minimises J(α) = Σ_t [(KL(P̃‖P) − a_t)² + (KL(P‖P̃) − b_t)²], the paper's Eq. 6.

    large_logits, base_logits (V,), expert_logits (V,) or (T, V). Raises InvalidParameterError where the shapes do not
    fit, NonFiniteLogitsError where a row holds NaN, +inf or no finite value.
    """
    large, base, experts = _rows(large_logits, base_logits, expert_logits)
    (choice,) = Fuser(large.shape[1]).search(large, base, experts, params or FusionParams(), _names(experts))
    if isinstance(choice, NonFiniteLogitsError):
        raise choice
    return choice


def fuse_logits(
    large_logits: npt.ArrayLike, base_logits: npt.ArrayLike, expert_logits: npt.ArrayLike, alpha: npt.ArrayLike
) -> Floats:
    """large + Σ_t α_t (expert_t − base), unnormalised, (V,) float32; where base or expert is −inf, log Q_t − log Q = 0.

    Shapes and errors as for `search_alpha`; alpha (T,), or a number for a single expert.
    """
    large, base, experts = _rows(large_logits, base_logits, expert_logits)
    alphas = np.atleast_1d(np.asarray(alpha, np.float64))
    if alphas.shape != (len(experts),) or not np.isfinite(alphas).all():
        raise InvalidParameterError(f"alpha must be {len(experts)} finite numbers, one for each expert, not {alpha!r}")
    fuser = Fuser(large.shape[1])
    (picked,) = fuser.pick(large, base, experts, [alphas.tolist()], [_GREEDY], _names(experts))
    if isinstance(picked, EdgeDLFError):
        raise picked
    fused: Floats = fuser._fused[-1]
    return fused


def _names(experts: Sequence[Floats]) -> list[str]:
    return ["large", "base", *(f"expert {t}" for t in range(len(experts)))]


def _rows(large: npt.ArrayLike, base: npt.ArrayLike, expert: npt.ArrayLike) -> tuple[Floats, Floats, list[Floats]]:
    """Each member's row as (1, V), after the checks of shape."""
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
    return arrays[0][None], arrays[1][None], [row[None] for row in experts]


def warm_up() -> None:
    """Load or compile every kernel that a step may use, in 1 s from the disk cache and up to a minute without it."""
    fuser, names = Fuser(2), ("large", "base", "expert")
    rows = np.array([[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, -np.inf]]], np.float32)
    fuser.search(rows[0], rows[1], [rows[2]], FusionParams(), names)
    fuser.pick(rows[0], rows[1], [rows[2]], [[1.0]], [_GREEDY], names)
