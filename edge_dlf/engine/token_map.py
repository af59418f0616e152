"""Ids of a member whose control tokens stand at other ids than the large model's, or are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .backend import Logits, Run

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenMap:
    """What the ids of a family, which are the large model's, are in one member.

    n_vocab: ids that can be picked.
    reads: the member's id for each id that may stand in a text, (n_vocab or more,). Those from n_vocab on are control
        tokens that the large model does not have. They stand in prompts and are never picked.
    lacking: ids below n_vocab for which the member has no logit, ascending.
    """

    n_vocab: int
    reads: Ids
    lacking: Ids

    @cached_property
    def _moved(self) -> Ids:
        return np.flatnonzero(self.reads[: self.n_vocab] != np.arange(self.n_vocab))

    def runs(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs in the member's ids."""
        return [run._replace(tokens=self.reads[list(run.tokens)].tolist()) for run in runs]

    def rows(self, rows: Logits) -> Logits:
        """Return the member's rows (K, width) in the family's ids, (K, n_vocab), −inf where it lacks the token."""
        own, width = np.empty((len(rows), self.n_vocab), np.float32), min(self.n_vocab, rows.shape[1])
        own[:, :width] = rows[:, :width]
        own[:, self._moved] = rows[:, self.reads[self._moved]]
        own[:, self.lacking] = -np.inf
        return own
