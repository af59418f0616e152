"""The search for (expert, α) of many rows: the sums of their chunks, J on the grid, its first minimum.

Several threads may run `search_rows` on the same arguments. Each takes the next free row, so that no thread waits for
another; of the last rows, as many as there are threads, the next free chunk, and the one to finish the last chunk of a
row goes on with what follows from all of them. A chunk's sums do not depend on who computed it, so results are the same
for any number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .sums import set_shifts, sum_chunk
from .vector import HAS_NEG_INF, OK, condition, extremes, fetch_add, jit, load, order_key, row_at

CHUNK = 2048
"""Tokens that a thread takes at a time."""
ROUNDING = 2e-7
"""Error of a KL by float32 terms, in nats, relative to 1 + α (|Λ'(α)| + |Λ'(0)|) + targets."""
NOISE = 3e-7
"""Targets up to this, in nats, are rounding: the expert is the base, and α = 0."""
SURE, VALUE, PLACE, ALL = range(4)
"""What float32 sums leave in doubt: nothing; the value of J; whether another pair is lower; all, for they cannot do."""
FOUND = np.dtype(
    [(name, np.int64) for name in ("expert", "grid", "doubt", "member", "fault")]
    + [(name, np.float64) for name in ("alpha", "objective", "kl_forward", "kl_reverse")]
    + [(name, np.float64) for name in ("target_forward", "target_reverse")]
)
"""What the search found; fault: what is wrong with the logits of `member`, else 0."""


@jit
def _heads(at: Any, n_vocab: int, keys: Any, heads: Any, codes: Any) -> None:
    """Of one row: what each member holds, into `codes` (2 + T,); where all is finite the constants of the sums, into
    `heads` (T, 10): maxima of large, base, expert; index of the mode; shifts of δ that are 0 at the mode; those for the
    targets."""
    n_members = at.size
    keys_of_tops = np.empty(n_members, np.int32)
    for member in range(n_members):
        highest = keys[member, :, 0].max()
        codes[member] = condition(highest, keys[member, :, 1].min())
        keys_of_tops[member] = order_key(highest)
    if codes.max() != OK:
        return
    tops = keys_of_tops.view(np.float32)
    large, base = row_at(at[0], n_vocab), row_at(at[1], n_vocab)
    mode = np.argmax(keys[0, :, 0]) * CHUNK
    while large[mode] < tops[0]:
        mode += 1
    for t in range(n_members - 2):
        expert, head = row_at(at[2 + t], n_vocab), heads[t]
        head[0], head[1], head[2], head[3] = tops[0], tops[1], tops[2 + t], mode
        set_shifts(base[mode], expert[mode], head[4:])
        set_shifts(head[1], head[2], head[7:])
        if abs(head[9] - head[6]) < 2.0 and head[4] == head[5] == head[7] == head[8] == 0.0:
            head[7:] = head[4:7]  # near enough to share


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
def describe(alpha: float, here: Any, start: Any, targets: Any, found: Any) -> None:
    """J and its parts into `found` (1,), from Λ, Λ' at α (`here`) and at 0 (`start`) and all targets (T, 2)."""
    forward, reverse = max(0.0, alpha * here[1] - here[0]), max(0.0, here[0] - alpha * start[1])
    objective = 0.0
    for t in range(targets.shape[0]):
        objective += (forward - targets[t, 0]) ** 2 + (reverse - targets[t, 1]) ** 2
    found[0]["alpha"], found[0]["objective"] = alpha, objective
    found[0]["kl_forward"], found[0]["kl_reverse"] = forward, reverse
    found[0]["target_forward"], found[0]["target_reverse"] = targets[:, 0].mean(), targets[:, 1].mean()


@jit
def _first_minimum(curves: Any, targets: Any, alphas: Any) -> Any:
    """The (expert, grid index) with the first strict minimum of J for one row, and what is in doubt of it."""
    n_experts, n_grid = curves.shape[0], curves.shape[1]
    if targets.max() <= NOISE:
        return 0, 0, SURE
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
    doubt = VALUE if errors[best_expert, best] > tolerance else SURE
    for t in range(n_experts):
        for k in range(n_grid):
            error = errors[t, k] + errors[best_expert, best]
            other = (t != best_expert or k != best) and (k > 0 or best > 0)
            if other and error > tolerance and objectives[t, k] - lowest < error:
                doubt = PLACE
    return best_expert, best, doubt


@jit
def choose(curves: Any, targets: Any, alphas: Any, found: Any) -> None:
    """The choice for one row into `found` (1,); curves (T, G, 3), targets (T, 2)."""
    expert, grid, doubt = _first_minimum(curves, targets, alphas)
    found[0]["expert"], found[0]["grid"], found[0]["doubt"] = expert, grid, doubt
    describe(alphas[grid], curves[expert, grid], curves[expert, 0], targets, found)


@jit
def _finish(codes: Any, sums: Any, heads: Any, alphas: Any, curves: Any, targets: Any, found: Any) -> Any:
    """Of one row: curves (T, G, 3), targets (T, 2), and the choice or what stands against it into `found` (1,). How
    many rows float32 cannot do."""
    found[0]["fault"], found[0]["doubt"] = 0, SURE
    for member in range(codes.size):
        if codes[member] > HAS_NEG_INF:
            found[0]["member"], found[0]["fault"] = member, codes[member]
            return 0
    for t in range(curves.shape[0]):
        if codes.max() != OK or not _curve(sums[t], heads[t], curves[t], targets[t]):
            found[0]["doubt"] = ALL
            return 1
    choose(curves, targets, alphas, found)
    return 0


@jit
def search_rows(
    at: Any, n_vocab: int, alphas: Any, keys: Any, heads: Any, codes: Any, sums: Any,
    curves: Any, targets: Any, found: Any, scratch: Any, progress: Any, sync: Any,
) -> None:  # fmt: skip
    """The choices of K rows, `found` (K,), with the curves (K, T, G, 3) and targets (K, T, 2) of T experts.

    at (K, 2 + T): addresses of the rows of large, base and experts. progress (2 K): zeros; chunks of each row read, and
    summed. sync: zeros; scratch handed out, tasks taken, rows done, rows in doubt of all.
    """
    n_rows, n_experts, n_chunks, n_threads = sums.shape[0], sums.shape[1], sums.shape[2], scratch.shape[0]
    n_whole, n_parts = (n_rows - 1) // n_threads * n_threads, n_chunks * (1 + n_experts)
    own = scratch[fetch_add(sync, 0, 1)]
    while True:
        task = fetch_add(sync, 1, 1)
        if task < n_whole:
            k, first, last = task, 0, n_parts
        elif task < n_whole + (n_rows - n_whole) * n_parts:
            k, first = n_whole + (task - n_whole) // n_parts, (task - n_whole) % n_parts
            last = first + 1
        else:
            break
        for part in range(first, last):
            t, chunk = part // n_chunks - 1, part % n_chunks
            start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, n_vocab)
            if t < 0:
                for member in range(2 + n_experts):
                    row = row_at(at[k, member] + 4 * start, stop - start)
                    extremes(row.view(np.int32), keys[k, member, chunk])
                if fetch_add(progress, 2 * k, 1) == n_chunks - 1:
                    _heads(at[k], n_vocab, keys[k], heads[k], codes[k])
                    fetch_add(progress, 2 * k, 1)
                continue
            while load(progress, 2 * k) <= n_chunks:  # others are reading the last chunks of this row
                pass
            if codes[k].max() == OK:
                sum_chunk(
                    row_at(at[k, 0] + 4 * start, stop - start), row_at(at[k, 1] + 4 * start, stop - start),
                    row_at(at[k, 2 + t] + 4 * start, stop - start), start, heads[k, t], alphas, own, sums[k, t, chunk],
                )  # fmt: skip
            if fetch_add(progress, 2 * k + 1, 1) == n_chunks * n_experts - 1:
                n_odd = _finish(codes[k], sums[k], heads[k], alphas, curves[k], targets[k], found[k : k + 1])
                fetch_add(sync, 3, n_odd)
                fetch_add(sync, 2, 1)
    while load(sync, 2) < n_rows:
        pass
