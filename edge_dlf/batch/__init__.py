"""Batches between files that survive whatever stops a run, and batches on many machines by Ray."""

from .run import run_file

__all__ = ["run_file"]
