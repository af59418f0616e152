"""Reading memory as fast as it goes."""

from __future__ import annotations

from typing import Any

from .vector import jit


@jit
def read(values: Any) -> int:
    """Sum of `values` (N,) int64: integers add up in any order, so that the loop is nothing but reading."""
    total = 0
    for value in values:
        total += value
    return total
