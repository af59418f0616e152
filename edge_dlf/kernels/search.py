"""One expert's search in one pass over the vocabulary.

For one expert P̃(α) ∝ P·exp(α d) is an exponential family in α, so one pass over the vocabulary gives every grid value.
With l = log P + const and δ = d + const, both constants chosen so that the large model's first most likely token (the
mode) has l = δ = 0, and w_α = exp(l + α δ), S0 = Σ w_α, S1 = Σ w_α δ:

    Λ(α) = log(S0(α) / S0(0))      KL(P̃‖P) = α S1(α)/S0(α) − Λ(α)      KL(P‖P̃) = Λ(α) − α S1(0)/S0(0)

The constants cancel in both. The mode's weight is exactly 1 at every α, so that no sum underflows and float32 terms
suffice; it is added in float64. Terms are summed in float32 within a block and in float64 across blocks.

Several threads may run `search_rows` on the same arguments. Each takes the next free row, so that no thread waits for
another; of the last rows, as many as there are threads, the next free chunk, and the one to finish the last chunk of a
row goes on with what follows from all of them. A chunk's sums do not depend on who computed it, so results are the same
for any number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .vector import (
    F32,
    F64,
    OK,
    condition,
    exp,
    expm1,
    extremes,
    fetch_add,
    jit,
    jit_sum,
    load,
    order_key,
    row_at,
    wide,
)

BLOCK = 1024
"""Tokens per pass over the scratch; its three float32 arrays fit a first-level cache."""
CHUNK = 2048
"""Tokens that a thread takes at a time."""
CHAIN = 30
"""Grid points reached by multiplication before the weights are computed afresh."""
ROUNDING = 2e-7
"""Error of a KL by float32 terms, in nats, relative to 1 + α (|Λ'(α)| + |Λ'(0)|) + targets."""
NOISE = 3e-7
"""Targets up to this, in nats, are rounding: the expert is the base, and α = 0."""
LOWEST, HIGHEST = np.float32(-80.0), np.float32(80.0)
"""Exponents between which float32 weights neither underflow nor overflow."""


@jit
def _deltas(base: Any, expert: Any, shifts: Any, delta: Any) -> None:
    wide()
    base_shift, expert_shift, offset = F32(shifts[0]), F32(shifts[1]), F32(shifts[2])
    for i in range(base.size):
        delta[i] = ((expert[i] - expert_shift) - (base[i] - base_shift)) - offset


@jit
def _set_shifts(base: Any, expert: Any, shifts: Any) -> None:
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
def _sum_chunk(large: Any, base: Any, expert: Any, start: int, head: Any, alphas: Any, scratch: Any, out: Any) -> None:
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


@jit
def _head(large: Any, base: Any, expert: Any, tops: Any, mode: int, head: Any) -> None:
    """The constants of one expert's sums, into `head` (10,): maxima of large, base, expert; index of the mode; shifts
    of δ that are 0 at the mode; those for the targets."""
    head[:3] = tops
    head[3] = mode
    _set_shifts(base[mode], expert[mode], head[4:])
    _set_shifts(head[1], head[2], head[7:])
    if abs(head[9] - head[6]) < 2.0 and head[4] == head[5] == head[7] == head[8] == 0.0:
        head[7:] = head[4:7]  # near enough to share


@jit
def _heads(at: Any, n_vocab: int, keys: Any, heads: Any, codes: Any) -> None:
    """Of one row: what each member holds, into `codes` (2 + T,), and the heads (T, 10) of the experts that can do."""
    n_members = at.size
    keys_of_tops = np.empty(n_members, np.int32)
    for member in range(n_members):
        highest = keys[member, :, 0].max()
        codes[member] = condition(highest, keys[member, :, 1].min())
        keys_of_tops[member] = order_key(highest)
    maxima = keys_of_tops.view(np.float32)
    large, base = row_at(at[0], n_vocab), row_at(at[1], n_vocab)
    tops = np.empty(3, np.float32)
    tops[0], tops[1] = maxima[0], maxima[1]
    if max(codes[0], codes[1]) != OK:
        return
    mode = np.argmax(keys[0, :, 0]) * CHUNK
    while large[mode] < tops[0]:
        mode += 1
    for t in range(n_members - 2):
        if codes[2 + t] == OK:
            tops[2] = maxima[2 + t]
            _head(large, base, row_at(at[2 + t], n_vocab), tops, mode, heads[t])


@jit
def _curve(sums: Any, head: Any, curve: Any, targets: Any) -> Any:
    """Λ, Λ', Λ'' into `curve` (G, 3), the first two up to a constant of d, the last only where G ≤ 2; a and b into
    `targets` (2,). False: not usable."""
    n_grid = curve.shape[0]
    total = sums[0].copy()
    for chunk in range(1, sums.shape[0]):
        total += sums[chunk]
    for k in range(n_grid):
        curve[k, 0] = math.log(total[k, 0] / total[0, 0])
        curve[k, 1] = total[k, 1] / total[k, 0]
        curve[k, 2] = total[k, 2] / total[k, 0] - curve[k, 1] ** 2
    base_sum, expert_sum = total[n_grid, 0], total[n_grid + 1, 0]
    gap = head[2] - head[8] - (head[1] - head[7]) - head[9] + math.log(expert_sum / base_sum)  # δ − d
    targets[0] = max(0.0, total[n_grid + 1, 1] / expert_sum - gap)
    targets[1] = max(0.0, gap - total[n_grid, 1] / base_sum)
    finite = math.isfinite(curve[:, :2].sum() + targets.sum())
    return finite and total[n_grid + 2, 0] == 0.0


@jit
def choose(curves: Any, targets: Any, alphas: Any) -> Any:
    """The (expert, grid index) with the first strict minimum of J for one row; curves (T, G, 3), targets (T, 2).

    Last, what float32 sums leave in doubt: 0 nothing, 1 the value of J there, 2 whether another pair is lower.
    """
    n_experts, n_grid = curves.shape[0], curves.shape[1]
    if targets.max() <= NOISE:
        return 0, 0, 0
    forward_mean, reverse_mean = targets[:, 0].mean(), targets[:, 1].mean()
    spread = 0.0
    for t in range(n_experts):
        spread += (targets[t, 0] - forward_mean) ** 2 + (targets[t, 1] - reverse_mean) ** 2
    objectives, errors = np.empty((n_experts, n_grid)), np.empty((n_experts, n_grid))
    best_expert, best = 0, 0
    for t in range(n_experts):
        for k in range(n_grid):
            forward = max(0.0, alphas[k] * curves[t, k, 1] - curves[t, k, 0])
            reverse = max(0.0, curves[t, k, 0] - alphas[k] * curves[t, 0, 1])
            x, y = forward - forward_mean, reverse - reverse_mean
            objectives[t, k] = n_experts * (x * x + y * y) + spread
            size = 1.0 + alphas[k] * (abs(curves[t, k, 1]) + abs(curves[t, 0, 1])) + targets.max()
            errors[t, k] = 2 * n_experts * (abs(x) + abs(y)) * ROUNDING * size
            if objectives[t, k] < objectives[best_expert, best]:
                best_expert, best = t, k
    lowest = objectives[best_expert, best]
    tolerance = 1e-4 * lowest + 1e-9
    doubt = 1 if errors[best_expert, best] > tolerance else 0
    for t in range(n_experts):
        for k in range(n_grid):
            error = errors[t, k] + errors[best_expert, best]
            other = (t != best_expert or k != best) and (k > 0 or best > 0)
            if other and error > tolerance and objectives[t, k] - lowest < error:
                doubt = 2
    return best_expert, best, doubt


@jit
def _read_chunk(at: Any, chunk: int, n_vocab: int, keys: Any) -> None:
    """Of one row, the extremes of each member's chunk, into `keys` (2 + T, chunks, 2)."""
    start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, n_vocab)
    for member in range(at.size):
        extremes(row_at(at[member] + 4 * start, stop - start).view(np.int32), keys[member, chunk])


@jit
def _sum_part(
    at: Any, t: int, chunk: int, n_vocab: int, codes: Any, head: Any, alphas: Any, scratch: Any, out: Any
) -> None:
    """The sums of one chunk of one row for expert `t`, unless the row is one that float32 cannot do."""
    start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, n_vocab)
    if max(codes[0], codes[1], codes[2 + t]) == OK:
        large, base = row_at(at[0] + 4 * start, stop - start), row_at(at[1] + 4 * start, stop - start)
        _sum_chunk(large, base, row_at(at[2 + t] + 4 * start, stop - start), start, head, alphas, scratch, out)


@jit
def _finish(codes: Any, sums: Any, heads: Any, alphas: Any, curves: Any, targets: Any, choice: Any) -> Any:
    """Of one row: curves (T, G, 3), targets (T, 2) and `choose` of them (3,). Targets are NaN where float32 cannot do;
    how many."""
    n_odd = 0
    for t in range(curves.shape[0]):
        usable = max(codes[0], codes[1], codes[2 + t]) == OK
        if not usable or not _curve(sums[t], heads[t], curves[t], targets[t]):
            targets[t] = math.nan
            n_odd += 1
    if n_odd == 0:
        choice[0], choice[1], choice[2] = choose(curves, targets, alphas)
    return n_odd


@jit
def search_rows(
    at: Any, n_vocab: int, alphas: Any, keys: Any, heads: Any, codes: Any, sums: Any,
    curves: Any, targets: Any, choices: Any, scratch: Any, progress: Any, sync: Any,
) -> None:  # fmt: skip
    """Curves (K, T, G, 3), targets (K, T, 2), codes (K, 2 + T) and choices (K, 3) of all K rows and T experts.

    at (K, 2 + T): addresses of the rows of large, base and experts. progress (2 K): zeros; chunks of each row read, and
    summed. sync: zeros; scratch handed out, tasks taken, rows done, and how many (row, expert) float32 cannot do.
    """
    n_rows, n_experts, n_chunks, n_threads = sums.shape[0], sums.shape[1], sums.shape[2], scratch.shape[0]
    n_whole, n_parts = (n_rows - 1) // n_threads * n_threads, n_chunks * (1 + n_experts)
    own = scratch[fetch_add(sync, 0, 1)]
    while True:
        task = fetch_add(sync, 1, 1)
        if task >= n_whole + (n_rows - n_whole) * n_parts:
            break
        is_last = False
        if task < n_whole:
            k = task
            for chunk in range(n_chunks):
                _read_chunk(at[k], chunk, n_vocab, keys[k])
            _heads(at[k], n_vocab, keys[k], heads[k], codes[k])
            for t in range(n_experts):
                for chunk in range(n_chunks):
                    _sum_part(at[k], t, chunk, n_vocab, codes[k], heads[k, t], alphas, own, sums[k, t, chunk])
            is_last = True
        else:
            k, part = n_whole + (task - n_whole) // n_parts, (task - n_whole) % n_parts
            chunk = part % n_chunks
            if part < n_chunks:
                _read_chunk(at[k], chunk, n_vocab, keys[k])
                if fetch_add(progress, 2 * k, 1) == n_chunks - 1:
                    _heads(at[k], n_vocab, keys[k], heads[k], codes[k])
                    fetch_add(progress, 2 * k, 1)
            else:
                while load(progress, 2 * k) <= n_chunks:  # others are reading the last chunks of this row
                    pass
                t = part // n_chunks - 1
                _sum_part(at[k], t, chunk, n_vocab, codes[k], heads[k, t], alphas, own, sums[k, t, chunk])
                is_last = fetch_add(progress, 2 * k + 1, 1) == n_chunks * n_experts - 1
        if is_last:
            fetch_add(sync, 3, _finish(codes[k], sums[k], heads[k], alphas, curves[k], targets[k], choices[k]))
            fetch_add(sync, 2, 1)
    while load(sync, 2) < n_rows:
        pass
