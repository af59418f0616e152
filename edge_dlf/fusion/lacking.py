"""Tokens that a member's vocabulary lacks, in the weighted fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .dispatch import Float32Array, Int64Array, Rows


def with_the_large_models(
    members: Sequence[Rows], names: Sequence[str], lacking: Mapping[str, Int64Array], n_vocab: int
) -> list[Rows]:
    """Return the rows with the large model's probability for every token that a member lacks.

    Among the tokens that it has, a member keeps its own odds: p̃(v) = P(v) for v it lacks, else (1 − P(lacking)) p(v).

    members: K rows of each of `names`, −inf at what it lacks. Without the large model they stay as they are.
    """
    if "large" not in names or not lacking.keys() & set(names):
        return list(members)
    large = members[names.index("large")]
    return [
        _filled(rows, large, lacking[name], n_vocab) if name in lacking else rows
        for rows, name in zip(members, names, strict=True)
    ]


def _filled(rows: Rows, large: Rows, lacking: Int64Array, n_vocab: int) -> Rows:
    filled = np.array([np.ravel(row)[:n_vocab] for row in rows])
    for row, others in zip(filled, large, strict=True):
        shared = np.array(np.ravel(others)[:n_vocab])
        row[lacking] = -np.inf
        shared[lacking] = -np.inf
        row[lacking] = np.ravel(others)[lacking] + (_log_sum(row) - _log_sum(shared))
    return filled


def _log_sum(row: Float32Array) -> float:
    """log Σ exp(row); NaN where the row has NaN, or nothing finite."""
    top = row.max()
    with np.errstate(invalid="ignore"):
        return float(top + np.log(np.exp(row - top).sum(dtype=np.float64)))
