"""The search's sums in float64: for −inf, differences beyond float32, and choices that float32 leaves in doubt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import F64, exp64, jit, jit_sum, row_at, wide


@jit
def _top(x: Any) -> Any:
    """Largest element of a float64 array without NaN, by integers of the same order, which vectorise."""
    wide()
    bits = x.view(np.int64)
    best = np.int64(-0x8000000000000000)
    for i in range(bits.size):
        best = max(best, bits[i] ^ ((bits[i] >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))
    best ^= (best >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)
    box = np.empty(1, np.int64)
    box[0] = best
    return box.view(np.float64)[0]


@jit_sum
def _sum64(x: Any, top: float) -> Any:
    s = 0.0
    for i in range(x.size):
        s += exp64(x[i] - top)
    return s


@jit_sum
def _moments64(x: Any, top: float, d: Any) -> Any:
    s = 0.0
    t = 0.0
    v = 0.0
    for i in range(x.size):
        w = exp64(x[i] - top)
        s += w
        t += w * d[i]
        v += w * d[i] * d[i]
    return s, t / s, v / s


@jit
def careful_curve(at: Any, alphas: Any, curve: Any, targets: Any, scratch: Any) -> None:
    """As `search_rows` for one row of one expert, at any range and with the rules for −inf.

    at (3,): addresses of the rows of large, base and expert. alphas[0] = 0; scratch (3, V).
    """
    log_p, d, x = scratch[0], scratch[1], scratch[2]
    large, base, expert = row_at(at[0], x.size), row_at(at[1], x.size), row_at(at[2], x.size)
    for i in range(large.size):
        both = base[i] > -math.inf and expert[i] > -math.inf
        x[i] = F64(base[i]) if both else -math.inf
        d[i] = F64(expert[i]) if both else -math.inf
        log_p[i] = large[i]
    log_p -= _top(log_p)
    base_top, expert_top = _top(x), _top(d)
    targets[:] = 0.0
    if base_top > -math.inf:
        base_log, expert_log = math.log(_sum64(x, base_top)), math.log(_sum64(d, expert_top))
        for i in range(large.size):
            d[i] = (d[i] - expert_top) - (x[i] - base_top) - (expert_log - base_log) if x[i] > -math.inf else 0.0
        targets[1] = max(0.0, -_moments64(x, base_top, d)[1])
        for i in range(large.size):
            x[i] = F64(expert[i]) if x[i] > -math.inf else -math.inf
        targets[0] = max(0.0, _moments64(x, expert_top, d)[1])
    else:
        d[:] = 0.0
    for k in range(alphas.size):
        for i in range(large.size):
            x[i] = log_p[i] + alphas[k] * d[i]
        reference = _top(x)
        s, mean, square = _moments64(x, reference, d)
        curve[k, 0] = reference + math.log(s)
        curve[k, 1] = mean
        curve[k, 2] = square - mean * mean
    curve[:, 0] -= curve[0, 0]
