"""The checked face of the kernels: the search for α, the fused row, and the choice of a token from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernels
from .errors import EdgeDLFError, InvalidParameterError, NonFiniteLogitsError
from .params import AlphaChoice, Draw, FusionParams, Picked, SamplingParams

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
Member = tuple[str, Floats]

_WHAT = {kernels.HAS_NAN: "NaN", kernels.HAS_INF: "+inf", kernels.NONE_FINITE: "no finite value"}
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_NEWTON_STEPS = 20


class Fuser:
    """Search, fusion and selection for rows of `n_vocab` logits, with all scratch held from step to step.

    Rows are read in place and may be wider than `n_vocab`; what lies beyond is ignored. Not for concurrent use.
    fused: the last fused row (V,), unnormalised, before penalties.
    """

    def __init__(self, n_vocab: int, n_threads: int = 1) -> None:
        n_groups = -(-n_vocab // kernels.GROUP)
        self.n_vocab = n_vocab
        self.fused: Floats = np.empty(n_vocab, np.float32)
        self._maxima: Floats = np.empty(n_groups, np.float32)
        self._masses: Floats = np.empty(n_groups, np.float32)
        self._ids: Ids = np.empty(n_vocab, np.int32)
        # 16 floats more than a block: rows a multiple of 4096 bytes apart would make stores and loads collide
        self._blocks: Floats = np.empty((n_threads, 3, kernels.BLOCK + 16), np.float32)
        self._team = kernels.Team(n_threads - 1)
        self._wide: Doubles | None = None
        self._scratch: tuple[npt.NDArray[Any], ...] = ()

    def search(
        self, large: Floats, base: Floats, experts: Sequence[Floats], params: FusionParams, names: Sequence[str]
    ) -> list[AlphaChoice | NonFiniteLogitsError]:
        """The α search for each of K rows; arrays (K, width ≥ V), C-contiguous; names: of large, base, each expert.

        Raises NonFiniteLogitsError where a row holds NaN, +inf or no finite value.
        """
        choices: list[AlphaChoice | NonFiniteLogitsError] = []
        if len(large) > 1:
            for k in range(len(large)):
                one = slice(k, k + 1)
                try:
                    choices += self.search(large[one], base[one], [expert[one] for expert in experts], params, names)
                except NonFiniteLogitsError as error:
                    choices.append(error)
            return choices
        alphas = _grid(params.n_grid, params.alpha_step)
        members = [*zip(names, (large, base, *experts), strict=True)]
        curves, targets = self._curves(members, alphas)
        for k in range(large.shape[0]):
            curve, target = curves[k], targets[k]
            expert, grid, doubt = kernels.choose(curve, target, alphas)
            if doubt == 1 and params.search == "grid":
                pair = np.empty((2, 3))
                self._careful(large[k], base[k], experts[expert][k], alphas[[0, grid]], pair, target[expert])
                curve[expert, [0, grid]] = pair
            elif doubt:
                for t in range(len(experts)):
                    self._careful(large[k], base[k], experts[t][k], alphas, curve[t], target[t])
                expert, grid, _ = kernels.choose(curve, target, alphas)
            choice = _choice(expert, float(alphas[grid]), curve[expert, grid], curve[expert, 0], target)
            if params.search == "exact" and target.max() > kernels.NOISE:
                row = [(name, logits[k : k + 1]) for name, logits in members]
                choice = self._refine(choice, row, curve, target, alphas, params.alpha_max)
            choices.append(choice)
        return choices

    def _curves(self, members: Sequence[Member], alphas: Doubles) -> tuple[Doubles, Doubles]:
        """Λ, Λ', Λ'' (K, T, G, 3) at the grid values, and the targets a, b (K, T, 2). Members: large, base, experts."""
        (_, large), (_, base), *experts = members
        n_rows, n_grid, n_chunks = len(large), len(alphas), -(-self.n_vocab // kernels.CHUNK)
        if not self._scratch or self._scratch[3].shape != (n_rows, n_chunks, n_grid + 3, 3):
            self._scratch = (
                np.empty((n_rows, 3, n_chunks, 2), np.int32),
                np.empty((n_rows, 10)),
                np.empty((n_rows, 3), np.int32),
                np.empty((n_rows, n_chunks, n_grid + 3, 3)),
            )
        curves, targets = np.empty((n_rows, len(experts), n_grid, 3)), np.empty((n_rows, len(experts), 2))
        for t, (_, expert) in enumerate(experts):
            sync = self._team.run(
                kernels.search_rows, large, base, expert, self.n_vocab, alphas,
                *self._scratch, curves, targets, t, self._blocks,
            )  # fmt: skip
            if sync[7]:
                _raise_if_bad(self._scratch[2], (members[0], members[1], members[2 + t]))
                for k in np.flatnonzero(np.isnan(targets[:, t, 0])):
                    self._careful(large[k], base[k], expert[k], alphas, curves[k, t], targets[k, t])
        return curves, targets

    def _careful(
        self, large: Floats, base: Floats, expert: Floats, alphas: Doubles, curve: Doubles, target: Doubles
    ) -> None:
        n = self.n_vocab
        if self._wide is None:
            self._wide = np.empty((3, n))
        kernels.careful_curve(large[:n], base[:n], expert[:n], alphas, curve, target, self._wide)

    def _refine(
        self,
        best: AlphaChoice,
        members: Sequence[Member],
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
                    row = [members[0], members[1], members[2 + t]]
                    best = self._descend(best, row, t, (low, grid[k].alpha, high), targets)
        return best

    def _descend(
        self, best: AlphaChoice, members: Sequence[Member], t: int, cell: tuple[float, float, float], targets: Doubles
    ) -> AlphaChoice:
        """Newton's method on J' within a cell, halving it where a step would leave it; the least J met, or `best`."""
        low, alpha, high = cell
        if low == alpha:  # J' vanishes at α = 0
            alpha = 0.5 * (low + high)
        for _ in range(_NEWTON_STEPS):
            curves, _targets = self._curves(members, np.array([0.0, alpha]))
            start, here = curves[0, 0]
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
        """Fuse each of K rows (K, width) by its own alphas, and choose a token from it; or why that is impossible."""
        picked: list[Picked | EdgeDLFError] = []
        for k, draw in enumerate(draws):
            try:
                self.fuse(large[k], None if base is None else base[k], [row[k] for row in experts], alphas[k], names)
                token, logprob = self.select(draw.sampling, draw.seed, draw.position, draw.recent)
                picked.append(Picked(token, logprob, self.top_logprobs(draw.n_top)))
            except EdgeDLFError as error:
                picked.append(error)
        return picked

    def fuse(
        self,
        large_row: Floats,
        base_row: Floats | None,
        expert_rows: Sequence[Floats],
        alphas: Sequence[float],
        names: Sequence[str],
    ) -> None:
        """Write `large + Σ α (expert − base)` into `fused`; rows (width ≥ V,). Where every α is 0: the large row.

        Raises NonFiniteLogitsError where a row that takes part holds NaN, +inf or no finite value.
        """
        parts = [(row, alpha) for row, alpha in zip(expert_rows, alphas, strict=True) if alpha]
        source, unusual = large_row, False
        for row, alpha in parts or [(large_row, 0.0)]:
            base = large_row if base_row is None else base_row
            sync = self._team.run(
                kernels.fuse_row, source, base, row, float(alpha), self.fused, self._maxima, self._masses
            )
            unusual = unusual or bool(sync[2])
            source = self.fused
        if unusual:
            self._fuse_unusual(large_row, base_row, expert_rows, alphas, names)

    def _fuse_unusual(
        self,
        large_row: Floats,
        base_row: Floats | None,
        expert_rows: Sequence[Floats],
        alphas: Sequence[float],
        names: Sequence[str],
    ) -> None:
        """As `fuse`, for rows with −inf or differences beyond float32: d = 0 where base or expert is −inf."""
        n = self.n_vocab
        large = _checked(large_row[:n], names[0])
        fused = large.astype(np.float64)
        if base_row is not None:
            base = _checked(base_row[:n], names[1]).astype(np.float64)
            for row, alpha, name in zip(expert_rows, alphas, names[2:], strict=True):
                expert = _checked(row[:n], name).astype(np.float64)
                both = np.isfinite(base) & np.isfinite(expert)
                shift = np.zeros(n)
                if both.any() and alpha:
                    shift[:] = np.logaddexp.reduce(expert[both]) - np.logaddexp.reduce(base[both])
                    shift[both] = expert[both] - base[both]
                fused += alpha * shift
        finite = np.isfinite(large)
        self.fused[:] = -np.inf
        self.fused[finite] = np.clip(fused[finite], -_LARGEST_FLOAT, _LARGEST_FLOAT)
        self._measure(np.arange(len(self._maxima)))

    def _measure(self, groups: npt.NDArray[np.int64]) -> None:
        kernels.measure_groups(self.fused, groups, self._maxima, self._masses)

    def select(self, sampling: SamplingParams, seed: int, position: int, recent: Ids) -> tuple[int, float]:
        """A token from `fused`, and its log-probability there before penalties and filters.

        recent: the tokens that penalties look back on. Raises InvalidParameterError if logit_bias bans every token.
        """
        log_sum = kernels.log_sum(self._maxima, self._masses)
        new = self._penalised(sampling, recent)
        if not new:
            token = self._pick(sampling, seed, position)
            return token, float(self.fused[token]) - log_sum
        tokens = np.fromiter(new.keys(), np.int64, len(new))
        before, groups = self.fused[tokens], np.unique(tokens // kernels.GROUP)
        self.fused[tokens] = np.fromiter(new.values(), np.float32, len(new))
        self._measure(groups)
        try:
            token = self._pick(sampling, seed, position)
        finally:
            self.fused[tokens] = before
            self._measure(groups)
        return token, float(self.fused[token]) - log_sum

    def _penalised(self, sampling: SamplingParams, recent: Ids) -> dict[int, float]:
        """The tokens whose logits penalties and logit_bias change, and their new logits, as llama.cpp reckons them."""
        frequency, presence, repeat = sampling.frequency_penalty, sampling.presence_penalty, sampling.repeat_penalty
        new: dict[int, float] = {}
        if len(recent) and (frequency or presence or repeat != 1.0):
            for token, count in zip(*(x.tolist() for x in np.unique(recent, return_counts=True)), strict=True):
                logit = float(self.fused[token])
                logit = logit * repeat if logit <= 0 else logit / repeat
                new[token] = logit - count * frequency - presence
        for token, bias in (sampling.logit_bias or {}).items():
            if token < self.n_vocab:
                new[token] = new.get(token, float(self.fused[token])) + bias
        return new

    def _pick(self, sampling: SamplingParams, seed: int, position: int) -> int:
        group = int(self._maxima.argmax())
        top = float(self._maxima[group])
        if top == -math.inf:
            raise InvalidParameterError("logit_bias bans every token")
        if sampling.temperature == 0.0:
            first = group * kernels.GROUP
            return first + int(self.fused[first : first + kernels.GROUP].argmax())
        ids = self._kept(sampling, top)
        logits = self.fused[ids].astype(np.float64) - top
        key = np.uint64(seed), np.uint64(position)
        return int(ids[kernels.draw(logits, ids, sampling.temperature, *key)])

    def _kept(self, sampling: SamplingParams, top: float) -> Ids:
        """Tokens that top-k, top-p and min-p leave. Each keeps a head of the list sorted by logit: shortest wins."""
        cut = top + math.log(sampling.min_p) if sampling.min_p else -_LARGEST_FLOAT
        filtered = bool(sampling.top_k or sampling.min_p)
        n = sampling.top_k or (max(64, len(self._maxima)) if sampling.top_p < 1.0 and not filtered else self.n_vocab)
        total = math.exp(kernels.log_sum(self._maxima, self._masses) - top)
        while True:
            ids = self._largest(n, -_LARGEST_FLOAT if sampling.top_k else cut)
            if sampling.top_p == 1.0:
                break
            weights = np.exp(self.fused[ids].astype(np.float64) - top)
            wanted = sampling.top_p * (float(weights.sum()) if sampling.top_k else total)
            if filtered or weights.sum() >= wanted or n >= self.n_vocab:
                order = np.argsort(-self.fused[ids], kind="stable")
                ids = ids[order[: int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1]]
                break
            n *= 4
        return ids[self.fused[ids] >= cut]

    def _largest(self, n: int, cut: float) -> Ids:
        """The n tokens with the largest logits of at least `cut`, ties to the lower id; in order of id."""
        pool = self._maxima if n <= len(self._maxima) else self.fused
        if n < self.n_vocab:
            cut = max(cut, float(np.partition(pool, len(pool) - n)[len(pool) - n]))
        ids = self._ids[: kernels.gather(self.fused, self._maxima, np.float32(cut), self._ids)]
        return ids if len(ids) <= n else np.sort(ids[np.argsort(-self.fused[ids], kind="stable")[:n]])

    def top_logprobs(self, n: int) -> tuple[tuple[int, float], ...]:
        """The n most likely tokens of `fused`, (id, logprob), best first."""
        if n <= 0:
            return ()
        log_sum = kernels.log_sum(self._maxima, self._masses)
        ids = self._largest(n, -_LARGEST_FLOAT)
        ids = ids[np.argsort(-self.fused[ids], kind="stable")]
        return tuple((int(i), float(self.fused[i]) - log_sum) for i in ids)


@lru_cache
def _grid(n_grid: int, alpha_step: float) -> Doubles:
    return np.round(np.arange(n_grid) * alpha_step, 12)


def _checked(row: Floats, name: str) -> Floats:
    if np.isnan(row).any():
        raise NonFiniteLogitsError(name, _WHAT[kernels.HAS_NAN])
    if (row == np.inf).any():
        raise NonFiniteLogitsError(name, _WHAT[kernels.HAS_INF])
    if not np.isfinite(row).any():
        raise NonFiniteLogitsError(name, _WHAT[kernels.NONE_FINITE])
    return row


def _raise_if_bad(codes: npt.NDArray[np.int32], members: Sequence[Member]) -> None:
    """codes: (K, 3), one for each row of each member."""
    for (name, _), code in zip(members, codes.max(axis=0).tolist(), strict=True):
        if code in _WHAT:
            raise NonFiniteLogitsError(name, _WHAT[code])


def _choice(expert: int, alpha: float, here: Doubles, start: Doubles, targets: Doubles) -> AlphaChoice:
    """J and its parts from Λ, Λ' at α (`here`) and at 0 (`start`), and the targets of every expert (T, 2)."""
    forward = max(0.0, alpha * float(here[1]) - float(here[0]))
    reverse = max(0.0, float(here[0]) - alpha * float(start[1]))
    pairs = targets.tolist()
    objective = sum((forward - a) ** 2 + (reverse - b) ** 2 for a, b in pairs)
    target_forward, target_reverse = sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
    return AlphaChoice(expert, alpha, objective, forward, reverse, target_forward, target_reverse)


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
    fuser = Fuser(large.shape[1])
    (choice,) = fuser.search(large, base, experts, params or FusionParams(), _names(experts))
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
    fuser.fuse(large[0], base[0], [expert[0] for expert in experts], alphas.tolist(), _names(experts))
    return fuser.fused


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
    """Load or compile every kernel that a step may use, in 1 s from the disk cache and some 30 s without it."""
    fuser, names = Fuser(2), ("large", "base", "expert")
    rows = np.array([[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, -np.inf]]], np.float32)
    fuser.search(rows[0], rows[1], [rows[2]], FusionParams(), names)
    fuser.fuse(rows[0, 0], rows[1, 0], [rows[2, 0]], [1.0], names)
    fuser.select(SamplingParams(seed=0), 0, 0, np.zeros(1, np.int32))
