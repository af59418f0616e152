"""The fused row Σ_n weight_n · (member − other member), with the maximum and the mass of each group of its tokens.

A term is either one member's logits or the difference of two. `terms` (N, 3) says which: the index of a member, the
index of the member that is subtracted or −1, and 1 where the first one is an expert. So `large + Σ α (expert − base)`
and `Σ w_m l_m` are one routine. A token is impossible where a single member with a positive weight gives it −inf. A
single member with a negative weight that gives it −inf is left out for this token: its log p counts as 0. A difference
counts as log p − log p' = 0 where either member gives −inf.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import (
    F32,
    F64,
    HAS_NEG_INF,
    NONE_FINITE,
    OK,
    exp,
    exp64,
    extremes,
    first_largest,
    jit,
    jit_sum,
    order_key,
    row_at,
    row_condition,
    use_wide_vectors,
)  # fmt: skip

GROUP = 1024
"""Tokens of a fused row that share one maximum and one mass."""
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
    """Set the maximum and the mass Σ exp(row − maximum) of one group. Returns its condition.

    keys: int32 scratch (2,)
    """
    row = fused[group * GROUP : min(group * GROUP + GROUP, fused.size)]
    extremes(row.view(np.int32), keys)
    maxima.view(np.int32)[group] = order_key(keys[0])
    masses[group] = _mass(row, maxima[group]) if maxima[group] > -math.inf else F32(0)
    return row_condition(keys[0], keys[1])


@jit
def _set_one(a: Any, weight: Any, fused: Any) -> None:
    use_wide_vectors()
    for i in range(fused.size):
        fused[i] = weight * a[i]


@jit
def _set_three(a: Any, b: Any, c: Any, weight_a: Any, weight_b: Any, weight_c: Any, fused: Any) -> None:
    use_wide_vectors()
    for i in range(fused.size):
        fused[i] = weight_a * a[i] + weight_b * b[i] + weight_c * c[i]


@jit
def _set_one_and_difference(a: Any, member: Any, other: Any, weight_a: Any, weight: Any, fused: Any) -> None:
    use_wide_vectors()
    for i in range(fused.size):
        fused[i] = weight_a * a[i] + weight * (member[i] - other[i])


@jit
def _add_one(a: Any, weight: Any, fused: Any) -> None:
    use_wide_vectors()
    for i in range(fused.size):
        fused[i] += weight * a[i]


@jit
def _add_difference(member: Any, other: Any, weight: Any, fused: Any) -> None:
    use_wide_vectors()
    for i in range(fused.size):
        fused[i] += weight * (member[i] - other[i])


@jit
def _next_term(weights: Any, n: int) -> Any:
    """The first term from `n` on with a weight, or the number of terms."""
    while n < weights.size and weights[n] == 0.0:
        n += 1
    return n


@jit
def _fuse_part(addresses: Any, terms: Any, weights: Any, start: int, part: Any) -> None:
    """Fuse the tokens from `start` on into part (N,). The first terms share one pass."""
    n_terms, offset, size = weights.size, 4 * start, part.size
    i = _next_term(weights, np.int64(0))
    if i == n_terms or terms[i, 1] >= 0:
        part[:] = 0.0
    else:
        j = _next_term(weights, i + 1)
        k = _next_term(weights, j + 1)
        a, weight_a = row_at(addresses[terms[i, 0]] + offset, size), F32(weights[i])
        if j >= n_terms:
            _set_one(a, weight_a, part)
            return
        b, weight_b = row_at(addresses[terms[j, 0]] + offset, size), F32(weights[j])
        i = k
        if terms[j, 1] >= 0:
            other = row_at(addresses[terms[j, 1]] + offset, size)
            _set_one_and_difference(a, b, other, weight_a, weight_b, part)
        elif k >= n_terms or terms[k, 1] >= 0:
            _set_three(a, b, b, weight_a, weight_b, F32(0), part)
        else:
            c = row_at(addresses[terms[k, 0]] + offset, size)
            _set_three(a, b, c, weight_a, weight_b, F32(weights[k]), part)
            i = _next_term(weights, k + 1)
    while i < n_terms:
        member = row_at(addresses[terms[i, 0]] + offset, size)
        if terms[i, 1] < 0:
            _add_one(member, F32(weights[i]), part)
        else:
            _add_difference(member, row_at(addresses[terms[i, 1]] + offset, size), F32(weights[i]), part)
        i = _next_term(weights, i + 1)


@jit
def fuse_groups(
    addresses: Any, terms: Any, weights: Any, first: int, last: int, fused: Any, maxima: Any, masses: Any
) -> Any:
    """Fuse and measure groups first … last − 1 of one row. Returns how many of them are not all finite.

    addresses: of the members' rows, (M,)
    weights: of the terms, (N,)
    """
    n_unusual = 0
    keys = np.empty(2, np.int32)
    for group in range(first, last):
        start = group * GROUP
        _fuse_part(addresses, terms, weights, start, fused[start : min(start + GROUP, fused.size)])
        if measure_group(fused, group, maxima, masses, keys) != OK:
            n_unusual += 1
    return n_unusual


@jit
def _common_maxima(member: Any, other: Any, out: Any) -> None:
    """Bits of both rows' largest logits among the tokens that neither gives −inf, and the number of these tokens.

    member, other: rows as int32 bits. out: int32 (3,)
    """
    use_wide_vectors()
    high = high_other = np.int32(-0x80000000)
    n = np.int32(0)
    for i in range(member.size):
        both = (member[i] != NEG_INF_BITS) & (other[i] != NEG_INF_BITS)
        high = max(high, order_key(member[i]) if both else np.int32(-0x80000000))
        high_other = max(high_other, order_key(other[i]) if both else np.int32(-0x80000000))
        n += np.int32(both)
    out[0], out[1], out[2] = order_key(high), order_key(high_other), n


@jit_sum
def _common_sums(member: Any, other: Any, top: float, top_other: float) -> Any:
    """Σ exp(row − top) of both rows over the tokens that neither gives −inf."""
    s = 0.0
    t = 0.0
    for i in range(member.size):
        both = (member[i] > -math.inf) & (other[i] > -math.inf)
        s += exp64(F64(member[i]) - top) if both else 0.0
        t += exp64(F64(other[i]) - top_other) if both else 0.0
    return s, t


@jit
def _add_difference_float64(member: Any, other: Any, weight: float, x: Any) -> None:
    """Add weight · (member − other) to x (V,). Where either is −inf, add what stands for log p − log p' = 0."""
    out = np.empty(3, np.int32)
    _common_maxima(member.view(np.int32), other.view(np.int32), out)
    shift = 0.0
    if 0 < out[2] < member.size:
        tops = out.view(np.float32)
        top, top_other = F64(tops[0]), F64(tops[1])
        s, t = _common_sums(member, other, top, top_other)
        shift = top - top_other + math.log(s / t)
    for i in range(x.size):
        both = (member[i] > -math.inf) & (other[i] > -math.inf)
        x[i] += weight * ((F64(member[i]) - F64(other[i])) if both else shift)


@jit
def _add_member_float64(member: Any, weight: float, x: Any) -> None:
    """Add weight · member to x (V,). With a negative weight, −inf is replaced by what stands for log p = 0."""
    lowest = -math.inf
    if weight < 0.0:
        out = np.empty(3, np.int32)
        _common_maxima(member.view(np.int32), member.view(np.int32), out)
        top = F64(out.view(np.float32)[0])
        lowest = top + math.log(_common_sums(member, member, top, top)[0])
    for i in range(x.size):
        x[i] += weight * (F64(member[i]) if member[i] > -math.inf else lowest)


@jit
def find_fault(addresses: Any, terms: Any, weights: Any, n_vocab: int, fault: Any) -> None:
    """Set fault (2,) to the first member with a weight that has NaN, +inf or nothing finite, and to its condition."""
    keys = np.empty(2, np.int32)
    for member in range(addresses.size):
        takes_part = False
        for n in range(weights.size):
            takes_part |= weights[n] != 0.0 and (terms[n, 0] == member or terms[n, 1] == member)
        if takes_part:
            extremes(row_at(addresses[member], n_vocab).view(np.int32), keys)
            condition = row_condition(keys[0], keys[1])
            if condition != OK and condition != HAS_NEG_INF:
                fault[0], fault[1] = member, condition
                return


@jit
def fuse_float64(addresses: Any, terms: Any, weights: Any, fused: Any, x: Any, fault: Any) -> None:
    """Fuse one whole row that has −inf, or differences that overflow float32.

    x: float64 scratch (V,)
    fault: (2,), left alone unless a member has NaN, +inf or nothing finite: then the member and the condition. The
        member is −1 where no token is possible for all members with a positive weight.
    """
    find_fault(addresses, terms, weights, fused.size, fault)
    if fault[1] != OK:
        return
    x[:] = 0.0
    for n in range(weights.size):
        if weights[n] != 0.0:
            member = row_at(addresses[terms[n, 0]], fused.size)
            if terms[n, 1] < 0:
                _add_member_float64(member, weights[n], x)
            else:
                _add_difference_float64(member, row_at(addresses[terms[n, 1]], fused.size), weights[n], x)
    n_possible = 0
    for i in range(fused.size):
        fused[i] = F32(min(max(x[i], -LARGEST_FLOAT), LARGEST_FLOAT)) if x[i] > -math.inf else -math.inf
        n_possible += x[i] > -math.inf
    if n_possible == 0:
        fault[0], fault[1] = -1, NONE_FINITE


@jit
def log_sum(maxima: Any, masses: Any) -> Any:
    """log Σ exp(fused), from the groups' maxima and masses."""
    top = F64(maxima[first_largest(maxima)])
    total = 0.0
    for group in range(maxima.size):
        total += masses[group] * math.exp(maxima[group] - top)
    return top + math.log(total)
