"""Weights of the weighted fusion that make known answers likeliest: rows with known tokens, their loss, the fit.

The weights w minimise Σ_rows −log softmax(Σ_m w_m l_m)[gold], a convex problem in as many numbers as there are members.
Whole rows of logits are too large to keep: `keep` reduces them to few tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError
from .dispatch import Float32Array, Float64Array, Int64Array, Rows, Threads, non_finite, row_addresses
from .kernels.fuse import GROUP
from .kernels.keep import keep_rows
from .kernels.loss import BLOCK, IMPOSSIBLE, loss_rows

_NEWTON_STEPS = 50
_TOLERANCE = 1e-9
"""Newton's method stops when a step promises to lower the loss by less than this, in nats per row."""


@dataclass(frozen=True, eq=False)
class AnswerRows:
    """Rows of M members at R positions whose next token is known.

    names: of the members
    addresses: of the members' rows of `n_tokens` float32 logits, (R, M)
    golds: index of the known token in each row, (R,)
    log_weights: address of each row's log importance weights, float32 (n_tokens,); 0 where each token counts once, (R,)
    arrays: the memory that these addresses point into
    """

    names: tuple[str, ...]
    n_tokens: int
    addresses: Int64Array
    golds: Int64Array
    log_weights: Int64Array
    arrays: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.golds)

    def take(
        self, rows: npt.NDArray[Any] | Sequence[int] | None = None, members: Sequence[int] | None = None
    ) -> AnswerRows:
        """The rows and members that are chosen by number; rows also by a mask (R,). Nothing is copied."""
        chosen = np.arange(len(self))[slice(None) if rows is None else rows]
        columns = list(range(len(self.names)) if members is None else members)
        return replace(
            self,
            names=tuple(self.names[m] for m in columns),
            addresses=self.addresses[chosen[:, None], columns],
            golds=self.golds[chosen],
            log_weights=self.log_weights[chosen],
        )


class Losses(NamedTuple):
    """Loss of each row in nats, (R,), with gradient (R, M) and Hessian (R, M, M) in the members' weights."""

    values: Float64Array
    gradients: Float64Array
    hessians: Float64Array


class WeightFit(NamedTuple):
    """Result of a fit.

    weights: of the members, (M,)
    standard_errors: of the weights, (M,), robust to rows of one group being alike
    loss: mean over the rows, in nats, without the prior's share
    n_steps: Newton steps taken
    """

    weights: Float64Array
    standard_errors: Float64Array
    loss: float
    n_steps: int


def whole(members: Sequence[Rows], names: Sequence[str], golds: npt.ArrayLike, n_vocab: int) -> AnswerRows:
    """Rows as the members returned them, read in place.

    members: rows (R, V or more) of each member, as for `Fuser.pick`
    golds: the known tokens, (R,)
    """
    tokens = np.asarray(golds, np.int64)
    if tokens.ndim != 1 or ((tokens < 0) | (tokens >= n_vocab)).any():
        raise ValueError(f"golds must be token ids (R,) below {n_vocab}")
    addresses = row_addresses(members, len(tokens), n_vocab)
    return AnswerRows(tuple(names), n_vocab, addresses, tokens, np.zeros(len(tokens), np.int64), tuple(members))


def keep(
    rows: AnswerRows, n_kept: int, seed: int, mixtures: npt.ArrayLike | None = None, n_threads: int = 1
) -> AnswerRows:
    """Copy of whole rows, each reduced to `n_kept` tokens: 4 · (M + 1) · n_kept bytes a row.

    A row keeps its gold token and the likeliest tokens of each member exactly. The rest of the vocabulary is sampled
    in proportion to the mean of the members' probabilities, and each sampled token carries an importance weight. So
    Σ exp(z) and the sums for its derivatives are unbiased estimates at any weights; the loss, which is the logarithm
    of such a sum, has a bias of half its relative variance.

    mixtures: weights (C, M) of fusions whose likeliest tokens are kept, and sampled from, in place of each member's
    seed: of the sample

    Raises NonFiniteLogitsError where a member returned NaN, +inf or no finite logit.
    """
    n_rows, n_members = rows.addresses.shape
    n_kept = min(n_kept, rows.n_tokens)
    weights = np.eye(n_members) if mixtures is None else np.asarray(mixtures, np.float64)
    n_likeliest = rows.n_tokens if n_kept == rows.n_tokens else (n_kept - 1) // (2 * len(weights))
    terms = np.array([(m, -1, 0) for m in range(n_members)], np.int64)
    n_groups = -(-rows.n_tokens // GROUP)
    kept: Float32Array = np.empty((n_rows, n_members + 1, n_kept), np.float32)
    faults = np.zeros((n_rows, 2), np.int64)
    Threads(n_threads).run(
        keep_rows, rows.addresses, terms, weights, rows.golds, np.random.default_rng(seed).random(n_rows), n_likeliest,
        np.empty((n_threads, rows.n_tokens), np.float32), np.empty((n_threads, rows.n_tokens), np.float32),
        np.empty((n_threads, n_groups), np.float32), np.empty((n_threads, n_groups), np.float32),
        np.empty((n_threads, rows.n_tokens), np.int64), kept, faults,
    )  # fmt: skip
    _raise_fault(rows, faults)
    starts = kept.ctypes.data + kept.strides[0] * np.arange(n_rows, dtype=np.int64)
    addresses = starts[:, None] + kept.strides[1] * np.arange(n_members)
    log_weights = starts + kept.strides[1] * n_members
    return AnswerRows(rows.names, n_kept, addresses, np.zeros(n_rows, np.int64), log_weights, (kept,))


def losses(rows: AnswerRows, weights: npt.ArrayLike, n_threads: int = 1) -> Losses:
    """Compute −log softmax(Σ_m w_m l_m)[gold] for each row, its gradient and its Hessian.

    weights: of the members, (M,)

    A token that any member gives −inf is left out. Raises NonFiniteLogitsError where a member returned NaN or +inf,
    DecodeError where a gold token has the logit −inf.
    """
    n_rows, n_members = rows.addresses.shape
    w = np.asarray(weights, np.float64)
    if w.shape != (n_members,) or not np.isfinite(w).all():
        raise ValueError(f"weights must be {n_members} finite numbers, one for each member")
    out = Losses(np.empty(n_rows), np.empty((n_rows, n_members)), np.empty((n_rows, n_members, n_members)))
    scratch = np.empty((n_threads, n_members + 3, BLOCK + 16), np.float32)
    faults = np.zeros((n_rows, 2), np.int64)
    Threads(n_threads).run(
        loss_rows, rows.addresses, rows.n_tokens, rows.golds, rows.log_weights, w, scratch, *out, faults
    )
    _raise_fault(rows, faults)
    return out


def fit_weights(
    rows: AnswerRows,
    prior: npt.ArrayLike | None = None,
    l2: float = 0.01,
    groups: npt.ArrayLike | None = None,
    n_threads: int = 1,
) -> WeightFit:
    """Find the weights that minimise Σ_rows loss + l2 / 2 · ‖w − prior‖² by damped Newton steps.

    Use `rows.take` for some of the rows, as those of one task, or some of the members.

    prior: weights (M,) to shrink towards; 0 by default
    l2: strength of the prior, above 0: a normal distribution of variance 1 / l2 around it
    groups: number of the group, as the example, that each row belongs to, (R,); by default each row is its own

    Errors as for `losses`; ValueError where there are no rows.
    """
    if not len(rows) or l2 <= 0.0:
        raise ValueError("a fit needs rows, and l2 above 0")
    n_members = len(rows.names)
    centre = np.zeros(n_members) if prior is None else np.asarray(prior, np.float64)

    def evaluate(w: Float64Array) -> tuple[Losses, float]:
        at = losses(rows, w, n_threads)
        return at, float(at.values.sum() + 0.5 * l2 * ((w - centre) ** 2).sum())

    w = centre.copy()
    here, value = evaluate(w)
    n_steps = 0
    while n_steps < _NEWTON_STEPS:
        gradient = here.gradients.sum(axis=0) + l2 * (w - centre)
        hessian = here.hessians.sum(axis=0) + l2 * np.eye(n_members)
        step = -np.linalg.solve(hessian, gradient)
        slope = float(gradient @ step)
        if -0.5 * slope < _TOLERANCE * len(rows):
            break
        size = 1.0
        following, lower = evaluate(w + step)
        while lower > value + 1e-4 * size * slope and size > 1e-6:
            size *= 0.5
            following, lower = evaluate(w + size * step)
        if lower >= value:  # float32 tells no two values apart that lie nearer
            break
        w, here, value = w + size * step, following, lower
        n_steps += 1
    return WeightFit(w, _standard_errors(here, l2, groups), float(here.values.mean()), n_steps)


def _standard_errors(at: Losses, l2: float, groups: npt.ArrayLike | None) -> Float64Array:
    """Standard errors (M,) by the sandwich H⁻¹ (Σ_g s_g s_gᵀ) H⁻¹ with the score s_g of each group of rows."""
    n_rows, n_members = at.gradients.shape
    _, group_of_row = np.unique(np.arange(n_rows) if groups is None else np.asarray(groups), return_inverse=True)
    scores = np.zeros((group_of_row.max() + 1, n_members))
    np.add.at(scores, group_of_row, at.gradients)
    inverse = np.linalg.inv(at.hessians.sum(axis=0) + l2 * np.eye(n_members))
    errors: Float64Array = np.sqrt(np.diag(inverse @ (scores.T @ scores) @ inverse))
    return errors


def _raise_fault(rows: AnswerRows, faults: Int64Array) -> None:
    for member, condition in faults[faults[:, 1] != 0].tolist():
        if condition == IMPOSSIBLE:
            raise DecodeError(f"{rows.names[member]} gives a token of an answer no probability at all")
        raise non_finite(rows.names[member], condition)
