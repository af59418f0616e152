"""Evaluation of a whole prompt by one backend."""

from __future__ import annotations

from collections.abc import Sequence

from edge_dlf.engine.backend import Backend, Run


def feed(member: Backend, seq: int, tokens: Sequence[int]) -> None:
    """Append `tokens` to `seq` in as few batches as can be; `member.logits()` is then the row after the last."""
    for start in range(0, len(tokens), member.n_batch):
        chunk = tokens[start : start + member.n_batch]
        member.decode([Run(seq, chunk, int(start + len(chunk) == len(tokens)))])
