"""Loss of the weighted fusion at known tokens, with its gradient and Hessian, in one pass over each row.

With d_m = l_m − l_m(gold) for the logits l_m of M members, z = Σ_m w_m d_m + log of the token's importance weight, and
expectations under softmax(z):

    loss = log Σ exp(z) = −log softmax(Σ_m w_m l_m)[gold]
    gradient_m = E[d_m] = E[l_m] − l_m(gold)
    Hessian_mn = E[d_m d_n] − E[d_m] E[d_n] = Cov(l_m, l_n)

Sums are taken about a mean of d, which moves when a block outweighs those before it, so that the Hessian does not
cancel. Terms are float32, summed in float32 within a block and in float64 across blocks. A token that any member gives
−inf is left out of the sums: then the problem is the same for all weights, and convex.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import (
    F32,
    F64,
    HAS_INF,
    HAS_NAN,
    NONE_FINITE,
    OK,
    exp,
    extremes,
    fetch_add,
    jit,
    jit_sum,
    kernel,
    load,
    order_key,
    row_at,
    row_condition,
    use_wide_vectors,
)

BLOCK = 1024
"""Tokens handled at a time, so that the scratch fits the first-level cache."""
IMPOSSIBLE = NONE_FINITE + 1
"""Condition of a row whose gold token has the logit −inf."""


@jit
def _add_member(row: Any, gold: Any, weight: Any, d: Any, z: Any) -> None:
    """Set d = row − gold and add weight · d to z."""
    use_wide_vectors()
    for i in range(z.size):
        x = row[i] - gold
        d[i] = x
        z[i] += weight * x


@jit
def _add_two_members(
    row: Any, other_row: Any, gold: Any, other_gold: Any, weight: Any, other_weight: Any, d: Any, other_d: Any, z: Any
) -> None:
    """`_add_member` for two members in one pass."""
    use_wide_vectors()
    for i in range(z.size):
        x = row[i] - gold
        y = other_row[i] - other_gold
        d[i] = x
        other_d[i] = y
        z[i] += weight * x + other_weight * y


@jit
def _leave_out_masked(d: Any, z: Any, fault: Any) -> None:
    """Leave tokens out that a member gives −inf; set fault (2,) to the member and condition where it gives NaN or +inf.

    d: (M, N), z: (N,)
    """
    for i in range(z.size):
        is_masked = False
        for m in range(d.shape[0]):
            if math.isnan(d[m, i]) or d[m, i] == math.inf:
                fault[0], fault[1] = m, HAS_NAN if math.isnan(d[m, i]) else HAS_INF
            is_masked |= d[m, i] == -math.inf
        if is_masked:
            z[i] = -math.inf
            d[:, i] = 0.0


@jit_sum
def _exponentials(z: Any, top: Any, e: Any) -> Any:
    """Set e = exp(z − top). Returns Σ e."""
    s = F32(0)
    for i in range(z.size):
        x = exp(z[i] - top)
        e[i] = x
        s += x
    return s


@jit_sum
def _centre(d: Any, reference: Any, e: Any, t: Any) -> Any:
    """Subtract the reference from d and set t = e d. Returns Σ t and Σ t d."""
    use_wide_vectors()
    s = F32(0)
    v = F32(0)
    for i in range(d.size):
        x = d[i] - reference
        d[i] = x
        y = e[i] * x
        t[i] = y
        s += y
        v += y * x
    return s, v


@jit_sum
def _dot(t: Any, d: Any) -> Any:
    use_wide_vectors()
    s = F32(0)
    for i in range(d.size):
        s += t[i] * d[i]
    return s


@jit_sum
def _two_dots(t: Any, d: Any, other_d: Any) -> Any:
    use_wide_vectors()
    s = F32(0)
    u = F32(0)
    for i in range(d.size):
        s += t[i] * d[i]
        u += t[i] * other_d[i]
    return s, u


@jit
def _move_reference(total: float, first: Any, second: Any, reference: Any, means: Any) -> None:
    """Take Σ e d, (M,), and Σ e d_m d_n, (M, M), about the new reference `means`, given Σ e."""
    for m in range(first.size):
        for n in range(first.size):
            shift_m, shift_n = reference[m] - means[m], reference[n] - means[n]
            second[m, n] += first[m] * shift_n + shift_m * first[n] + total * shift_m * shift_n
    for m in range(first.size):
        first[m] += total * (reference[m] - means[m])
        reference[m] = means[m]


@jit
def _add_block(
    top: float, total: float, first: Any, second: Any, reference: Any, scratch: Any, size: int, highest: float
) -> Any:
    """Add one block's sums. Returns the largest z so far and Σ exp(z − it).

    first, second, reference: Σ e d and Σ e d_m d_n about the reference, and this reference
    highest: the largest z of this block
    scratch: (M + 3, BLOCK or more): d of each member, z, and two more rows
    """
    n_members = first.size
    z, e, t = scratch[n_members, :size], scratch[n_members + 1, :size], scratch[n_members + 2, :size]
    if highest > top:
        scale = math.exp(top - highest)
        total *= scale
        first *= scale
        second *= scale
        top = highest
    block_total = _exponentials(z, F32(top), e)
    if block_total > total:
        means = np.empty(n_members)
        for m in range(n_members):
            known = first[m] + total * reference[m]
            means[m] = (known + _dot(e, scratch[m, :size])) / (total + block_total)
        _move_reference(total, first, second, reference, means)
    total += block_total
    for m in range(n_members):
        s, v = _centre(scratch[m, :size], F32(reference[m]), e, t)
        first[m] += s
        second[m, m] += v
        for n in range(0, m - 1, 2):
            s, v = _two_dots(t, scratch[n, :size], scratch[n + 1, :size])
            second[m, n] += s
            second[m, n + 1] += v
        if m % 2 == 1:
            second[m, m - 1] += _dot(t, scratch[m - 1, :size])
    return top, total


@jit
def _loss(
    addresses: Any, n_tokens: int, gold: int, log_weights: int, weights: Any, scratch: Any,
    gradient: Any, hessian: Any, fault: Any,
) -> Any:  # fmt: skip
    """Set gradient (M,) and Hessian (M, M) of one row, or fault (2,). Returns the loss in nats."""
    n_members = weights.size
    reference, golds = np.zeros(n_members), np.empty(n_members, np.float32)
    keys = np.empty(2, np.int32)
    for m in range(n_members):
        golds[m] = row_at(addresses[m], n_tokens)[gold]
        if not math.isfinite(golds[m]):
            fault[0] = m
            fault[1] = IMPOSSIBLE if golds[m] < 0 else HAS_NAN if math.isnan(golds[m]) else HAS_INF
            return 0.0
    gradient[:] = 0.0
    hessian[:] = 0.0
    top, total = 0.0, 0.0  # z of the gold token is 0
    for start in range(0, n_tokens, BLOCK):
        size = min(BLOCK, n_tokens - start)
        z = scratch[n_members, :size]
        if log_weights:
            z[:] = row_at(log_weights + 4 * start, size)
        else:
            z[:] = 0.0
        for m in range(0, n_members - 1, 2):
            _add_two_members(
                row_at(addresses[m] + 4 * start, size), row_at(addresses[m + 1] + 4 * start, size), golds[m],
                golds[m + 1], F32(weights[m]), F32(weights[m + 1]), scratch[m, :size], scratch[m + 1, :size], z,
            )  # fmt: skip
        if n_members % 2 == 1:
            m = n_members - 1
            _add_member(row_at(addresses[m] + 4 * start, size), golds[m], F32(weights[m]), scratch[m, :size], z)
        extremes(z.view(np.int32), keys)
        if row_condition(keys[0], keys[1]) != OK:
            _leave_out_masked(scratch[:n_members, :size], z, fault)
            if fault[1] != OK:
                return 0.0
            extremes(z.view(np.int32), keys)
        keys[0] = order_key(keys[0])
        highest = F64(keys.view(np.float32)[0])
        top, total = _add_block(top, total, gradient, hessian, reference, scratch, size, highest)
    for m in range(n_members):
        gradient[m] /= total
    for m in range(n_members):
        for n in range(m + 1):
            hessian[m, n] = hessian[m, n] / total - gradient[m] * gradient[n]
            hessian[n, m] = hessian[m, n]
    for m in range(n_members):
        gradient[m] += reference[m]
    return top + math.log(total)


@kernel
def loss_rows(
    addresses: Any, n_tokens: int, golds: Any, log_weights: Any, weights: Any, scratch: Any,
    losses: Any, gradients: Any, hessians: Any, faults: Any, counters: Any,
) -> None:  # fmt: skip
    """Set losses (K,), gradients (K, M) and Hessians (K, M, M) of K rows; threads take the next free row.

    addresses: of the members' rows of `n_tokens` float32 logits, (K, M)
    golds: index of the known token in each row, (K,)
    log_weights: address of each row's log importance weights, (K,); 0 where every token counts once
    weights: of the members, (M,)
    scratch: float32 (threads, M + 3, BLOCK or more)
    faults: zeros (K, 2): the member and the condition that make a row unusable
    counters: zeros: threads that have begun, rows taken, rows done
    """
    own = scratch[fetch_add(counters, 0, 1)]
    while True:
        k = fetch_add(counters, 1, 1)
        if k >= golds.size:
            break
        losses[k] = _loss(
            addresses[k], n_tokens, golds[k], log_weights[k], weights, own, gradients[k], hessians[k], faults[k]
        )
        fetch_add(counters, 2, 1)
    while load(counters, 2) < golds.size:
        pass
