"""Sums over a chunk of the vocabulary for one expert, at every α of the grid in one pass.

For one expert P̃(α) ∝ P·exp(α d) is an exponential family in α, so one pass over the vocabulary gives every grid value.
With l = log P + const and δ = d + const, both constants chosen so that the large model's first most likely token (the
mode) has l = δ = 0, and w_α = exp(l + α δ), S0 = Σ w_α, S1 = Σ w_α δ:

    Λ(α) = log(S0(α) / S0(0))      KL(P̃‖P) = α S1(α)/S0(α) − Λ(α)      KL(P‖P̃) = Λ(α) − α S1(0)/S0(0)

The constants cancel in both. The mode's weight is exactly 1 at every α, so that no sum underflows and float32 terms
suffice; it is added in float64. Terms are summed in float32 within a block and in float64 across blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .vector import F32, F64, exp, expm1, jit, jit_sum, use_wide_vectors

BLOCK = 1024
"""Tokens handled at a time, so that three float32 arrays of scratch fit the first-level cache."""
CHAIN = 30
"""Grid points reached by multiplication before the weights are computed anew from exponentials."""
LOWEST, HIGHEST = np.float32(-80.0), np.float32(80.0)
"""Between these exponents a float32 weight neither underflows nor overflows."""


@jit
def _deltas(base: Any, expert: Any, shifts: Any, delta: Any) -> None:
    """δ = (expert − expert shift) − (base − base shift) − offset, into delta (N,). shifts: these three numbers."""
    use_wide_vectors()
    base_shift, expert_shift, offset = F32(shifts[0]), F32(shifts[1]), F32(shifts[2])
    for i in range(base.size):
        delta[i] = ((expert[i] - expert_shift) - (base[i] - base_shift)) - offset


@jit
def set_shifts(base: Any, expert: Any, shifts: Any) -> None:
    """Choose the shifts (3,) so that `_deltas` gives 0 at these two logits and rounds least near them."""
    difference = F64(expert) - F64(base)
    if abs(difference) < 16.0:
        shifts[0], shifts[1], shifts[2] = 0.0, 0.0, F32(difference)
    else:  # expert − base would round, for the members' scales differ
        shifts[0], shifts[1], shifts[2] = base, expert, 0.0


@jit
def _weights(large: Any, constants: Any, alpha: Any, delta: Any, w: Any) -> None:
    """Weights w = exp(large − its maximum + α δ), (N,)."""
    top, factor = F32(constants[0]), F32(alpha)
    for i in range(large.size):
        w[i] = exp((large[i] - top) + factor * delta[i])


@jit
def _first_weights(large: Any, constants: Any, alpha_max: Any, delta: Any, w: Any) -> Any:
    """Weights at α = 0. Returns how many exponents lie below LOWEST, and how many above HIGHEST or NaN, up to α_max."""
    top, factor = F32(constants[0]), F32(alpha_max)
    low = np.int32(0)
    high = np.int32(0)
    for i in range(large.size):
        start = large[i] - top
        end = start + factor * delta[i]
        low += np.int32((start < LOWEST) | (end < LOWEST))
        high += np.int32(not (end < HIGHEST))
        w[i] = exp(start)
    return low, high


@jit
def _steps(step: Any, delta: Any, u: Any) -> None:
    """Relative growth u = exp(step · δ) − 1 of the weights from one grid point to the next."""
    factor = F32(step)
    for i in range(u.size):
        u[i] = expm1(factor * delta[i])


@jit_sum
def _sum_softmax(row: Any, top: Any, delta: Any, out: Any, k: int) -> None:
    """Add Σ exp(row − top) and Σ exp(row − top) δ to out[k]."""
    shift = F32(top)
    s = F32(0)
    t = F32(0)
    for i in range(row.size):
        w = exp(row[i] - shift)
        s += w
        t += w * delta[i]
    out[k, 0] += s
    out[k, 1] += t


@jit_sum
def _sum_weights(w: Any, delta: Any, out: Any, k: int) -> None:
    """Add Σ w, Σ w δ and Σ w δ² to out[k]."""
    use_wide_vectors()
    s = F32(0)
    t = F32(0)
    v = F32(0)
    for i in range(w.size):
        s += w[i]
        t += w[i] * delta[i]
        v += w[i] * delta[i] * delta[i]
    out[k, 0] += s
    out[k, 1] += t
    out[k, 2] += v


@jit_sum
def _sum_five(w: Any, u: Any, delta: Any, out: Any, k: int) -> None:
    """Advance the weights by five grid points, w += w u each time. Add the Σ w and Σ w δ to out[k], out[k + 1], …"""
    use_wide_vectors()
    s0 = s1 = s2 = s3 = s4 = F32(0)
    t0 = t1 = t2 = t3 = t4 = F32(0)
    for i in range(w.size):
        x = w[i]
        step = u[i]
        d = delta[i]
        x += x * step
        s0 += x
        t0 += x * d
        x += x * step
        s1 += x
        t1 += x * d
        x += x * step
        s2 += x
        t2 += x * d
        x += x * step
        s3 += x
        t3 += x * d
        x += x * step
        s4 += x
        t4 += x * d
        w[i] = x
    for j, (s, t) in enumerate(((s0, t0), (s1, t1), (s2, t2), (s3, t3), (s4, t4))):
        out[k + j, 0] += s
        out[k + j, 1] += t


@jit
def sum_chunk(
    large: Any, base: Any, expert: Any, start: int, constants: Any, alphas: Any, scratch: Any, out: Any
) -> None:
    """Sums of one chunk into out (G + 3, 3), float64.

    Row k holds Σ w, Σ w δ and, where it was computed, Σ w δ² at alphas[k]. Rows G and G + 1 hold Σ q and Σ q δ of base
    and expert. Row G + 2 counts tokens beyond float32's range; the sums are void unless it is 0.

    large, base, expert: the chunk's logits, float32
    start: the chunk's first token
    constants: of this row and expert, (10,), from `search._set_constants`
    scratch: float32 (3, BLOCK)
    """
    n_grid = alphas.size
    out[:] = 0.0
    w, u, delta = scratch[0, :BLOCK], scratch[1, :BLOCK], scratch[2, :BLOCK]
    for first in range(0, large.size, BLOCK):
        stop = min(first + BLOCK, large.size)
        size = stop - first
        if size < BLOCK:
            w, u, delta = w[:size], u[:size], delta[:size]
        x, b, e = large[first:stop], base[first:stop], expert[first:stop]
        mode = int(constants[3]) - start - first
        _deltas(b, e, constants[7:], delta)
        _sum_softmax(b, constants[1], delta, out, n_grid)
        _sum_softmax(e, constants[2], delta, out, n_grid + 1)
        if constants[4] != constants[7] or constants[5] != constants[8] or constants[6] != constants[9]:
            _deltas(b, e, constants[4:], delta)
        low, high = _first_weights(x, constants, alphas[n_grid - 1], delta, w)
        out[n_grid + 2, 0] += high
        if not low:
            _steps(alphas[1] - alphas[0], delta, u)
        k = np.int64(0)
        while k < n_grid:
            if low or k % CHAIN == 0:
                if k:
                    _weights(x, constants, alphas[k], delta, w)
                if 0 <= mode < size:
                    w[mode] = 0.0
                _sum_weights(w, delta, out, k)
                k += 1
            elif k + 5 <= n_grid and k % CHAIN + 5 <= CHAIN:
                _sum_five(w, u, delta, out, k)
                k += 5
            else:
                for i in range(size):
                    w[i] += w[i] * u[i]
                _sum_weights(w, delta, out, k)
                k += 1
        if 0 <= mode < size:
            for k in range(n_grid):
                out[k, 0] += 1.0
