"""From the members' rows of logits to tokens: the search for α, the fused row, and the choice of a token."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError, EdgeDLFError, InvalidParameterError, NonFiniteLogitsError
from ..params import FusionParams
from .dispatch import Float32Array, Float64Array, Int64Array, Rows, Threads, non_finite, row_addresses
from .kernels.float64 import cumulants_float64
from .kernels.fuse import GROUP
from .kernels.pick import DRAW, LARGEST_TOKEN, PICK, pick_rows
from .kernels.search import ALL, CHOICE, CHUNK, NOISE, NOTHING, OBJECTIVE, choose, describe, search_rows
from .kernels.sums import BLOCK
from .lacking import with_the_large_models
from .records import AlphaChoice, Draw, Pick

_NO_TOKENS: Int64Array = np.empty(0, np.int64)
_NO_BIASES: Float64Array = np.empty(0)

_NEWTON_STEPS = 20
_Choices = npt.NDArray[Any]


class Fuser:
    """Searches α, fuses rows of `n_vocab` logits and chooses tokens. Keeps its scratch memory. Not for concurrent use.

    Rows are read in place. They may be wider than `n_vocab`; the rest of a row is padding and is ignored.
    lacking: name of a member -> tokens that its vocabulary lacks, whose logits are −inf.
    """

    def __init__(self, n_vocab: int, n_threads: int = 1, lacking: Mapping[str, Int64Array] | None = None) -> None:
        n_groups, n_slots = -(-n_vocab // GROUP), 2 * n_threads
        self.n_vocab = n_vocab
        self._lacking = lacking or {}
        self._fused: Float32Array = np.empty((n_slots, n_vocab), np.float32)
        self._maxima: Float32Array = np.empty((n_slots, n_groups), np.float32)
        self._masses: Float32Array = np.empty((n_slots, n_groups), np.float32)
        self._candidates: Int64Array = np.empty((n_threads, n_vocab), np.int64)
        self._threads = Threads(n_threads)
        self._search = AlphaSearch(n_vocab, self._threads)
        self._members: tuple[Rows, ...] = ()
        self._addresses: Int64Array = np.empty((0, 0), np.int64)

    def pick(
        self,
        members: Sequence[Rows],
        names: Sequence[str],
        params: FusionParams,
        weights: Sequence[Sequence[float]],
        draws: Sequence[Draw],
    ) -> list[Pick]:
        """Fuse each of K rows and choose a token from it.

        With a weight for each member the fused row is Σ_m w_m logits_m, so that fused(v) ∝ exp Σ_m w_m log p_m(v).
        With an α for each expert it is large + Σ_t α_t (expert_t − base), and with method="dynamic" α is searched
        first. With neither a single member answers alone, and its row is taken as it is. No row is normalised.

        members: rows of M members: large, base, expert 1, …, expert T, or one; with weights, any members
        names: of the members, for errors
        weights: α of each expert for each row, (K, T), or the weight of each member, (K, M), or nothing, (K, 0).
            Ignored where α is searched
        draws: how to choose from each row, (K,)

        A token is impossible in the weighted fusion if a member with a positive weight gives it −inf. A member with
        a negative weight that gives it −inf is left out for this token: its log p counts as 0. For a token that a
        member lacks, the large model's probability counts as the member's.

        A row from which nothing can be picked has `error` set: NonFiniteLogitsError where a member that takes part
        returned NaN, +inf or no finite logit, DecodeError where no token is possible for every member with a positive
        weight, InvalidParameterError where every token is banned.
        Raises ValueError where the shapes do not fit.
        """
        if not draws:
            return []
        is_weighted = len(weights[0]) == len(members)
        if is_weighted:
            members = self.weighed(members, names)
        addresses = self._addresses_of(members, len(draws))
        choices: list[AlphaChoice | None] = [None] * len(draws)
        errors: dict[int, EdgeDLFError] = {}
        if params.method == "dynamic" and len(members) > 1:
            choices, found = self._search.search(addresses, names, params)
            errors.update(found)
            n_experts = len(members) - 2
            weights = [_alphas(choice, n_experts) for choice in choices]
        terms = _weighted_terms(tuple(names)) if is_weighted else _difference_terms(len(members))
        factors = np.array(weights if is_weighted else [(1.0, *row) for row in weights], np.float64)
        if factors.shape != (len(draws), len(terms)):
            n_weights = len(terms) if is_weighted else len(terms) - 1
            raise ValueError(f"weights must be K = {len(draws)} times {n_weights} numbers")
        picks, top_tokens, top_logprobs = self._choose(addresses, terms, factors, draws)
        results = []
        for k, (token, logprob, member, fault, n_top) in enumerate(picks.tolist()):
            is_picked = not fault and token >= 0 and k not in errors
            if not is_picked:
                error = errors.get(k) or _error(names, member, fault, draws[k])
                results.append(Pick(-1, -math.inf, (), tuple(weights[k]), choices[k], error))
            else:
                top = (
                    zip(top_tokens[k, :n_top].tolist(), top_logprobs[k, :n_top].tolist(), strict=True) if n_top else ()
                )
                results.append(Pick(token, logprob, tuple(top), tuple(weights[k]), choices[k]))
        return results

    def weighed(self, members: Sequence[Rows], names: Sequence[str]) -> Sequence[Rows]:
        """Return the rows as the weighted fusion takes them, which leaves it to the large model what a member lacks."""
        if not self._lacking:
            return members
        return with_the_large_models(members, names, self._lacking, self.n_vocab)

    def _addresses_of(self, members: Sequence[Rows], n_rows: int) -> Int64Array:
        """As `row_addresses`; those of the last call where the arrays are the same, as they are step after step."""
        is_known = len(members) == len(self._members) and all(map(operator.is_, members, self._members))
        if not is_known or len(self._addresses) != n_rows:
            self._addresses = row_addresses(members, n_rows, self.n_vocab)
            self._members = tuple(members) if all(isinstance(rows, np.ndarray) for rows in members) else ()
        return self._addresses

    def _choose(
        self, addresses: Int64Array, terms: Int64Array, factors: Float64Array, draws: Sequence[Draw]
    ) -> tuple[npt.NDArray[Any], Int64Array, Float64Array]:
        """Run the kernel. Returns its picks (K,) and the likeliest tokens and their logprobs, (K, n_top)."""
        n_rows, n_top = len(draws), min(self.n_vocab, max(draw.n_top for draw in draws))
        picks = np.zeros(n_rows, PICK)
        candidates, top_logprobs = np.empty((n_rows, n_top), np.int64), np.empty((n_rows, n_top))
        self._threads.run(
            pick_rows, addresses, terms, factors, *self._draw_tables(draws), self._fused, self._maxima, self._masses,
            self._candidates, picks, candidates, top_logprobs, np.zeros(2 * n_rows, np.int64),
        )  # fmt: skip
        for k, n in enumerate(picks["n_top"].tolist() if n_top else ()):
            order = np.argsort(candidates[k, :n])
            candidates[k, :n], top_logprobs[k, :n] = candidates[k, order], top_logprobs[k, order]
        return picks, candidates & LARGEST_TOKEN, top_logprobs

    def _draw_tables(self, draws: Sequence[Draw]) -> tuple[npt.NDArray[Any], Int64Array, Int64Array, Float64Array]:
        """The draws as the kernel takes them: records (K,), and all rows' recent tokens, biased tokens and biases."""
        records = np.empty(len(draws), DRAW)
        recent, bias_tokens, biases = [], [], []
        n_recent = n_biases = 0
        for k, draw in enumerate(draws):
            x = draw.sampling
            tokens = draw.recent[draw.recent < self.n_vocab] if len(draw.recent) else draw.recent
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
                recent.append(np.sort(tokens).astype(np.int64))
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


def _error(names: Sequence[str], member: int, fault: int, draw: Draw) -> EdgeDLFError:
    """The reason why nothing can be picked from a row."""
    if fault and member < 0:
        return DecodeError("no token is possible for every member with a positive weight")
    if fault:
        return non_finite(names[member], fault)
    what = "logit_bias" if draw.banned is None else "what the answer must look like"
    return InvalidParameterError(f"{what} bans every token")


def _biases(draw: Draw, n_vocab: int) -> tuple[Int64Array, Float64Array]:
    """Tokens of logit_bias and banned tokens, ascending, and what is added to their logits."""
    own, values = draw.sampling.biases
    if not len(own):
        return (own, values) if draw.banned is None else (draw.banned, np.full(len(draw.banned), -np.inf))
    n_known = int(np.searchsorted(own, n_vocab))
    own, values = own[:n_known], values[:n_known]
    if draw.banned is None:
        return own, values
    tokens = np.union1d(draw.banned, own)
    added = np.full(len(tokens), -np.inf)
    is_free = ~np.isin(own, draw.banned, assume_unique=True)
    added[np.searchsorted(tokens, own[is_free])] = values[is_free]
    return tokens, added


class AlphaSearch:
    """Finds the pair (expert, α) that minimises J for rows of `n_vocab` logits. Not for concurrent use."""

    def __init__(self, n_vocab: int, threads: Threads) -> None:
        self._n_vocab = n_vocab
        self._threads = threads
        # 16 floats more than a block: rows a multiple of 4096 bytes apart would make stores and loads collide
        self._blocks: Float32Array = np.empty((threads.n_threads, 3, BLOCK + 16), np.float32)

    def search(
        self, addresses: Int64Array, names: Sequence[str], params: FusionParams
    ) -> tuple[list[AlphaChoice | None], dict[int, NonFiniteLogitsError]]:
        """The choice for each of K rows, and the errors of the rows that have none, by their number.

        addresses: of the rows of large, base and each expert, (K, 2 + T)
        names: of these members
        """
        alphas = _grid(params.alpha_max, params.alpha_step)
        cumulants, targets, records = self._evaluate(addresses, alphas)
        choices: list[AlphaChoice | None] = []
        errors = {}
        for k, (expert, grid_index, recompute, member, fault, *values) in enumerate(records.tolist()):
            if fault:
                errors[k] = non_finite(names[member], fault)
                choices.append(None)
                continue
            choice = AlphaChoice(expert, *values)
            if recompute == OBJECTIVE and params.search == "grid":
                pair = np.empty((2, 3))
                self._evaluate_float64(addresses[k], expert, alphas[[0, grid_index]], pair, targets[k, expert])
                choice = _describe(expert, choice.alpha, pair[1], pair[0], targets[k])
            elif recompute:
                self._choose_float64(addresses[k], alphas, cumulants[k], targets[k], records[k : k + 1])
                choice = _choice(records[k : k + 1])
            if params.search == "exact" and targets[k].max() > NOISE:
                choice = self._refine(choice, addresses[k : k + 1], cumulants[k], targets[k], alphas, params.alpha_max)
            choices.append(choice)
        return choices, errors

    def _evaluate(self, addresses: Int64Array, alphas: Float64Array) -> tuple[Float64Array, Float64Array, _Choices]:
        """Λ, Λ', Λ'' (K, T, G, 3) at `alphas` (G,), the targets a, b (K, T, 2), and the choices on this grid (K,)."""
        n_rows, n_members = addresses.shape
        n_experts, n_grid, n_chunks = n_members - 2, len(alphas), -(-self._n_vocab // CHUNK)
        cumulants, targets = np.empty((n_rows, n_experts, n_grid, 3)), np.empty((n_rows, n_experts, 2))
        choices = np.empty(n_rows, CHOICE)
        keys, conditions = np.empty((n_rows, n_members, n_chunks, 2), np.int32), np.empty((n_rows, n_members), np.int32)
        constants, sums = np.empty((n_rows, n_experts, 10)), np.empty((n_rows, n_experts, n_chunks, n_grid + 3, 3))
        progress = np.zeros(2 * n_rows, np.int64)
        counters = self._threads.run(
            search_rows, addresses, self._n_vocab, alphas, keys, constants, conditions, sums,
            cumulants, targets, choices, self._blocks, progress,
        )  # fmt: skip
        if counters[3]:
            for k in np.flatnonzero(choices["recompute"] == ALL):
                self._choose_float64(addresses[k], alphas, cumulants[k], targets[k], choices[k : k + 1])
        return cumulants, targets, choices

    def _choose_float64(
        self,
        addresses: Int64Array,
        alphas: Float64Array,
        cumulants: Float64Array,
        targets: Float64Array,
        choice: _Choices,
    ) -> None:
        """Compute one row's cumulants, targets and choice (1,) anew in float64."""
        for t in range(len(cumulants)):
            self._evaluate_float64(addresses, t, alphas, cumulants[t], targets[t])
        choose(cumulants, targets, alphas, choice)
        choice["recompute"] = NOTHING

    def _evaluate_float64(
        self, addresses: Int64Array, t: int, alphas: Float64Array, cumulants: Float64Array, targets: Float64Array
    ) -> None:
        """Compute cumulants (G, 3) and targets (2,) of one row and expert `t` in float64."""
        cumulants_float64(addresses[[0, 1, 2 + t]], alphas, cumulants, targets, np.empty((3, self._n_vocab)))

    def _refine(
        self,
        best: AlphaChoice,
        addresses: Int64Array,
        cumulants: Float64Array,
        targets: Float64Array,
        alphas: Float64Array,
        alpha_max: float,
    ) -> AlphaChoice:
        """The lowest of `best`, the grid's, and the minima of J in the cells beside each local minimum of the grid."""
        for t in range(len(cumulants)):
            grid = [_describe(t, float(a), cumulants[t, k], cumulants[t, 0], targets) for k, a in enumerate(alphas)]
            j = [math.inf, *(choice.objective for choice in grid), math.inf]
            for k in range(len(grid)):
                if j[k] >= j[k + 1] <= j[k + 2]:
                    low = grid[max(k - 1, 0)].alpha
                    high = grid[k + 1].alpha if k + 1 < len(grid) else alpha_max
                    cell = (low, grid[k].alpha, high)
                    best = self._descend(best, addresses[:, [0, 1, 2 + t]], t, cell, targets)
        return best

    def _descend(
        self, best: AlphaChoice, addresses: Int64Array, t: int, cell: tuple[float, float, float], targets: Float64Array
    ) -> AlphaChoice:
        """Newton's method on J' in a cell (low, start, high), which is halved where a step would leave it.

        Returns the choice with the lowest J on the way, or `best`.
        """
        low, alpha, high = cell
        if low == alpha:  # J' vanishes at α = 0
            alpha = 0.5 * (low + high)
        for _ in range(_NEWTON_STEPS):
            start, here = self._evaluate(addresses, np.array([0.0, alpha]))[0][0, 0]
            choice = _describe(t, alpha, here, start, targets)
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


@lru_cache
def _grid(alpha_max: float, alpha_step: float) -> Float64Array:
    """The values 0, alpha_step, …, alpha_max of α."""
    n_grid = math.floor(alpha_max / alpha_step + 1e-9) + 1
    return np.round(np.arange(n_grid) * alpha_step, 12)


def _alphas(choice: AlphaChoice | None, n_experts: int) -> tuple[float, ...]:
    """α of each expert; zeros where the search failed."""
    return tuple(choice.alpha if choice and t == choice.expert else 0.0 for t in range(n_experts))


def _describe(expert: int, alpha: float, here: Float64Array, start: Float64Array, targets: Float64Array) -> AlphaChoice:
    """J and its parts from Λ, Λ' at α (`here`) and at 0 (`start`), and the targets of every expert (T, 2)."""
    choice = np.zeros(1, CHOICE)
    choice["expert"] = expert
    describe(alpha, here, start, targets, choice)
    return _choice(choice)


def _choice(record: _Choices) -> AlphaChoice:
    ((expert, _grid_index, _recompute, _member, _fault, *values),) = record.tolist()
    return AlphaChoice(expert, *values)


def _slope(choice: AlphaChoice, here: Float64Array, start: Float64Array) -> tuple[float, float]:
    """dJ/dα and d²J/dα², the latter without its term in the third cumulant, both divided by 2T."""
    x, y = choice.kl_forward - choice.target_forward, choice.kl_reverse - choice.target_reverse
    dx, dy = choice.alpha * float(here[2]), float(here[1]) - float(start[1])
    return x * dx + y * dy, dx * dx + dy * dy + (x + y) * float(here[2])
