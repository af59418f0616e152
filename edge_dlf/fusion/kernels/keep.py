"""Reduction of a row to few tokens: the likeliest ones exactly, and a sample of the rest with importance weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .fuse import GROUP, find_fault, fuse_groups, log_sum
from .pick import best_candidates, candidate_token
from .vector import F32, F64, OK, exp, fetch_add, jit, jit_sum, kernel, load, row_at, use_wide_vectors

PADDING = np.float32(-1e30)
"""Log importance weight of places that hold no token."""


@jit
def _add_probs(fused: Any, total: Any, chances: Any) -> None:
    """Add the probabilities exp(fused − total) to chances (V,)."""
    use_wide_vectors()
    for i in range(fused.size):
        chances[i] += exp(fused[i] - total)


@jit_sum
def _sum(values: Any) -> Any:
    s = F32(0)
    for i in range(values.size):
        s += values[i]
    return s


@jit
def _add_likeliest(candidates: Any, tokens: Any, n_tokens: int) -> Any:
    """Add the candidates' tokens that `tokens` does not hold yet, while there is room. Returns the new number."""
    for candidate in candidates:
        token = candidate_token(candidate)
        is_new = n_tokens < tokens.size
        for i in range(n_tokens):
            is_new = is_new and tokens[i] != token
        if is_new:
            tokens[n_tokens] = token
            n_tokens += 1
    return n_tokens


@jit
def _sample(chances: Any, uniform: float, tokens: Any, log_weights: Any, n_tokens: int) -> Any:
    """Fill `tokens` (N,) from place `n_tokens` on by systematic sampling. Returns the new number of tokens.

    Points lie evenly over the cumulative chances (V,), shifted by one uniform number, so that the expected number of
    points in a token is chance / step. Its importance weight is the number of points times step / chance.
    """
    sums = np.empty((chances.size + GROUP - 1) // GROUP)
    for group in range(sums.size):
        sums[group] = _sum(chances[group * GROUP : min(group * GROUP + GROUP, chances.size)])
    step = sums.sum() / max(1, tokens.size - n_tokens)
    point = uniform * step
    below = 0.0
    for group in range(sums.size):
        reached = below
        below += sums[group]
        if point >= below or step == 0.0:
            continue
        for token in range(group * GROUP, min(group * GROUP + GROUP, chances.size)):
            reached += F64(chances[token])
            n_points = 0
            while point < reached:
                point += step
                n_points += 1
            if n_points > 0 and n_tokens < tokens.size:
                tokens[n_tokens] = token
                log_weights[n_tokens] = math.log(n_points * step / chances[token])
                n_tokens += 1
    return n_tokens


@jit
def _keep(
    addresses: Any, terms: Any, mixtures: Any, gold: int, uniform: float, n_likeliest: int, fused: Any, chances: Any,
    maxima: Any, masses: Any, candidates: Any, kept: Any, fault: Any,
) -> None:  # fmt: skip
    """Reduce one row into kept (M + 1, N): the members' logits, the gold token first, and log importance weights."""
    n_members, tokens = addresses.size, np.empty(kept.shape[1], np.int64)
    tokens[0] = gold
    n_tokens = 1
    chances[:] = F32(0.05 * mixtures.shape[0] / fused.size)
    for c in range(mixtures.shape[0]):
        n_unusual = fuse_groups(addresses, terms, mixtures[c], 0, maxima.size, fused, maxima, masses)
        if n_unusual:
            find_fault(addresses, terms, np.ones(n_members), fused.size, fault)
            if fault[1] != OK:
                return
            if np.count_nonzero(mixtures[c]) > 1:
                continue
        n = best_candidates(fused, maxima, n_likeliest, candidates)
        n_tokens = _add_likeliest(np.sort(candidates[:n]), tokens, n_tokens)
        _add_probs(fused, F32(log_sum(maxima, masses)), chances)
    for i in range(n_tokens):
        chances[tokens[i]] = 0.0
    kept[:n_members] = 0.0
    kept[n_members, :n_tokens] = 0.0
    kept[n_members, n_tokens:] = PADDING
    n_tokens = _sample(chances, uniform, tokens, kept[n_members], n_tokens)
    for m in range(n_members):
        row = row_at(addresses[m], fused.size)
        for i in range(n_tokens):
            kept[m, i] = row[tokens[i]]


@kernel
def keep_rows(
    addresses: Any, terms: Any, mixtures: Any, golds: Any, uniforms: Any, n_likeliest: int, fused: Any, chances: Any,
    maxima: Any, masses: Any, candidates: Any, kept: Any, faults: Any, counters: Any,
) -> None:  # fmt: skip
    """Reduce K rows into kept (K, M + 1, N), float32; threads take the next free row.

    addresses: of the members' rows of V logits, (K, M)
    terms: one for each member, (M, 3), as in `fuse`
    mixtures: weights (C, M). The likeliest tokens of each of these weighted fusions are kept, and the others are
        sampled by the sum of their probabilities
    golds, uniforms: the known token of each row and a number in [0, 1) for its sample, (K,)
    fused, chances, maxima, masses, candidates: scratch for each thread, as in `pick_rows`
    faults: zeros (K, 2): the member and the condition that make a row unusable
    counters: zeros: threads that have begun, rows taken, rows done
    """
    own = fetch_add(counters, 0, 1)
    while True:
        k = fetch_add(counters, 1, 1)
        if k >= golds.size:
            break
        _keep(
            addresses[k], terms, mixtures, golds[k], uniforms[k], n_likeliest, fused[own], chances[own],
            maxima[own], masses[own], candidates[own], kept[k], faults[k],
        )  # fmt: skip
        fetch_add(counters, 2, 1)
    while load(counters, 2) < golds.size:
        pass
