"""What training lowers: the loss of the expert's own row, or that of the row it is fused into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .batches import Batch
from .model import Llama

_N_LOGITS = 1 << 24
"""Logits that are held at once; more are computed in parts, and again for their gradient."""
_SCATTERED = 10
"""How many times as long as its share of a whole row a single logit takes to compute."""


class Losses(NamedTuple):
    """−log p of each of R answer tokens in nats, and the tokens that were the likeliest, (R,)."""

    values: Tensor
    choices: Tensor


class Objective(Protocol):
    def __call__(self, model: Llama, batch: Batch, /) -> Losses: ...


def alone(model: Llama, batch: Batch) -> Losses:
    """The expert's own row answers: −log softmax(e)[gold]."""
    hidden = model.hidden(batch.tokens).flatten(0, 1)[batch.places]
    n_rows = max(1, _N_LOGITS // model.shape.n_vocab)

    def part(hidden: Tensor, golds: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.logits(hidden).float()
        return functional.cross_entropy(logits, golds, reduction="none"), logits.detach().argmax(-1)

    if len(hidden) <= n_rows:
        return Losses(*part(hidden, batch.golds))
    parts = [
        checkpoint(part, *pieces, use_reentrant=False)
        for pieces in zip(hidden.split(n_rows), batch.golds.split(n_rows), strict=True)
    ]
    return Losses(*map(torch.cat, zip(*parts, strict=True)))


class Fused:
    """The fused row answers: −log softmax(c + e − s)[gold], or −log softmax(c + e)[gold] without a base.

    c, the row that the expert is added to, is a constant: of each example (n, 3, K) float32, the logits of the tokens
    kept of it, their ids and log importance weights, the gold token first. s, the base's row, is computed by the frozen
    weights beside e, so that training starts at c itself, to the last digit.

    has_base: whether the base's row is subtracted.
    """

    def __init__(self, rows: Sequence[npt.NDArray[np.float32]], has_base: bool) -> None:
        self._rows = rows
        self._has_base = has_base

    def __call__(self, model: Llama, batch: Batch) -> Losses:
        kept = np.concatenate([self._rows[number] for number in batch.numbers])
        constant, ids, log_weights = torch.from_numpy(kept).to(batch.tokens.device).unbind(1)
        ids = ids.long()
        fused = constant + self._logits(model, batch, ids)
        if self._has_base:
            with model.without_lora():
                base = self._logits(model, batch, ids)
            fused = fused - base
        values = (fused + log_weights).logsumexp(-1) - fused[:, 0]
        likeliest = fused.detach().masked_fill(log_weights < -1e29, -torch.inf).argmax(-1, keepdim=True)
        return Losses(values, ids.gather(1, likeliest).squeeze(1))

    def _logits(self, model: Llama, batch: Batch, ids: Tensor) -> Tensor:
        """The model's logits of the tokens `ids` (R, K) at the answers' places, float32."""
        hidden = model.hidden(batch.tokens).flatten(0, 1)[batch.places]
        if ids.shape[1] * _SCATTERED > model.shape.n_vocab:
            return model.logits(hidden).float().gather(1, ids)
        return model.logits_of(hidden, ids)
