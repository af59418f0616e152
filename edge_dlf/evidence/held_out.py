"""K-fold comparison of methods on known answers, with weights fitted on the other folds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.ensemble import Roles
from ..fusion import fit
from ..fusion.kernels.keep import PADDING
from ..params import FusionParams
from .answer_rows import AnswerLosses
from .stats import Estimate, Z

SAME = 0.001
"""Nats a token by which nobody can tell methods apart."""
_N_FOLDS = 5
_STRENGTHS = (0.03, 0.3, 3.0, 30.0, 300.0)
"""Values of `l2` that are tried."""
_MANY_ROWS = 20_000
"""Rows whose weights no prior changes."""
_ALL_SUBSETS = 4
"""Members of which every subset is tried; of more, those on the way of leaving out one after the other."""

Float64Array = npt.NDArray[np.float64]


class Prior(NamedTuple):
    """What weights are shrunk towards, and how strongly. name: in words."""

    name: str
    weights: tuple[float, ...]
    l2: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """How one method does on examples that its weights were not fitted on.

    settings: as they stand under `edge_dlf` in a request.
    members: those that it decodes.
    losses: −log p of each example's tokens together, in nats, (n,).
    n_tokens: of each example, (n,).
    n_right: of each example, the tokens that are the method's greedy choice after the ones before, (n,).
    n_bytes: weights that it reads for a token.
    prior, standard_errors, loss_in_sample: of fitted weights; the loss in nats a token.
    fold_weights: the weights that each fold was judged by.
    """

    name: str
    settings: dict[str, Any]
    members: tuple[str, ...]
    losses: Float64Array
    n_tokens: npt.NDArray[np.int64]
    n_right: npt.NDArray[np.int64]
    n_bytes: int
    prior: Prior | None = None
    standard_errors: dict[str, float] = field(default_factory=dict)
    loss_in_sample: float = math.nan
    fold_weights: tuple[dict[str, float], ...] = ()

    @property
    def loss(self) -> Estimate:
        """Nats a token, with its 95% interval over examples."""
        return per_token(self.losses, self.n_tokens)

    @property
    def share_right(self) -> float:
        """Part of all tokens that are the method's greedy choice."""
        return float(self.n_right.sum() / self.n_tokens.sum())

    def above(self, other: Outcome) -> Estimate:
        """The loss less that of `other` on the same examples, in nats a token."""
        return per_token(self.losses - other.losses, self.n_tokens)


def per_token(sums: Float64Array, n_tokens: npt.NDArray[np.int64]) -> Estimate:
    """Σ sums / Σ n_tokens with its 95% interval, where examples and not tokens are independent."""
    mean, n = float(sums.sum() / n_tokens.sum()), len(sums)
    if n < 2 or not math.isfinite(mean):
        return Estimate(mean, -math.inf, math.inf)
    spread = float(((sums - mean * n_tokens) ** 2).sum())
    half = Z * math.sqrt(spread * n / (n - 1)) / float(n_tokens.sum())
    return Estimate(mean, mean - half, mean + half)


class HeldOut:
    """Compares weighted fusions of the members on folds of examples.

    found: the pass over the examples.
    n_bytes: of each member.
    """

    def __init__(self, found: AnswerLosses, n_bytes: dict[str, int], n_threads: int) -> None:
        self._found = found
        self._n_bytes = n_bytes
        self._n_threads = n_threads
        self.names = found.rows.names
        self.n_tokens = np.diff(found.starts)
        n = len(self.n_tokens)
        self._n_folds = min(_N_FOLDS, n)
        self.fold_of_example = np.random.default_rng(0).permutation(n) % self._n_folds
        self._example_of_row = np.repeat(np.arange(n), self.n_tokens)
        self._fold_of_row = self.fold_of_example[self._example_of_row]
        self._alone = found.losses[:, : len(self.names)].mean(axis=0, dtype=np.float64)

    def fixed(self) -> Iterator[Outcome]:
        """Yield every member alone that can be, static, dynamic and blend."""
        starts = self._found.starts[:-1]
        for c, (name, settings, roles) in enumerate(self._found.methods):
            members = roles.members
            if self._is_useless(members):
                continue
            losses = np.add.reduceat(self._found.losses[:, c].astype(np.float64), starts)
            n_right = np.add.reduceat(self._found.right[:, c].astype(np.int64), starts)
            yield Outcome(name, settings, members, losses, self.n_tokens, n_right, self._bytes(members))
        if not self._found.correctors:
            yield self._blend()

    def _blend(self) -> Outcome:
        """The weighted fusion with weights that are the same for every task."""
        roles = Roles.of(FusionParams(method="blend"), self.names)
        members = [self.names.index(name) for name in roles.members]
        weights = np.array(roles.weights)
        rows = self._found.rows.take(members=members)
        losses = np.add.reduceat(fit.losses(rows, weights, self._n_threads).values, self._found.starts[:-1])
        n_right = self._greedy(members, [weights] * self._n_folds)
        return Outcome(
            "blend", {"method": "blend"}, rows.names, losses, self.n_tokens, n_right, self._bytes(rows.names)
        )

    def weighted(self) -> Iterator[Outcome]:
        """Yield the weighted fusion of each useful subset of members: a corrector only beside the large model."""
        usable = [m for m in range(len(self.names)) if math.isfinite(self._alone[m])]
        if len(usable) <= _ALL_SUBSETS:
            for size in range(2, len(usable) + 1):
                subsets = itertools.combinations(usable, size)
                yield from (self._outcome(each) for each in subsets if not self._is_useless(self._named(each)))
            return
        # Of the full set, the member goes first without which the held-out loss is lowest, and so on.
        tried: set[tuple[int, ...]] = set()
        subset = tuple(usable)
        outcome = self._outcome(subset)
        while True:
            tried.add(subset)
            yield outcome
            if len(subset) == 2:
                break
            smaller = [tuple(m for m in subset if m != gone) for gone in subset]
            smaller = [each for each in smaller if not self._is_useless(self._named(each))]
            outcome, subset = min(
                ((self._outcome(each, quick=True), each) for each in smaller), key=lambda pair: pair[0].losses.sum()
            )
            outcome = self._outcome(subset)
        experts = [m for m in usable if self.names[m] not in ("large", "base", *self._found.correctors)]
        best = min(experts, key=lambda m: float(self._alone[m]), default=None) if usable[:2] == [0, 1] else None
        if best is not None:
            yield from (self._outcome(each) for each in ((0, best), (0, 1, best)) if each not in tried)

    def _outcome(self, members: tuple[int, ...], quick: bool = False) -> Outcome:
        """Choose the strongest prior whose held-out loss is as low as any, and fit the weights on all examples.

        quick: one strength, and weights of the folds only.
        """
        rows = self._found.rows.take(members=members)
        strengths = (3.0,) if quick or len(rows) > _MANY_ROWS else _STRENGTHS
        priors = self._priors(members)[: 1 if len(strengths) == 1 else None]
        tried = [
            (*self._judge(rows, weights, l2), Prior(name, weights, l2)) for name, weights in priors for l2 in strengths
        ]
        lowest = min(float(values.sum()) for values, _, _ in tried)
        as_good = [one for one in tried if float(one[0].sum()) <= lowest + SAME * len(rows)]
        losses, fold_weights, prior = min(as_good, key=lambda one: (-one[2].l2, float(one[0].sum())))
        names = rows.names
        final = None
        n_right = np.zeros(len(self.n_tokens), np.int64)
        if not quick:
            final = fit.fit_weights(rows, prior.weights, prior.l2, self._example_of_row, self._n_threads)
            n_right = self._greedy(members, fold_weights)
        weights = {} if final is None else dict(zip(names, final.weights.round(3).tolist(), strict=True))
        return Outcome(
            name="weighted",
            settings={"method": "weighted", "weights": weights},
            members=names,
            losses=np.add.reduceat(losses, self._found.starts[:-1]),
            n_tokens=self.n_tokens,
            n_right=n_right,
            n_bytes=self._bytes(names),
            prior=prior,
            standard_errors={} if final is None else dict(zip(names, final.standard_errors.tolist(), strict=True)),
            loss_in_sample=math.nan if final is None else final.loss,
            fold_weights=tuple(dict(zip(names, each.round(3).tolist(), strict=True)) for each in fold_weights),
        )

    def _priors(self, members: Sequence[int]) -> list[tuple[str, tuple[float, ...]]]:
        """Half of the large model and half of the best expert, where both are there, and the best member alone; with
        correctors, the sum that they were trained for, and the large model alone."""
        correctors = [m for m in members if self.names[m] in self._found.correctors]
        experts = [m for m in members if self.names[m] not in ("large", "base") and m not in correctors]
        best = 0 if correctors else min(members, key=lambda m: float(self._alone[m]))
        priors = [(f"{self.names[best]} alone", tuple(float(m == best) for m in members))]
        if correctors:
            share = {0: 1.0, **dict.fromkeys(correctors, 1 / len(correctors))}
            name = " + ".join(self._named((0, *correctors)))
            priors.insert(0, (name, tuple(share.get(m, 0.0) for m in members)))
        elif experts and self.names[members[0]] == "large":
            expert = min(experts, key=lambda m: float(self._alone[m]))
            half = tuple(0.5 if m in (members[0], expert) else 0.0 for m in members)
            priors.insert(0, (f"half large, half {self.names[expert]}", half))
        return priors

    def _judge(
        self, rows: fit.AnswerRows, prior: tuple[float, ...], l2: float
    ) -> tuple[Float64Array, list[Float64Array]]:
        """Loss of each row by weights fitted on the other folds, (R,), and these weights."""
        values, weights = np.empty(len(rows)), []
        for fold in range(self._n_folds):
            is_out = self._fold_of_row == fold
            weights.append(fit.fit_weights(rows.take(~is_out), prior, l2, n_threads=self._n_threads).weights)
            values[is_out] = fit.losses(rows.take(is_out), weights[-1], self._n_threads).values
        return values, weights

    def _greedy(self, members: Sequence[int], fold_weights: Sequence[Float64Array]) -> npt.NDArray[np.int64]:
        """Count the tokens of each example that have the highest weighted logit among the tokens kept of their row."""
        counts = []
        for kept, fold in zip(self._found.kept, self.fold_of_example, strict=True):
            z = np.einsum("m,rmn->rn", fold_weights[fold].astype(np.float32), kept[:, list(members)])
            z[(kept[:, -1] <= PADDING) | ~np.isfinite(z)] = -np.inf
            counts.append(int((z[:, 0] >= z.max(axis=1)).sum()))
        return np.array(counts)

    def _named(self, members: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.names[m] for m in members)

    def _is_useless(self, members: Sequence[str]) -> bool:
        """Whether a corrector would be there without the large model."""
        return "large" not in members and not self._found.correctors.isdisjoint(members)

    def _bytes(self, members: Sequence[str]) -> int:
        return sum(self._n_bytes[name] for name in members)
