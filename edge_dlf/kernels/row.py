"""The fused row, and what choosing a token from it needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import F32, F64, OK, condition, exp, extremes, fetch_add, jit, jit_sum, order_key, wide

GROUP = 1024
"""Tokens per maximum kept for a fused row."""
GROUPS = 4
"""Groups that a thread takes at a time."""


@jit_sum
def _mass(row: Any, top: Any) -> Any:
    s = F32(0)
    for i in range(row.size):
        s += exp(row[i] - top)
    return s


@jit
def _measure_group(fused: Any, group: int, maxima: Any, masses: Any, box: Any) -> Any:
    """Maximum and Σ exp(row − maximum) of one group; what it holds."""
    row = fused[group * GROUP : min(group * GROUP + GROUP, fused.size)]
    extremes(row.view(np.int32), box)
    maxima.view(np.int32)[group] = order_key(box[0])
    masses[group] = _mass(row, maxima[group]) if maxima[group] > -math.inf else F32(0)
    return condition(box[0], box[1])


@jit
def measure_groups(fused: Any, groups: Any, maxima: Any, masses: Any) -> None:
    """Maxima and masses of the groups named, after entries of `fused` have changed."""
    box = np.empty(2, np.int32)
    for group in groups:
        _measure_group(fused, group, maxima, masses, box)


@jit
def _fuse_group(large: Any, base: Any, expert: Any, factor: Any, fused: Any) -> None:
    wide()
    for i in range(fused.size):
        fused[i] = large[i] + factor * (expert[i] - base[i])


@jit
def fuse_row(large: Any, base: Any, expert: Any, alpha: Any, fused: Any, maxima: Any, masses: Any, sync: Any) -> None:
    """fused = large + α (expert − base), and each group's maximum and mass.

    sync: zeros; chunks taken, chunks done, groups that are not all finite.
    """
    n_chunks = (maxima.size + GROUPS - 1) // GROUPS
    box = np.empty(2, np.int32)
    factor = F32(alpha)
    while True:
        chunk = fetch_add(sync, 0, 1)
        if chunk >= n_chunks:
            break
        for group in range(chunk * GROUPS, min(chunk * GROUPS + GROUPS, maxima.size)):
            start, stop = group * GROUP, min(group * GROUP + GROUP, fused.size)
            if factor == 0:
                fused[start:stop] = large[start:stop]
            else:
                _fuse_group(large[start:stop], base[start:stop], expert[start:stop], factor, fused[start:stop])
            if _measure_group(fused, group, maxima, masses, box) != OK:
                fetch_add(sync, 2, 1)
        fetch_add(sync, 1, 1)
    while fetch_add(sync, 1, 0) < n_chunks:
        pass


@jit
def log_sum(maxima: Any, masses: Any) -> Any:
    """log Σ exp(fused)."""
    top = F64(maxima.max())
    total = 0.0
    for group in range(maxima.size):
        total += masses[group] * math.exp(maxima[group] - top)
    return top + math.log(total)


@jit
def gather(fused: Any, maxima: Any, threshold: Any, ids: Any) -> Any:
    """Tokens with a logit of at least `threshold`, in ascending order, into `ids`; how many."""
    n = 0
    for group in range(maxima.size):
        if maxima[group] >= threshold:
            for token in range(group * GROUP, min(group * GROUP + GROUP, fused.size)):
                if fused[token] >= threshold:
                    ids[n] = token
                    n += 1
    return n


@jit
def mix(x: Any) -> Any:
    """splitmix64's finaliser over uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def draw(logits: Any, ids: Any, temperature: float, seed: Any, position: Any) -> Any:
    """Index of the largest logit / temperature + Gumbel noise keyed by (seed, position, token); ties to the first.

    float64 logits with their largest subtracted. The argmax of such a sum is a draw from softmax(logits / temperature).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = mix(mix(seed + golden) + position * golden)
    best, best_score = -1, -math.inf
    for i in range(logits.size):
        logit = logits[i] / temperature
        if logit + 37.5 < best_score:  # beyond the largest noise of 53 bits
            continue
        noise = mix(state + (np.uint64(ids[i]) + np.uint64(1)) * golden) >> np.uint64(11)
        uniform = (F64(noise) + 0.5) * 2.0**-53
        y = best_score - logit
        # −log u > 1 − u and exp(y) > its first terms, so that this rules out logit − log(−log u) > best without a log
        if y > 0.0 and (1.0 - uniform) * (1.0 + y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24))))) >= 1.0:
            continue
        score = logit - math.log(-math.log(uniform))
        if score > best_score:
            best, best_score = i, score
    return best
