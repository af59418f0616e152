"""The search's sums in float64, for rows with −inf, for differences that overflow float32, and for near ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import F64, exp64, jit, jit_sum, kernel, row_at, use_wide_vectors


@jit
def _top(x: Any) -> Any:
    """Largest element of a float64 array (N,) without NaN. Integers of the same order vectorise."""
    use_wide_vectors()
    bits = x.view(np.int64)
    best = np.int64(-0x8000000000000000)
    for i in range(bits.size):
        best = max(best, bits[i] ^ ((bits[i] >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))
    best ^= (best >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)
    box = np.empty(1, np.int64)
    box[0] = best
    return box.view(np.float64)[0]


@jit_sum
def _sum_exp(x: Any, top: float) -> Any:
    """Σ exp(x − top)."""
    s = 0.0
    for i in range(x.size):
        s += exp64(x[i] - top)
    return s


@jit_sum
def _moments(x: Any, top: float, d: Any) -> Any:
    """Σ w, and the means of d and d² under w = exp(x − top)."""
    s = 0.0
    t = 0.0
    v = 0.0
    for i in range(x.size):
        w = exp64(x[i] - top)
        s += w
        t += w * d[i]
        v += w * d[i] * d[i]
    return s, t / s, v / s


@kernel
def cumulants_float64(addresses: Any, alphas: Any, cumulants: Any, targets: Any, scratch: Any) -> None:
    """Λ, Λ', Λ'' of one row and one expert into cumulants (G, 3), and a = KL(Q_t‖Q), b = KL(Q‖Q_t) into targets (2,).

    A token that base or expert gives −inf has d = 0 and is left out of Q and Q_t.

    addresses: of the rows of large, base and expert, (3,)
    alphas: the grid (G,), whose first value is 0
    scratch: float64 (3, V)
    """
    log_p, d, x = scratch[0], scratch[1], scratch[2]
    large, base, expert = row_at(addresses[0], x.size), row_at(addresses[1], x.size), row_at(addresses[2], x.size)
    for i in range(large.size):
        both = base[i] > -math.inf and expert[i] > -math.inf
        x[i] = F64(base[i]) if both else -math.inf
        d[i] = F64(expert[i]) if both else -math.inf
        log_p[i] = large[i]
    top, base_top, expert_top = _top(log_p), _top(x), _top(d)
    for i in range(large.size):
        log_p[i] -= top
    targets[:] = 0.0
    if base_top > -math.inf:
        base_log, expert_log = math.log(_sum_exp(x, base_top)), math.log(_sum_exp(d, expert_top))
        for i in range(large.size):
            d[i] = (d[i] - expert_top) - (x[i] - base_top) - (expert_log - base_log) if x[i] > -math.inf else 0.0
        targets[1] = max(0.0, -_moments(x, base_top, d)[1])
        for i in range(large.size):
            x[i] = F64(expert[i]) if x[i] > -math.inf else -math.inf
        targets[0] = max(0.0, _moments(x, expert_top, d)[1])
    else:
        d[:] = 0.0
    for k in range(alphas.size):
        for i in range(large.size):
            x[i] = log_p[i] + alphas[k] * d[i]
        reference = _top(x)
        s, mean, square = _moments(x, reference, d)
        cumulants[k, 0] = reference + math.log(s)
        cumulants[k, 1] = mean
        cumulants[k, 2] = square - mean * mean
    start = cumulants[0, 0]
    for k in range(alphas.size):
        cumulants[k, 0] -= start
