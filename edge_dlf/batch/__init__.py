"""Batches between files that survive whatever stops a run, and batches on many machines by Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import run_file

__all__ = ["run_file"]


def __getattr__(name: str) -> Any:
    """Import `run_file` when it is first used, so that commands which do not use it start quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import run_file

    return run_file
