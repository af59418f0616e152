"""Every compiled kernel: arrays in, arrays out, no policy.

For one expert P̃(α) ∝ P·exp(α d) is an exponential family in α, so one pass over the vocabulary gives every grid value.
With l = log P + const and δ = d + const, both constants chosen so that the large model's first most likely token (the
mode) has l = δ = 0, and w_α = exp(l + α δ), S0 = Σ w_α, S1 = Σ w_α δ:

    Λ(α) = log(S0(α) / S0(0))      KL(P̃‖P) = α S1(α)/S0(α) − Λ(α)      KL(P‖P̃) = Λ(α) − α S1(0)/S0(0)

The constants cancel in both. The mode's weight is exactly 1 at every α, so that no sum underflows and float32 terms
suffice; it is added in float64. Terms are summed in float32 within a block and in float64 across blocks.

Several threads may run `search_rows`, `fuse_row` on the same arguments: each takes the next free chunk of the row
until none is left. A chunk's sums do not depend on who computed it, so results are the same for any number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

BLOCK = 1024
"""Tokens per pass over the scratch; its three float32 arrays fit a first-level cache."""
CHUNK = 4096
"""Tokens that a thread takes at a time."""
GROUP = 512
"""Tokens per maximum kept for a fused row."""
CHAIN = 30
"""Grid points reached by multiplication before the weights are computed afresh."""
ROUNDING = 1.5e-7
"""Error of a KL by float32 terms, in nats, relative to 1 + α (|Λ'(α)| + |Λ'(0)|) + targets."""
LOWEST, HIGHEST = np.float32(-80.0), np.float32(80.0)
"""Exponents between which float32 weights neither underflow nor overflow."""
KEY_INF, KEY_NEG_INF = 0x7F800000, -0x7F800001
"""`_key` of +inf and −inf; NaNs lie outside of these."""
POLYNOMIAL = (0.0013813144760206342, 0.008369418792426586, 0.04166845604777336, 0.16666515171527863, 0.4999999403953552)
"""Of (exp(r) − 1 − r) / r² for |r| ≤ ln(2) / 2, highest power first; least largest relative error of exp, 5e-9."""
POLYNOMIAL_64 = tuple(1.0 / math.factorial(k) for k in range(13, 1, -1))
"""The same by Taylor, for float64."""
OK, HAS_NEG_INF, HAS_NAN, HAS_INF, NONE_FINITE = range(5)
"""What a row of logits holds; the last three are errors."""

_F32, _F64 = np.float32, np.float64
_jit: Any = njit(cache=True, nogil=True, error_model="numpy")
_jit_sum: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def _prefer_wide_vectors(function: Any) -> None:
    """Let LLVM use 512-bit vectors where the CPU has them; by itself it stops at 256. A third faster here."""
    if isinstance(function.attributes, set):
        set.add(function.attributes, '"prefer-vector-width"="512"')  # its own `add` knows no such string attributes


def _exponential(bits: int, minus_one: bool) -> Any:
    """exp(x), or exp(x) − 1, in float32 or float64, as IR that the loop vectoriser takes; x is clamped from below."""
    mantissa, lowest, polynomial = (23, -87.0, POLYNOMIAL) if bits == 32 else (52, -708.0, POLYNOMIAL_64)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _prefer_wide_vectors(builder.function)
        real, integer = ir.FloatType() if bits == 32 else ir.DoubleType(), ir.IntType(bits)
        muladd = builder.module.declare_intrinsic("llvm.fmuladd", [real], ir.FunctionType(real, [real] * 3))

        def constant(value: float) -> Any:
            return ir.Constant(real, float(np.float32(value)) if bits == 32 else value)

        x = builder.select(builder.fcmp_ordered(">", args[0], constant(lowest)), args[0], constant(lowest))
        # Adding 1.5·2²³ (2⁵²) rounds x·log2(e) to an integer n, which then stands in the low bits of the sum.
        shifted = builder.call(muladd, [x, constant(1.4426950408889634), constant(1.5 * 2.0**mantissa)])
        n = builder.fsub(shifted, constant(1.5 * 2.0**mantissa))
        r = builder.call(muladd, [n, constant(-0.6931471805599453), x])
        exponent = builder.shl(builder.bitcast(shifted, integer), ir.Constant(integer, mantissa))
        one = ir.Constant(integer, (2 ** (bits - mantissa - 2) - 1) << mantissa)
        scale = builder.bitcast(builder.add(exponent, one), real)
        p = constant(polynomial[0])
        for coefficient in polynomial[1:]:
            p = builder.call(muladd, [p, r, constant(coefficient)])
        p = builder.call(muladd, [builder.fmul(p, r), r, r])
        offset = builder.fsub(scale, constant(1.0)) if minus_one else scale
        return builder.call(muladd, [scale, p, offset])

    kind = types.float32 if bits == 32 else types.float64
    return lambda _typing, _x: (kind(kind), generate)


def _wide_typing(_typing: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        _prefer_wide_vectors(builder.function)
        return context.get_dummy_value()

    return types.none(), generate


def _fetch_add_typing(_typing: Any, array: Any, index: Any, step: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.gep(data, [args[1]])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


if config.DISABLE_JIT:

    def _exp(x: Any) -> Any:
        return _F32(np.exp(_F64(max(x, -87.0))))

    def _exp64(x: Any) -> Any:
        return np.exp(max(x, -708.0))

    def _expm1(x: Any) -> Any:
        return _F32(np.expm1(_F64(max(x, -87.0))))

    def _wide() -> None:
        pass

    def _fetch_add(array: Any, index: int, step: int) -> int:
        array[index] += step
        return int(array[index] - step)

else:
    _exp = intrinsic(_exponential(32, minus_one=False))
    _exp64 = intrinsic(_exponential(64, minus_one=False))
    _expm1 = intrinsic(_exponential(32, minus_one=True))
    _wide = intrinsic(_wide_typing)
    _fetch_add = intrinsic(_fetch_add_typing)


@_jit
def _key(bits: Any) -> Any:
    """The bits of a float32 as an integer of the same order; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@_jit
def _extremes(bits: Any, out: Any) -> None:
    """Largest and smallest `_key` of a row given as int32 bits. Integers, because these reductions vectorise."""
    _wide()
    high = np.int32(-0x80000000)
    low = np.int32(0x7FFFFFFF)
    for i in range(bits.size):
        key = _key(bits[i])
        high = max(high, key)
        low = min(low, key)
    out[0] = high
    out[1] = low


@_jit
def _condition(high: Any, low: Any) -> Any:
    """What a row holds, by its extreme keys."""
    if high > KEY_INF or low < KEY_NEG_INF:
        return HAS_NAN
    if high == KEY_INF:
        return HAS_INF
    if high == KEY_NEG_INF:
        return NONE_FINITE
    return HAS_NEG_INF if low == KEY_NEG_INF else OK


@_jit
def _deltas(base: Any, expert: Any, head: Any, delta: Any) -> None:
    _wide()
    base_shift, expert_shift, offset = _F32(head[3]), _F32(head[4]), _F32(head[5])
    for i in range(base.size):
        delta[i] = ((expert[i] - expert_shift) - (base[i] - base_shift)) - offset


@_jit
def _weights(large: Any, head: Any, alpha: Any, delta: Any, w: Any) -> None:
    top, factor = _F32(head[0]), _F32(alpha)
    for i in range(large.size):
        w[i] = _exp((large[i] - top) + factor * delta[i])


@_jit
def _out_of_range(large: Any, head: Any, alpha: Any, delta: Any) -> Any:
    """How many tokens have an exponent too low, and too high or NaN, for a chain of float32 weights up to `alpha`."""
    _wide()
    top, factor = _F32(head[0]), _F32(alpha)
    low = np.int32(0)
    high = np.int32(0)
    for i in range(large.size):
        start = large[i] - top
        end = start + factor * delta[i]
        low += np.int32((start < LOWEST) | (end < LOWEST))
        high += np.int32(not (end < HIGHEST))
    return low, high


@_jit
def _steps(step: Any, delta: Any, u: Any) -> None:
    factor = _F32(step)
    for i in range(u.size):
        u[i] = _expm1(factor * delta[i])


@_jit_sum
def _sum_softmax(row: Any, top: Any, delta: Any, out: Any, k: int) -> None:
    """Add Σ exp(row − top) and Σ exp(row − top)·δ to out[k]."""
    shift = _F32(top)
    s = _F32(0)
    t = _F32(0)
    for i in range(row.size):
        w = _exp(row[i] - shift)
        s += w
        t += w * delta[i]
    out[k, 0] += s
    out[k, 1] += t


@_jit_sum
def _sum_weights(w: Any, delta: Any, out: Any, k: int) -> None:
    """Add Σ w, Σ w δ and Σ w δ² to out[k]."""
    _wide()
    s = _F32(0)
    t = _F32(0)
    v = _F32(0)
    for i in range(w.size):
        s += w[i]
        t += w[i] * delta[i]
        v += w[i] * delta[i] * delta[i]
    out[k, 0] += s
    out[k, 1] += t
    out[k, 2] += v


@_jit_sum
def _sum_five(w: Any, u: Any, delta: Any, out: Any, k: int) -> None:
    """Advance the weights by five grid points, w += w·u each, and add Σ w and Σ w δ of each to out[k], out[k + 1], …"""
    _wide()
    s0 = s1 = s2 = s3 = s4 = _F32(0)
    t0 = t1 = t2 = t3 = t4 = _F32(0)
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


@_jit
def _sum_chunk(large: Any, base: Any, expert: Any, start: int, head: Any, alphas: Any, scratch: Any, out: Any) -> None:
    """Sums of one chunk, whose first token is `start`: out[k] = Σ w, Σ w δ at alphas[k]; after these Σ, Σ δ of base, of expert.

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
        l, b, e = large[first:stop], base[first:stop], expert[first:stop]
        mode = int(head[6]) - start - first
        _deltas(b, e, head, delta)
        _sum_softmax(b, head[1], delta, out, n_grid)
        _sum_softmax(e, head[2], delta, out, n_grid + 1)
        low, high = _out_of_range(l, head, alphas[n_grid - 1], delta)
        out[n_grid + 2, 0] += high
        if not low:
            _steps(alphas[1] - alphas[0], delta, u)
        k = 0
        while k < n_grid:
            if low or k % CHAIN == 0:
                _weights(l, head, alphas[k], delta, w)
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


@_jit
def _head(large: Any, base: Any, expert: Any, keys: Any, head: Any, codes: Any) -> None:
    """Of one row: what each member holds, into `codes` (3,); the constants of its sums, into `head` (7,):
    maxima of large, base, expert; shifts of base and expert, offset of δ, index of the mode."""
    tops = np.empty(3, np.int32)
    for member in range(3):
        codes[member] = _condition(keys[member, :, 0].max(), keys[member, :, 1].min())
        tops[member] = _key(keys[member, :, 0].max())
    head[:3] = tops.view(np.float32)
    if codes.max() != OK:
        return
    chunk = np.argmax(keys[0, :, 0])
    mode = chunk * CHUNK
    while large[mode] < head[0]:
        mode += 1
    head[6] = mode
    difference = _F64(expert[mode]) - _F64(base[mode])
    if abs(difference) < 16.0:  # then expert − base rounds least; else the members' scales differ
        head[3], head[4], head[5] = 0.0, 0.0, _F32(difference)
    else:
        head[3], head[4], head[5] = base[mode], expert[mode], 0.0


@_jit
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
    gap = head[2] + math.log(expert_sum) - head[4] - (head[1] + math.log(base_sum) - head[3]) - head[5]  # δ − d
    targets[0] = max(0.0, total[n_grid + 1, 1] / expert_sum - gap)
    targets[1] = max(0.0, gap - total[n_grid, 1] / base_sum)
    finite = math.isfinite(curve[:, :2].sum() + targets.sum())
    return finite and total[n_grid + 2, 0] == 0.0


@_jit
def search_rows(
    large: Any, base: Any, expert: Any, n_vocab: int, alphas: Any,
    keys: Any, heads: Any, codes: Any, sums: Any, curves: Any, targets: Any, usable: Any, scratch: Any, sync: Any,
) -> None:  # fmt: skip
    """One expert, all K rows (K, width): curves (K, G, 3), targets (K, 2), usable (K,), codes (K, 3).

    sync: zeros; [0] hands out scratch, then for each of the three phases tasks taken and tasks done.
    """
    n_rows, n_chunks = sums.shape[0], sums.shape[1]
    n_tasks = n_rows * n_chunks
    own = scratch[_fetch_add(sync, 0, 1)]
    while True:
        task = _fetch_add(sync, 1, 1)
        if task >= n_tasks:
            break
        k, chunk = task // n_chunks, task % n_chunks
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, n_vocab)
        _extremes(large[k, start:stop].view(np.int32), keys[k, 0, chunk])
        _extremes(base[k, start:stop].view(np.int32), keys[k, 1, chunk])
        _extremes(expert[k, start:stop].view(np.int32), keys[k, 2, chunk])
        _fetch_add(sync, 2, 1)
    while _fetch_add(sync, 2, 0) < n_tasks:
        pass
    while True:
        k = _fetch_add(sync, 3, 1)
        if k >= n_rows:
            break
        _head(large[k], base[k], expert[k], keys[k], heads[k], codes[k])
        _fetch_add(sync, 4, 1)
    while _fetch_add(sync, 4, 0) < n_rows:
        pass
    while True:
        task = _fetch_add(sync, 5, 1)
        if task >= n_tasks:
            break
        k, chunk = task // n_chunks, task % n_chunks
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, n_vocab)
        if codes[k].max() == OK:
            _sum_chunk(
                large[k, start:stop], base[k, start:stop], expert[k, start:stop],
                start, heads[k], alphas, own, sums[k, chunk],
            )  # fmt: skip
        if _fetch_add(sync, 6, 1) == n_tasks - 1:  # the last to finish: every chunk is done
            for row in range(n_rows):
                usable[row] = codes[row].max() == OK and _curve(sums[row], heads[row], curves[row], targets[row])
            _fetch_add(sync, 6, 1)
    while _fetch_add(sync, 6, 0) <= n_tasks:
        pass


@_jit
def _top(x: Any) -> Any:
    """Largest element of a float64 array without NaN, by integers of the same order, which vectorise."""
    _wide()
    bits = x.view(np.int64)
    best = np.int64(-0x8000000000000000)
    for i in range(bits.size):
        best = max(best, bits[i] ^ ((bits[i] >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))
    best ^= (best >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)
    box = np.empty(1, np.int64)
    box[0] = best
    return box.view(np.float64)[0]


@_jit_sum
def _sum64(x: Any, top: float) -> Any:
    s = 0.0
    for i in range(x.size):
        s += _exp64(x[i] - top)
    return s


@_jit_sum
def _moments64(x: Any, top: float, d: Any) -> Any:
    s = 0.0
    t = 0.0
    v = 0.0
    for i in range(x.size):
        w = _exp64(x[i] - top)
        s += w
        t += w * d[i]
        v += w * d[i] * d[i]
    return s, t / s, v / s


@_jit
def careful_curve(large: Any, base: Any, expert: Any, alphas: Any, curve: Any, targets: Any, scratch: Any) -> None:
    """As `search_rows` for one row, in float64, at any range, and with the rules for −inf; alphas[0] = 0; scratch (3, V)."""
    log_p, d, x = scratch[0], scratch[1], scratch[2]
    for i in range(large.size):
        both = base[i] > -math.inf and expert[i] > -math.inf
        x[i] = _F64(base[i]) if both else -math.inf
        d[i] = _F64(expert[i]) if both else -math.inf
        log_p[i] = large[i]
    base_top, expert_top = _top(x), _top(d)
    targets[:] = 0.0
    if base_top > -math.inf:
        base_log, expert_log = math.log(_sum64(x, base_top)), math.log(_sum64(d, expert_top))
        for i in range(large.size):
            d[i] = (d[i] - expert_top) - (x[i] - base_top) - (expert_log - base_log) if x[i] > -math.inf else 0.0
        targets[1] = max(0.0, -_moments64(x, base_top, d)[1])
        for i in range(large.size):
            x[i] = _F64(expert[i]) if x[i] > -math.inf else -math.inf
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


@_jit
def choose(curves: Any, targets: Any, alphas: Any) -> Any:
    """(expert, grid index) with the first strict minimum of J for one row, over curves (T, G, 3) and targets (T, 2); and
    what float32 sums leave in doubt: 0 nothing, 1 the value of J there, 2 whether another pair is lower."""
    n_experts, n_grid = curves.shape[0], curves.shape[1]
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


@_jit_sum
def _mass(row: Any, top: Any) -> Any:
    s = _F32(0)
    for i in range(row.size):
        s += _exp(row[i] - top)
    return s


@_jit
def _measure_group(fused: Any, group: int, maxima: Any, masses: Any, box: Any) -> Any:
    """Maximum and Σ exp(row − maximum) of one group; what it holds."""
    row = fused[group * GROUP : min(group * GROUP + GROUP, fused.size)]
    _extremes(row.view(np.int32), box)
    maxima.view(np.int32)[group] = _key(box[0])
    masses[group] = _mass(row, maxima[group]) if maxima[group] > -math.inf else _F32(0)
    return _condition(box[0], box[1])


@_jit
def measure_groups(fused: Any, groups: Any, maxima: Any, masses: Any) -> None:
    """Maxima and masses of the groups named, after entries of `fused` have changed."""
    box = np.empty(2, np.int32)
    for group in groups:
        _measure_group(fused, group, maxima, masses, box)


@_jit
def fuse_row(large: Any, base: Any, expert: Any, alpha: Any, fused: Any, maxima: Any, masses: Any, sync: Any) -> None:
    """fused = large + α (expert − base), and each group's maximum and mass. Counts groups that are not finite in sync[2]."""
    n_chunks = (fused.size + CHUNK - 1) // CHUNK
    box = np.empty(2, np.int32)
    factor = _F32(alpha)
    while True:
        chunk = _fetch_add(sync, 0, 1)
        if chunk >= n_chunks:
            break
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, fused.size)
        out, l, b, e = fused[start:stop], large[start:stop], base[start:stop], expert[start:stop]
        if factor == 0:
            out[:] = l
        else:
            for i in range(out.size):
                out[i] = l[i] + factor * (e[i] - b[i])
        for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
            if _measure_group(fused, group, maxima, masses, box) != OK:
                _fetch_add(sync, 2, 1)
        _fetch_add(sync, 1, 1)
    while _fetch_add(sync, 1, 0) < n_chunks:
        pass


@_jit
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


@_jit
def mix(x: Any) -> Any:
    """splitmix64's finaliser over uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_jit
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
        uniform = (_F64(noise) + 0.5) * 2.0**-53
        score = logit - math.log(-math.log(uniform))
        if score > best_score:
            best, best_score = i, score
    return best
