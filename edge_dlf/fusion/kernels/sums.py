"""One expert's sums over a chunk of the vocabulary, for every α in one pass.

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

from .vector import F32, F64, exp, expm1, jit, jit_sum, wide

BLOCK = 1024
"""Tokens per pass over the scratch; its three float32 arrays fit a first-level cache."""
CHAIN = 30
"""Grid points reached by multiplication before the weights are computed afresh."""
LOWEST, HIGHEST = np.float32(-80.0), np.float32(80.0)
"""Exponents between which float32 weights neither underflow nor overflow."""


@jit
def _deltas(base: Any, expert: Any, shifts: Any, delta: Any) -> None:
    wide()
    base_shift, expert_shift, offset = F32(shifts[0]), F32(shifts[1]), F32(shifts[2])
    for i in range(base.size):
        delta[i] = ((expert[i] - expert_shift) - (base[i] - base_shift)) - offset


@jit
def set_shifts(base: Any, expert: Any, shifts: Any) -> None:
    """Shifts of base and expert, and offset, by which `_deltas` is 0 at these two logits and rounds least near them."""
    difference = F64(expert) - F64(base)
    if abs(difference) < 16.0:
        shifts[0], shifts[1], shifts[2] = 0.0, 0.0, F32(difference)
    else:  # the members' scales differ, so that expert − base would round
        shifts[0], shifts[1], shifts[2] = base, expert, 0.0


@jit
def _weights(large: Any, head: Any, alpha: Any, delta: Any, w: Any) -> None:
    top, factor = F32(head[0]), F32(alpha)
    for i in range(large.size):
        w[i] = exp((large[i] - top) + factor * delta[i])


@jit
def _first_weights(large: Any, head: Any, alpha_max: Any, delta: Any, w: Any) -> Any:
    """Weights at α = 0. Returns how many exponents are too low, and too high or NaN, for a chain to `alpha_max`."""
    top, factor = F32(head[0]), F32(alpha_max)
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
    factor = F32(step)
    for i in range(u.size):
        u[i] = expm1(factor * delta[i])


@jit_sum
def _sum_softmax(row: Any, top: Any, delta: Any, out: Any, k: int) -> None:
    """Add Σ exp(row − top) and Σ exp(row − top)·δ to out[k]."""
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
    wide()
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
    """Advance the weights by five grid points, w += w·u each, and add Σ w and Σ w δ of each to out[k], out[k + 1], …"""
    wide()
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
def sum_chunk(large: Any, base: Any, expert: Any, start: int, head: Any, alphas: Any, scratch: Any, out: Any) -> None:
    """Sums of one chunk from token `start` on: out[k] = Σ w, Σ w δ at alphas[k], then Σ, Σ δ of base and of expert.

    The last row counts tokens beyond float32's range, which void the rest.
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
        mode = int(head[3]) - start - first
        _deltas(b, e, head[7:], delta)
        _sum_softmax(b, head[1], delta, out, n_grid)
        _sum_softmax(e, head[2], delta, out, n_grid + 1)
        if head[4] != head[7] or head[5] != head[8] or head[6] != head[9]:
            _deltas(b, e, head[4:], delta)
        low, high = _first_weights(x, head, alphas[n_grid - 1], delta, w)
        out[n_grid + 2, 0] += high
        if not low:
            _steps(alphas[1] - alphas[0], delta, u)
        k = 0
        while k < n_grid:
            if low or k % CHAIN == 0:
                if k:
                    _weights(x, head, alphas[k], delta, w)
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
