"""The fused row `large + Σ α (expert − base)`, with the maximum and the mass of each group of its tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import F32, F64, HAS_NEG_INF, OK, condition, exp, exp64, extremes, jit, jit_sum, order_key, row_at, wide

GROUP = 1024
"""Tokens per maximum kept for a fused row."""
NEG_INF_BITS = np.int32(-0x800000)
"""The bits of −inf in float32."""
LARGEST_FLOAT = float(np.finfo(np.float32).max)


@jit_sum
def _mass(row: Any, top: Any) -> Any:
    s = F32(0)
    for i in range(row.size):
        s += exp(row[i] - top)
    return s


@jit
def measure_group(fused: Any, group: int, maxima: Any, masses: Any, keys: Any) -> Any:
    """Maximum and Σ exp(row − maximum) of one group; what it holds. keys (2,): int32 scratch."""
    row = fused[group * GROUP : min(group * GROUP + GROUP, fused.size)]
    extremes(row.view(np.int32), keys)
    maxima.view(np.int32)[group] = order_key(keys[0])
    masses[group] = _mass(row, maxima[group]) if maxima[group] > -math.inf else F32(0)
    return condition(keys[0], keys[1])


@jit
def _fuse(large: Any, base: Any, expert: Any, factor: Any, fused: Any) -> None:
    wide()
    for i in range(fused.size):
        fused[i] = large[i] + factor * (expert[i] - base[i])


@jit
def _add(base: Any, expert: Any, factor: Any, fused: Any) -> None:
    wide()
    for i in range(fused.size):
        fused[i] += factor * (expert[i] - base[i])


@jit
def fuse_groups(at: Any, alphas: Any, first: int, last: int, fused: Any, maxima: Any, masses: Any) -> Any:
    """Fuse and measure groups first … last - 1; how many are not all finite. at (2 + T,) or (1,), alphas (T,)."""
    n_unusual = 0
    keys = np.empty(2, np.int32)
    for group in range(first, last):
        start, stop = group * GROUP, min(group * GROUP + GROUP, fused.size)
        part, size, n_added = fused[start:stop], stop - start, 0
        large = row_at(at[0] + 4 * start, size)
        for t in range(alphas.size):
            if alphas[t] != 0.0:
                base, expert = row_at(at[1] + 4 * start, size), row_at(at[2 + t] + 4 * start, size)
                if n_added:
                    _add(base, expert, F32(alphas[t]), part)
                else:
                    _fuse(large, base, expert, F32(alphas[t]), part)
                n_added += 1
        if n_added == 0:
            part[:] = large
        if measure_group(fused, group, maxima, masses, keys) != OK:
            n_unusual += 1
    return n_unusual


@jit
def _highest(base: Any, expert: Any, out: Any) -> None:
    """The bits of both rows' largest logits among tokens that neither has at −inf; how many such. Rows as bits."""
    wide()
    high = other = np.int32(-0x80000000)
    n = np.int32(0)
    for i in range(base.size):
        both = (base[i] != NEG_INF_BITS) & (expert[i] != NEG_INF_BITS)
        high = max(high, order_key(base[i]) if both else np.int32(-0x80000000))
        other = max(other, order_key(expert[i]) if both else np.int32(-0x80000000))
        n += np.int32(both)
    out[0], out[1], out[2] = order_key(high), order_key(other), n


@jit_sum
def _sums(base: Any, expert: Any, base_top: float, expert_top: float) -> Any:
    """Σ exp(row − top) of both, over tokens that neither has at −inf."""
    s = 0.0
    t = 0.0
    for i in range(base.size):
        both = (base[i] > -math.inf) & (expert[i] > -math.inf)
        s += exp64(F64(base[i]) - base_top) if both else 0.0
        t += exp64(F64(expert[i]) - expert_top) if both else 0.0
    return s, t


@jit
def _add_shifts(base: Any, expert: Any, alpha: float, x: Any) -> None:
    """Add α (expert − base) to x in float64. Where one of them is −inf, the one that makes log Q_t − log Q = 0."""
    out = np.empty(3, np.int32)
    _highest(base.view(np.int32), expert.view(np.int32), out)
    shift = 0.0
    if 0 < out[2] < base.size:
        tops = out.view(np.float32)
        base_top, expert_top = F64(tops[0]), F64(tops[1])
        base_sum, expert_sum = _sums(base, expert, base_top, expert_top)
        shift = expert_top - base_top + math.log(expert_sum / base_sum)
    for i in range(x.size):
        both = (base[i] > -math.inf) & (expert[i] > -math.inf)
        x[i] += alpha * ((F64(expert[i]) - F64(base[i])) if both else shift)


@jit
def fuse_carefully(at: Any, alphas: Any, fused: Any, x: Any, fault: Any) -> None:
    """One whole row with −inf or differences beyond float32. x (V,): float64 scratch.

    fault (2,): the member with NaN, +inf or nothing finite, and which of them; else untouched.
    """
    keys = np.empty(2, np.int32)
    for member in range(at.size):
        if member == 0 or (alphas[member - 2] != 0.0 if member > 1 else np.count_nonzero(alphas)):
            extremes(row_at(at[member], fused.size).view(np.int32), keys)
            code = condition(keys[0], keys[1])
            if code != OK and code != HAS_NEG_INF:
                fault[0], fault[1] = member, code
                return
    large = row_at(at[0], fused.size)
    x[:] = large
    for t in range(alphas.size):
        if alphas[t] != 0.0:
            _add_shifts(row_at(at[1], fused.size), row_at(at[2 + t], fused.size), alphas[t], x)
    for i in range(fused.size):
        fused[i] = F32(min(max(x[i], -LARGEST_FLOAT), LARGEST_FLOAT)) if large[i] > -math.inf else -math.inf


@jit
def log_sum(maxima: Any, masses: Any) -> Any:
    """log Σ exp(fused)."""
    top = F64(maxima.max())
    total = 0.0
    for group in range(maxima.size):
        total += masses[group] * math.exp(maxima[group] - top)
    return top + math.log(total)
