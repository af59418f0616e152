"""The search for (expert, α) of many rows: sums over chunks of the vocabulary, J on the grid, its first minimum.

Several threads may run `search_rows` on the same arguments. Each takes the next free row, so no thread waits for
another. The last rows, as many as there are threads, are shared by chunks; the thread that finishes the last chunk of
a row goes on with the steps that need all of them. A chunk's sums do not depend on the thread that computed them, so
the results are the same for any number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .sums import set_shifts, sum_chunk
from .vector import (
    HAS_NEG_INF,
    OK,
    extremes,
    fetch_add,
    first_largest,
    jit,
    kernel,
    load,
    order_key,
    row_at,
    row_condition,
)

CHUNK = 2048
"""Tokens that a thread takes at a time."""
ROUNDING = 2e-7
"""Error of a KL by float32 terms, in nats, relative to 1 + α (|Λ'(α)| + |Λ'(0)|) + the largest target."""
NOISE = 3e-7
"""Targets up to this many nats are rounding: the expert equals the base, and α = 0."""
NOTHING, OBJECTIVE, PAIR, ALL = range(4)
"""What has to be computed again in float64: nothing, J at the minimum, the minimum itself, or every sum."""
CHOICE = np.dtype(
    [(name, np.int64) for name in ("expert", "grid_index", "recompute", "member", "fault")]
    + [(name, np.float64) for name in ("alpha", "objective", "kl_forward", "kl_reverse")]
    + [(name, np.float64) for name in ("target_forward", "target_reverse")]
)
"""Result of one search. fault: the condition that makes the logits of `member` unusable, or 0."""


@jit
def _set_constants(addresses: Any, n_vocab: int, keys: Any, constants: Any, conditions: Any) -> None:
    """Set the conditions (2 + T,) of one row's members and, where all logits are finite, the constants of the sums.

    constants (T, 10): maxima of large, base, expert; index of the large model's most likely token, the mode; shifts by
    which δ is 0 at the mode, for the sums over P̃; shifts by which δ rounds least, for the targets.
    """
    n_members = addresses.size
    keys_of_tops = np.empty(n_members, np.int32)
    top_chunk, worst = 0, OK
    for member in range(n_members):
        highest, lowest = keys[member, 0, 0], keys[member, 0, 1]
        for chunk in range(keys.shape[1]):
            if member == 0 and keys[0, chunk, 0] > highest:
                top_chunk = chunk
            highest, lowest = max(highest, keys[member, chunk, 0]), min(lowest, keys[member, chunk, 1])
        conditions[member] = row_condition(highest, lowest)
        keys_of_tops[member] = order_key(highest)
        worst = max(worst, conditions[member])
    if worst != OK:
        return
    tops = keys_of_tops.view(np.float32)
    large, base = row_at(addresses[0], n_vocab), row_at(addresses[1], n_vocab)
    mode = top_chunk * CHUNK
    while large[mode] < tops[0]:
        mode += 1
    for t in range(n_members - 2):
        expert, c = row_at(addresses[2 + t], n_vocab), constants[t]
        c[0], c[1], c[2], c[3] = tops[0], tops[1], tops[2 + t], mode
        set_shifts(base[mode], expert[mode], c[4:])
        set_shifts(c[1], c[2], c[7:])
        if abs(c[9] - c[6]) < 2.0 and c[4] == 0.0 and c[5] == 0.0 and c[7] == 0.0 and c[8] == 0.0:
            c[9] = c[6]  # near enough to share


@jit
def _set_cumulants(sums: Any, constants: Any, cumulants: Any, targets: Any) -> Any:
    """Λ, Λ', Λ'' of one expert into cumulants (G, 3), and a, b into targets (2,). Returns False if they are unusable.

    Λ and Λ' are those of δ, which differs from d by a constant. Λ'' is set only where G ≤ 2.
    """
    n_grid = cumulants.shape[0]
    total = np.zeros((n_grid + 3, 3))
    for chunk in range(sums.shape[0]):
        for k in range(n_grid + 3):
            for i in range(3):
                total[k, i] += sums[chunk, k, i]
    size = 0.0
    for k in range(n_grid):
        cumulants[k, 0] = math.log(total[k, 0] / total[0, 0])
        cumulants[k, 1] = total[k, 1] / total[k, 0]
        cumulants[k, 2] = total[k, 2] / total[k, 0] - cumulants[k, 1] ** 2
        size += cumulants[k, 0] + cumulants[k, 1]
    base_sum, expert_sum, c = total[n_grid, 0], total[n_grid + 1, 0], constants
    gap = c[2] - c[8] - (c[1] - c[7]) - c[9] + math.log(expert_sum / base_sum)  # δ − d
    targets[0] = max(0.0, total[n_grid + 1, 1] / expert_sum - gap)
    targets[1] = max(0.0, gap - total[n_grid, 1] / base_sum)
    return math.isfinite(size + targets[0] + targets[1]) and total[n_grid + 2, 0] == 0.0


@kernel
def describe(alpha: float, here: Any, start: Any, targets: Any, choice: Any) -> None:
    """Set J(α) = Σ_t [(KL(P̃‖P) − a_t)² + (KL(P‖P̃) − b_t)²] and its parts in choice (1,).

    here, start: Λ, Λ' at α and at 0
    targets: a_t, b_t of every expert, (T, 2)
    """
    forward, reverse = max(0.0, alpha * here[1] - here[0]), max(0.0, here[0] - alpha * start[1])
    objective = forward_sum = reverse_sum = 0.0
    for t in range(targets.shape[0]):
        objective += (forward - targets[t, 0]) ** 2 + (reverse - targets[t, 1]) ** 2
        forward_sum += targets[t, 0]
        reverse_sum += targets[t, 1]
    choice[0]["alpha"], choice[0]["objective"] = alpha, objective
    choice[0]["kl_forward"], choice[0]["kl_reverse"] = forward, reverse
    choice[0]["target_forward"] = forward_sum / targets.shape[0]
    choice[0]["target_reverse"] = reverse_sum / targets.shape[0]


@jit
def _first_minimum(cumulants: Any, targets: Any, alphas: Any) -> Any:
    """The expert and the grid index of the first strict minimum of J for one row, and what float32 leaves open."""
    n_experts, n_grid = cumulants.shape[0], cumulants.shape[1]
    largest = forward_mean = reverse_mean = spread = 0.0
    for t in range(n_experts):
        largest = max(largest, targets[t, 0], targets[t, 1])
        forward_mean += targets[t, 0]
        reverse_mean += targets[t, 1]
    if largest <= NOISE:
        return 0, 0, NOTHING
    forward_mean, reverse_mean = forward_mean / n_experts, reverse_mean / n_experts
    for t in range(n_experts):
        spread += (targets[t, 0] - forward_mean) ** 2 + (targets[t, 1] - reverse_mean) ** 2
    objectives, errors = np.empty((n_experts, n_grid)), np.empty((n_experts, n_grid))
    best_expert, best = 0, 0
    for t in range(n_experts):
        for k in range(n_grid):
            forward = max(0.0, alphas[k] * cumulants[t, k, 1] - cumulants[t, k, 0])
            reverse = max(0.0, cumulants[t, k, 0] - alphas[k] * cumulants[t, 0, 1])
            x, y = forward - forward_mean, reverse - reverse_mean
            objectives[t, k] = n_experts * (x * x + y * y) + spread
            size = 1.0 + alphas[k] * (abs(cumulants[t, k, 1]) + abs(cumulants[t, 0, 1])) + largest
            errors[t, k] = 2 * n_experts * (abs(x) + abs(y)) * ROUNDING * size
            if objectives[t, k] < objectives[best_expert, best]:
                best_expert, best = t, k
    lowest = objectives[best_expert, best]
    tolerance = 1e-4 * lowest + 1e-9
    recompute = OBJECTIVE if errors[best_expert, best] > tolerance else NOTHING
    for t in range(n_experts):
        for k in range(n_grid):
            error = errors[t, k] + errors[best_expert, best]
            is_other = (t != best_expert or k != best) and (k > 0 or best > 0)
            if is_other and error > tolerance and objectives[t, k] - lowest < error:
                recompute = PAIR
    return best_expert, best, recompute


@kernel
def choose(cumulants: Any, targets: Any, alphas: Any, choice: Any) -> None:
    """Set choice (1,) for one row, from cumulants (T, G, 3) and targets (T, 2)."""
    expert, k, recompute = _first_minimum(cumulants, targets, alphas)
    choice[0]["expert"], choice[0]["grid_index"], choice[0]["recompute"] = expert, k, recompute
    describe(alphas[k], cumulants[expert, k], cumulants[expert, 0], targets, choice)


@jit
def _finish_row(
    conditions: Any, sums: Any, constants: Any, alphas: Any, cumulants: Any, targets: Any, choice: Any
) -> Any:
    """Set cumulants, targets and choice (1,) of one row from its sums. Returns 1 where float32 cannot, else 0."""
    choice[0]["fault"], choice[0]["recompute"] = 0, NOTHING
    for member in range(conditions.size):
        if conditions[member] > HAS_NEG_INF:
            choice[0]["member"], choice[0]["fault"] = member, conditions[member]
            return 0
    is_usable = conditions[first_largest(conditions)] == OK
    for t in range(cumulants.shape[0]):
        if not is_usable or not _set_cumulants(sums[t], constants[t], cumulants[t], targets[t]):
            choice[0]["recompute"] = ALL
            return 1
    choose(cumulants, targets, alphas, choice)
    return 0


@kernel
def search_rows(
    addresses: Any, n_vocab: int, alphas: Any, keys: Any, constants: Any, conditions: Any, sums: Any,
    cumulants: Any, targets: Any, choices: Any, scratch: Any, progress: Any, counters: Any,
) -> None:  # fmt: skip
    """Search α for K rows: set choices (K,), cumulants (K, T, G, 3) and targets (K, T, 2).

    addresses: of the rows of large, base and experts, (K, 2 + T)
    keys, constants, conditions, sums: scratch, see `AlphaSearch`
    scratch: float32 (threads, 3, BLOCK)
    progress: zeros (2 K): chunks of each row whose maxima are known, and chunks that are summed
    counters: zeros: threads that have begun, tasks taken, rows done, rows that float32 cannot do
    """
    n_rows, n_experts, n_chunks, n_threads = sums.shape[0], sums.shape[1], sums.shape[2], scratch.shape[0]
    n_whole, n_parts = (n_rows - 1) // n_threads * n_threads, n_chunks * (1 + n_experts)
    own = scratch[fetch_add(counters, 0, 1)]
    while True:
        task = fetch_add(counters, 1, 1)
        if task < n_whole:
            k, first, last = task, 0, n_parts
        elif task < n_whole + (n_rows - n_whole) * n_parts:
            k, first = n_whole + (task - n_whole) // n_parts, (task - n_whole) % n_parts
            last = first + 1
        else:
            break
        row = addresses[k]
        for part in range(first, last):
            t, chunk = part // n_chunks - 1, part % n_chunks
            start, size = chunk * CHUNK, min(CHUNK, n_vocab - chunk * CHUNK)
            if t < 0:
                for member in range(2 + n_experts):
                    extremes(row_at(row[member] + 4 * start, size).view(np.int32), keys[k, member, chunk])
                if fetch_add(progress, 2 * k, 1) == n_chunks - 1:
                    _set_constants(row, n_vocab, keys[k], constants[k], conditions[k])
                    fetch_add(progress, 2 * k, 1)
                continue
            while load(progress, 2 * k) <= n_chunks:  # other threads read the last chunks of this row
                pass
            if conditions[k, first_largest(conditions[k])] == OK:
                sum_chunk(
                    row_at(row[0] + 4 * start, size), row_at(row[1] + 4 * start, size),
                    row_at(row[2 + t] + 4 * start, size), start, constants[k, t], alphas, own, sums[k, t, chunk],
                )  # fmt: skip
            if fetch_add(progress, 2 * k + 1, 1) == n_chunks * n_experts - 1:
                choice = choices[k : k + 1]
                n_failed = _finish_row(conditions[k], sums[k], constants[k], alphas, cumulants[k], targets[k], choice)
                fetch_add(counters, 3, n_failed)
                fetch_add(counters, 2, 1)
    while load(counters, 2) < n_rows:
        pass
