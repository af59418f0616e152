"""Means with 95% intervals, and paired differences, of scores of single examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""The 97.5% point of the normal distribution."""


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Estimate:
    """The mean of `values` and its interval.

    Zeros and ones get Wilson's interval, which stays within 0 and 1 and has a width at both; other numbers the normal
    one.
    """
    x = np.asarray(values, np.float64)
    n, mean = len(x), float(x.mean())
    if not np.isin(x, (0.0, 1.0)).all():
        return _normal(x)
    middle, half = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return Estimate(mean, max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n)))


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean of `values` − `others` and its normal interval. Both hold the same examples in the same order."""
    return _normal(np.asarray(values, np.float64) - np.asarray(others, np.float64))


def _normal(x: np.ndarray) -> Estimate:
    mean = float(x.mean())
    half = Z * float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return Estimate(mean, mean - half, mean + half)
