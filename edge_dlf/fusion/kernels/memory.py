"""A kernel that reads memory as fast as the machine allows."""

from __future__ import annotations

from typing import Any

from .vector import kernel


@kernel
def read(values: Any) -> int:
    """Sum of `values`, (N,) int64. Integers may be added in any order, so the loop does nothing but read."""
    total = 0
    for value in values:
        total += value
    return total
