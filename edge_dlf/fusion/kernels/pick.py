"""Choosing a token from each fused row: penalties, top-k, top-p, min-p, temperature, draw.

A candidate is an int64: the inverted `order_key` of its logit in the high half, its token id in the low half. So in
ascending order the best candidates come first, and the lower id wins a tie.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .fuse import GROUP, LARGEST_FLOAT, fuse_float64, fuse_groups, log_sum, measure_group
from .vector import F32, F64, exp64, fetch_add, first_largest, jit, kernel, load, order_key, row_at, use_wide_vectors

LEAST_TOP_P = 1e-30
"""Stands for top_p = 0, which keeps one token."""
GROUPS = 4
"""Groups that a thread takes at a time from a row that several threads share."""
SCAN = 64
"""Tokens that are compared with the threshold at once while candidates are gathered."""
FEW = 24
"""So few candidates are sorted rather than partitioned further."""
LARGEST_TOKEN = np.int64(0x7FFFFFFF)
"""The bits of a candidate that hold its token id."""
NEG_ZERO = np.int32(-0x80000000)
"""The bits of −0.0 in float32."""
DRAW = np.dtype(
    [
        (name, np.float64)
        for name in ("temperature", "top_p", "min_p", "repeat", "frequency", "presence", "plausibility")
    ]
    + [(name, np.int64) for name in ("top_k", "n_top", "recent", "n_recent", "bias", "n_bias", "scored")]
    + [(name, np.uint64) for name in ("seed", "position")]
)
"""Settings for one row. recent, bias: where its tokens start in the lists of all rows. scored: the token that is given
rather than chosen, or −1."""
PICK = np.dtype(
    [("token", np.int64), ("logprob", np.float64), ("member", np.int64), ("fault", np.int64), ("n_top", np.int64)]
)
"""A chosen token, −1 where every token is banned. fault: the condition that makes `member`'s logits unusable, or 0."""


@jit
def _candidate(bits: Any, token: Any) -> Any:
    key = ~order_key(bits) if bits != NEG_ZERO else np.int32(-1)  # −0.0 ties with 0.0
    return (np.int64(key) << np.int64(32)) | np.int64(token)


@jit
def candidate_token(candidate: Any) -> Any:
    return candidate & LARGEST_TOKEN


@jit
def _any_from(row: Any, threshold: Any) -> Any:
    found = np.int32(0)
    for i in range(row.size):
        found |= np.int32(row[i] >= threshold)
    return found


@jit
def _gather(fused: Any, maxima: Any, threshold: Any, out: Any) -> Any:
    """Write the candidates with a logit of at least `threshold` to `out`, by id. Returns their number."""
    bits = fused.view(np.int32)
    n = 0
    for group in range(maxima.size):
        if maxima[group] >= threshold:
            end = min(group * GROUP + GROUP, fused.size)
            for start in range(group * GROUP, end, SCAN):
                stop = min(start + SCAN, end)
                if _any_from(fused[start:stop], threshold):
                    for token in range(start, stop):
                        if fused[token] >= threshold:
                            out[n] = _candidate(bits[token], token)
                            n += 1
    return n


@jit
def _weight(fused: Any, candidate: Any, top: float) -> Any:
    return exp64(F64(fused[candidate_token(candidate)]) - top)


@jit
def _weights(fused: Any, candidates: Any, top: float) -> Any:
    total = 0.0
    for candidate in candidates:
        total += _weight(fused, candidate, top)
    return total


@jit
def _keep_best(candidates: Any, wanted: float, by_weight: Any, fused: Any, top: float) -> Any:
    """Move the best candidates to the front. Returns their number.

    wanted: the number of candidates; with `by_weight`, the sum of exp(logit − top) that they must reach
    """
    low, high = 0, candidates.size
    while high - low > FEW:
        a, b, c = candidates[low], candidates[(low + high) // 2], candidates[high - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        total = 0.0
        middle = low
        for i in range(low, high):
            candidate = candidates[i]
            if candidate <= pivot:
                candidates[i] = candidates[middle]
                candidates[middle] = candidate
                middle += 1
                total += _weight(fused, candidate, top) if by_weight else 1.0
        if total >= wanted:
            high = middle
        else:
            low = middle
            wanted -= total
    for i in range(low + 1, high):
        candidate, j = candidates[i], i
        while j > low and candidates[j - 1] > candidate:
            candidates[j] = candidates[j - 1]
            j -= 1
        candidates[j] = candidate
    while low < high and wanted > 0.0:
        wanted -= _weight(fused, candidates[low], top) if by_weight else 1.0
        low += 1
    return low


@jit
def best_candidates(fused: Any, maxima: Any, n: int, out: Any) -> Any:
    """Write the n best candidates above −inf, or all if they are fewer, to `out` in any order. Returns their number."""
    n = min(n, fused.size)
    bits = maxima.view(np.int32)
    for group in range(maxima.size):
        out[group] = _candidate(bits[group], group)
    best = out[: _keep_best(out[: maxima.size], F64(n), np.bool_(False), fused, 0.0)]
    threshold = max(maxima[candidate_token(best[first_largest(best)])], F32(-LARGEST_FLOAT))
    step = F32(1)
    n_found = _gather(fused, maxima, threshold, out)
    while n_found < n and threshold > -LARGEST_FLOAT:
        threshold = max(threshold - step, F32(-LARGEST_FLOAT)) if step < 100 else F32(-LARGEST_FLOAT)
        step *= F32(2)
        n_found = _gather(fused, maxima, threshold, out)
    return _keep_best(out[:n_found], F64(n), np.bool_(False), fused, 0.0)


@jit
def _kept(draw: Any, fused: Any, maxima: Any, masses: Any, out: Any) -> Any:
    """Write the candidates that pass top-k, top-p and min-p to `out`. Returns their number."""
    top, top_p = F64(maxima[first_largest(maxima)]), max(draw["top_p"], LEAST_TOP_P)
    cut = F32(top + math.log(draw["min_p"])) if draw["min_p"] > 0.0 else F32(-LARGEST_FLOAT)
    wanted = top_p * math.exp(log_sum(maxima, masses) - top)
    if draw["top_k"] > 0:
        n = best_candidates(fused, maxima, draw["top_k"], out)
        if top_p < 1.0:
            wanted = top_p * _weights(fused, out[:n], top)
    elif top_p == 1.0 or draw["min_p"] > 0.0:
        n = _gather(fused, maxima, cut, out)
    else:
        span = 3.0
        n = _gather(fused, maxima, F32(top - span), out)
        while _weights(fused, out[:n], top) < wanted and span < 100.0:
            span *= 2.0
            n = _gather(fused, maxima, F32(top - span) if span < 100.0 else F32(-LARGEST_FLOAT), out)
    if top_p < 1.0:
        n = _keep_best(out[:n], wanted, np.bool_(True), fused, top)
    n_kept = 0
    for i in range(n):
        if fused[candidate_token(out[i])] >= cut:
            out[n_kept] = out[i]
            n_kept += 1
    return n_kept


@jit
def mix(x: Any) -> Any:
    """The finaliser of splitmix64, over uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def draw_token(fused: Any, candidates: Any, top: float, temperature: float, seed: Any, position: Any) -> Any:
    """Draw the candidate with the largest (logit − top) / temperature + Gumbel noise keyed by (seed, position, token).

    The argmax of such a sum is a draw from softmax(logits / temperature).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = mix(mix(seed + golden) + position * golden)
    best, best_score = np.int64(-1), -math.inf
    for candidate in candidates:
        token = candidate_token(candidate)
        logit = (F64(fused[token]) - top) / temperature
        if logit + 37.5 < best_score:  # beyond the largest noise of 53 bits
            continue
        noise = mix(state + (np.uint64(token) + np.uint64(1)) * golden) >> np.uint64(11)
        uniform = (F64(noise) + 0.5) * 2.0**-53
        y = best_score - logit
        # −log u > 1 − u and exp(y) > its first terms, so that this rules out logit − log(−log u) > best without a log
        if y > 0.0 and (1.0 - uniform) * (1.0 + y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24))))) >= 1.0:
            continue
        score = logit - math.log(-math.log(uniform))
        if score > best_score:
            best, best_score = token, score
    return best


@jit
def _penalised(draw: Any, recent: Any, bias_tokens: Any, biases: Any, fused: Any, tokens: Any, logits: Any) -> Any:
    """Write the tokens that penalties and logit_bias change, and their new logits, as llama.cpp computes them.

    Returns their number.

    recent, bias_tokens: ascending
    tokens, logits: as long as both together
    """
    n = i = j = 0
    while i < recent.size or j < bias_tokens.size:
        token = recent[i] if i < recent.size else bias_tokens[j]
        if j < bias_tokens.size:
            token = min(token, bias_tokens[j])
        count = 0
        while i < recent.size and recent[i] == token:
            count += 1
            i += 1
        bias = 0.0
        if j < bias_tokens.size and bias_tokens[j] == token:
            bias = biases[j]
            j += 1
        if not 0 <= token < fused.size:  # a prompt may hold tokens beyond those that all members share
            continue
        logit = F64(fused[token])
        if count > 0:
            logit = logit * draw["repeat"] if logit <= 0.0 else logit / draw["repeat"]
            logit = logit - count * draw["frequency"] - draw["presence"]
        tokens[n], logits[n] = token, logit + bias
        n += 1
    return n


@jit
def _change(fused: Any, tokens: Any, logits: Any, maxima: Any, masses: Any) -> None:
    """Swap `logits` with those of `tokens`, which ascend, and measure the groups of these tokens anew."""
    keys = np.empty(2, np.int32)
    for i in range(tokens.size):
        before = fused[tokens[i]]
        fused[tokens[i]] = F32(min(logits[i], LARGEST_FLOAT))
        logits[i] = before
    for i in range(tokens.size):
        group = tokens[i] // GROUP
        if i == tokens.size - 1 or tokens[i + 1] // GROUP != group:
            measure_group(fused, group, maxima, masses, keys)


@jit
def _mark(row: Any, threshold: Any, marks: Any) -> None:
    """Set marks (V,) where the row reaches the threshold."""
    use_wide_vectors()
    for i in range(row.size):
        marks[i] |= np.int64(row[i] >= threshold)


@jit
def _keep_plausible(
    addresses: Any, terms: Any, weights: Any, plausibility: float, fused: Any, maxima: Any, masses: Any, marks: Any
) -> None:
    """Set to −inf the tokens that no expert with a positive weight finds plausible, unless none would be left.

    A token is plausible for an expert that gives it at least `plausibility` times the probability of its best token.
    marks: int64 scratch (V,)
    """
    marks[:] = 0
    n_weighted = 0
    for n in range(weights.size):
        if weights[n] > 0.0 and terms[n, 2] != 0:
            row = row_at(addresses[terms[n, 0]], fused.size)
            _mark(row, F32(F64(row[first_largest(row)]) + math.log(plausibility)), marks)
            n_weighted += 1
    n_left = 0
    for token in range(fused.size):
        n_left += marks[token] != 0 and fused[token] > -math.inf
    if n_weighted == 0 or n_left == 0:
        return
    for token in range(fused.size):
        if marks[token] == 0:
            fused[token] = -math.inf
    keys = np.empty(2, np.int32)
    for group in range(maxima.size):
        measure_group(fused, group, maxima, masses, keys)


@jit
def _pick(
    draw: Any, addresses: Any, terms: Any, weights: Any, recent: Any, bias_tokens: Any, biases: Any, fused: Any,
    maxima: Any, masses: Any, candidates: Any, pick: Any, top_candidates: Any, top_logprobs: Any,
) -> None:  # fmt: skip
    """Choose a token from one fused row, which is overwritten. Logprobs are those before penalties and filters."""
    total = log_sum(maxima, masses)
    if draw["n_top"] > 0:
        n = best_candidates(fused, maxima, draw["n_top"], candidates)
        for i in range(n):
            top_candidates[i] = candidates[i]
            top_logprobs[i] = F64(fused[candidate_token(candidates[i])]) - total
        pick["n_top"] = n
    if draw["scored"] >= 0:
        pick["token"] = draw["scored"]
        pick["logprob"] = F64(fused[draw["scored"]]) - total
        return
    if draw["plausibility"] > 0.0:
        _keep_plausible(addresses, terms, weights, draw["plausibility"], fused, maxima, masses, candidates)
    tokens, logits = np.empty(recent.size + biases.size, np.int64), np.empty(recent.size + biases.size, np.float64)
    n = _penalised(draw, recent, bias_tokens, biases, fused, tokens, logits)
    if n > 0:
        _change(fused, tokens[:n], logits[:n], maxima, masses)
    group = first_largest(maxima)
    top = maxima[group]
    if top == -math.inf:
        pick["token"] = -1
        return
    if draw["temperature"] == 0.0:
        token = group * GROUP
        while fused[token] != top:
            token += 1
    else:
        n_kept = _kept(draw, fused, maxima, masses, candidates)
        key = draw["seed"], draw["position"]
        token = draw_token(fused, candidates[:n_kept], F64(top), draw["temperature"], key[0], key[1])
    logit = F64(fused[token])
    for i in range(n):
        if tokens[i] == token:
            logit = logits[i]
    pick["token"] = token
    pick["logprob"] = logit - total


@kernel
def pick_rows(
    addresses: Any, terms: Any, weights: Any, draws: Any, recent: Any, bias_tokens: Any, biases: Any,
    fused: Any, maxima: Any, masses: Any, candidates: Any, picks: Any, top_candidates: Any, top_logprobs: Any,
    progress: Any, counters: Any,
) -> None:  # fmt: skip
    """Fuse each of K rows, choose a token into picks (K,), and list the likeliest candidates (K, n_top), unsorted.

    Threads share the rows as in `search_rows`.

    addresses: of the members' rows, (K, M)
    terms, weights: what is summed, (N, 3), and with which weights, (K, N); see `fuse`
    fused, maxima, masses: (2 · threads, …): first each thread's own row, then the last rows, which all threads share
    candidates: int64 scratch (threads, V)
    progress: zeros (2 K): the groups of each row that are fused, and those that are not all finite
    counters: zeros: threads that have begun, tasks taken, rows done
    """
    n_rows, n_groups, n_threads = addresses.shape[0], maxima.shape[1], candidates.shape[0]
    n_chunks = (n_groups + GROUPS - 1) // GROUPS
    n_whole = (n_rows - 1) // n_threads * n_threads
    own, keys = fetch_add(counters, 0, 1), np.empty(2, np.int32)
    while True:
        task = fetch_add(counters, 1, 1)
        if task < n_whole:
            k, first, last, slot = task, 0, n_groups, own
        elif task < n_whole + (n_rows - n_whole) * n_chunks:
            k, first = n_whole + (task - n_whole) // n_chunks, (task - n_whole) % n_chunks * GROUPS
            last, slot = min(first + GROUPS, n_groups), n_threads + k - n_whole
        else:
            break
        row, row_maxima, row_masses = fused[slot], maxima[slot], masses[slot]
        n_unusual = fuse_groups(addresses[k], terms, weights[k], first, last, row, row_maxima, row_masses)
        fetch_add(progress, 2 * k + 1, n_unusual)
        if fetch_add(progress, 2 * k, last - first) + last - first < n_groups:
            continue
        draw, fault = draws[k], np.zeros(2, np.int64)
        if load(progress, 2 * k + 1):
            fuse_float64(addresses[k], terms, weights[k], row, candidates[own].view(np.float64), fault)
            for group in range(n_groups):
                measure_group(row, group, row_maxima, row_masses, keys)
        picks[k]["member"], picks[k]["fault"] = fault[0], fault[1]
        if fault[1] == 0:
            start, bias = draw["recent"], draw["bias"]
            _pick(
                draw, addresses[k], terms, weights[k], recent[start : start + draw["n_recent"]],
                bias_tokens[bias : bias + draw["n_bias"]], biases[bias : bias + draw["n_bias"]], row,
                row_maxima, row_masses, candidates[own], picks[k], top_candidates[k], top_logprobs[k],
            )  # fmt: skip
        fetch_add(counters, 2, 1)
    while load(counters, 2) < n_rows:
        pass
