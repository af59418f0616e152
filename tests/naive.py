"""The method in plain float64 NumPy as the paper writes it: the oracle of every kernel and the benchmark's baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_dlf.params import FusionParams, SamplingParams

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def log_softmax(x):
    """Logarithms of the probabilities, and the probabilities."""
    x = x - x.max()
    probs = np.exp(x)
    total = probs.sum()
    return x - np.log(total), probs / total


def softmax(x):
    return log_softmax(x)[1]


def kl(log_p, p, log_q):
    """KL(p‖q) in nats; logarithms finite."""
    return float((p * (log_p - log_q)).sum())


def log_ratio(base, expert):
    """d = log Q_t − log Q (V,), and the targets a = KL(Q_t‖Q), b = KL(Q‖Q_t); d = 0 where either is −inf."""
    both = np.isfinite(base) & np.isfinite(expert)
    d = np.zeros(len(base))
    if not both.any():
        return d, 0.0, 0.0
    log_q, q = log_softmax(base[both].astype(np.float64))
    log_expert, expert_probs = log_softmax(expert[both].astype(np.float64))
    d[both] = log_expert - log_q
    return d, kl(log_expert, expert_probs, log_q), kl(log_q, q, log_expert)


def objectives(large, base, experts, alphas):
    """J, KL(P̃‖P) and KL(P‖P̃), each (T, G), and the targets a, b (T, 2): one softmax and two KLs a grid value."""
    alive = np.isfinite(large)
    log_p, p = log_softmax(large[alive].astype(np.float64))
    ratios = [log_ratio(base, expert) for expert in experts]
    targets = np.array([[a, b] for _, a, b in ratios])
    j, forward, reverse = (np.empty((len(experts), len(alphas))) for _ in range(3))
    for t, (d, _, _) in enumerate(ratios):
        d = d[alive]
        for k, alpha in enumerate(alphas):
            log_fused, fused = log_softmax(log_p + alpha * d)
            forward[t, k] = kl(log_fused, fused, log_p)
            reverse[t, k] = kl(log_p, p, log_fused)
            j[t, k] = sum((forward[t, k] - a) ** 2 + (reverse[t, k] - b) ** 2 for a, b in targets)
    return j, forward, reverse, targets


GRID = np.round(np.arange(21) * 0.1, 12)


def search(large, base, experts, alphas=GRID):
    """(expert, α, J): the first strict minimum of the paper's Algorithm 1."""
    j, _, _, _ = objectives(large, base, experts, alphas)
    t, k = np.unravel_index(j.argmin(), j.shape)
    return int(t), float(alphas[k]), float(j[t, k])


def fused_probs(large, base, experts, alphas: Sequence[float]):
    """softmax(log P + Σ α_t d_t), (V,) float64."""
    x = np.full(len(large), -np.inf)
    alive = np.isfinite(large)
    x[alive] = large[alive].astype(np.float64)
    for expert, alpha in zip(experts, alphas, strict=True):
        x[alive] += alpha * log_ratio(base, expert)[0][alive]
    return softmax(x)


def fused_row(rows: Mapping[str, Any], fusion: FusionParams):
    """The members' finite rows fused by any method, (V,) float64, not normalised."""
    rows = {name: row.astype(np.float64) for name, row in rows.items()}
    if fusion.method == "weighted":
        return sum(weight * rows[name] for name, weight in fusion.weights.items() if weight)
    if fusion.method == "blend":
        return 0.5 * rows["large"] + 0.5 * np.mean([rows[name] for name in rows if name not in ("large", "base")], 0)
    if fusion.method in rows:
        return rows[fusion.method]
    experts = [name for name in rows if name not in ("large", "base")]
    alphas = [float(fusion.alpha)] * len(experts) if fusion.method == "static" else [0.0] * len(experts)
    if fusion.method == "dynamic":
        t, alpha, _ = search(rows["large"], rows["base"], [rows[name] for name in experts])
        alphas[t] = alpha
    return rows["large"] + sum(a * (rows[name] - rows["base"]) for name, a in zip(experts, alphas, strict=True))


def weighted_probs(rows, weights):
    """exp Σ_m w_m log p_m, normalised, (V,). With −inf p = 0 if the weight is positive, log p = 0 if it is negative."""
    x = np.zeros(len(rows[0]))
    for row, weight in zip(rows, weights, strict=True):
        if weight:
            logprobs = np.full(len(x), -np.inf if weight > 0 else 0.0)
            alive = np.isfinite(row)
            logprobs[alive] = log_softmax(row[alive].astype(np.float64))[0]
            x += weight * logprobs
    return softmax(x)


def weighted_loss(rows, weights, gold):
    """−log softmax(Σ_m w_m l_m)[gold], its gradient (M,) and Hessian (M, M), over the tokens that no row gives −inf."""
    logits = rows[:, np.isfinite(rows).all(axis=0)].astype(np.float64)
    logprobs, probs = log_softmax(weights @ logits)
    at_gold = np.isfinite(rows[:, :gold]).all(axis=0).sum()
    means = logits @ probs
    centred = logits - means[:, None]
    return -logprobs[at_gold], means - logits[:, at_gold], (centred * probs) @ centred.T


def restricted(fused, experts, alphas, plausibility):
    """−inf for tokens that no expert with a weight gives `plausibility` times its best one's probability."""
    probs = [softmax(row.astype(np.float64)) for row, alpha in zip(experts, alphas, strict=True) if alpha > 0]
    if not probs:
        return fused
    kept = np.any([p >= plausibility * p.max() for p in probs], axis=0)
    return np.where(kept, fused, np.float32(-np.inf)) if np.isfinite(fused[kept]).any() else fused


def penalised(fused, sampling: SamplingParams, recent):
    logits = fused.astype(np.float64)
    for token in sorted({int(token) for token in recent}):
        count = list(recent).count(token)
        if logits[token] <= 0:
            logits[token] *= sampling.repeat_penalty
        else:
            logits[token] /= sampling.repeat_penalty
        logits[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token, bias in (sampling.logit_bias or {}).items():
        logits[token] += bias
    return logits.astype(np.float32).astype(np.float64)


def kept(logits, sampling: SamplingParams):
    """Ids that top-k, top-p and min-p leave, best first."""
    order = sorted(np.flatnonzero(logits > -np.inf).tolist(), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    probs = softmax(logits[order])
    if sampling.top_p < 1.0:
        order = order[: int(np.searchsorted(np.cumsum(probs), sampling.top_p)) + 1]
    return [i for i in order if logits[i] >= logits[order[0]] + np.log(max(sampling.min_p, 1e-300))]


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def gumbel(seed, position, token):
    state = mix((mix((seed + GOLDEN) & MASK) + position * GOLDEN) & MASK)
    noise = mix((state + (token + 1) * GOLDEN) & MASK) >> 11
    return -np.log(-np.log((noise + 0.5) * 2.0**-53))


def select(fused, sampling: SamplingParams, seed, position, recent=()):
    logits = penalised(fused, sampling, recent)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = {i: logits[i] / sampling.temperature + gumbel(seed, position, i) for i in kept(logits, sampling)}
    return min(scores, key=lambda i: (-scores[i], i))
