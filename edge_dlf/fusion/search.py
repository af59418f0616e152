"""The search for α on rows by address: float32 kernels on a grid, float64 where that is needed, Newton's method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NonFiniteLogitsError
from ..params import FusionParams
from .kernels.float64 import cumulants_float64
from .kernels.search import ALL, CHOICE, CHUNK, NOISE, NOTHING, OBJECTIVE, choose, describe, search_rows
from .kernels.sums import BLOCK
from .kernels.threads import Threads
from .records import AlphaChoice
from .rows import Float32Array, Float64Array, Int64Array, non_finite

_NEWTON_STEPS = 20
_Choices = npt.NDArray[Any]


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
        alphas = _grid(params.n_grid, params.alpha_step)
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
def _grid(n_grid: int, alpha_step: float) -> Float64Array:
    return np.round(np.arange(n_grid) * alpha_step, 12)


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
