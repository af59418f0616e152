"""Rows of the models that an expert is trained through: by llama.cpp, once, reduced and kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...api import FusedLlama
from ...fusion import fit
from ...fusion.dispatch import Rows
from ...fusion.records import Draw
from ..answer_rows import n_kept_tokens, sample_seed
from ..examples import Example
from ..forced import Found, known_tokens, read_answers

_MOST = 512
"""Tokens that are kept of a row at most, where not all of them are."""
_MIXTURES = (1.0, 0.5)
"""Powers of the fused row by which tokens are kept and sampled: its likeliest, and those that training may lift."""
_LEFT_OUT = -1e30
"""Log importance weight of a token that is kept a second time."""


def n_kept_of(n_vocab: int, examples: Sequence[Example]) -> int:
    """Tokens to keep of each row: all of them where the examples are few."""
    is_whole = n_kept_tokens(n_vocab, 3, examples, n_vocab) == n_vocab
    return n_vocab if is_whole else n_kept_tokens(n_vocab, 3, examples, _MOST)


def lifted_tokens(examples: Sequence[Example], n_kept: int) -> npt.NDArray[np.int32]:
    """Tokens that training lifts, and that every row therefore keeps exactly: the most frequent ones of the answers.

    Where the large model knows nothing of the answers, they are not among its likeliest tokens and hardly ever sampled.
    """
    counts = Counter(token for example in examples for token in example.answer)
    return np.array([token for token, _ in counts.most_common(n_kept // 2)], np.int32)


def constant_rows(
    llm: FusedLlama,
    weights: Mapping[str, float],
    examples: Sequence[Example],
    n_kept: int,
    n_threads: int,
    folder: Path | None = None,
    tell: Callable[[int], None] = lambda n_done: None,
) -> list[npt.NDArray[np.float32]]:
    """Read the examples with some members; return of each the rows (n, 3, K) of Σ weight · logits that `Fused` takes.

    weights: of each member that takes part.
    n_kept: K, tokens kept of each row.
    n_threads: that reduce rows.
    folder, tell: as for `read_answers`.

    Raises NonFiniteLogitsError where a member returns NaN.
    """
    ids = np.arange(llm.n_vocab, dtype=np.float32)
    members, lifted = tuple(weights), lifted_tokens(examples, n_kept if n_kept < llm.n_vocab else 0)
    n_own = n_kept - len(lifted)
    dtype = np.dtype([("rows", np.float32, (3, n_kept))])

    def reduce(rows: Sequence[Rows], names: Sequence[str], draws: Sequence[Draw]) -> Found:
        # The ids are kept as if a member of weight 0 had returned them.
        whole = fit.whole([*rows, [ids] * len(draws)], (*names, "ids"), known_tokens(draws), llm.n_vocab)
        fused = [weights[name] for name in names]
        mixtures = [[power * weight for weight in (*fused, 0.0)] for power in _MIXTURES]
        (kept,) = fit.keep(whole, n_own, sample_seed(draws), mixtures, n_threads).arrays
        reduced = np.empty(len(draws), dtype)
        constants, tokens, log_weights = reduced["rows"].transpose(1, 0, 2)
        constants[:, :n_own] = np.einsum("m,kmn->kn", np.array(fused, np.float32), kept[:, : len(names)])
        lifts = [np.array([row[lifted] for row in member]) for member in rows]
        constants[:, n_own:] = np.einsum("m,mkn->kn", np.array(fused, np.float32), np.array(lifts))
        tokens[:, :n_own], tokens[:, n_own:] = kept[:, len(names)], lifted
        log_weights[:, :n_own] = np.where(np.isin(tokens[:, :n_own], lifted), _LEFT_OUT, kept[:, len(names) + 1])
        log_weights[:, n_own:] = np.where(lifted == tokens[:, :1], _LEFT_OUT, 0.0)
        log_weights[:, 0] = kept[:, len(names) + 1, 0]
        return reduced

    how = ["train", n_kept, dict(weights), _MIXTURES, lifted.tolist()]
    found = read_answers(llm, members, examples, dtype, reduce, how=how, kind="train", folder=folder, tell=tell)
    return [reduced["rows"] for reduced in found]
