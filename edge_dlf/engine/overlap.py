"""Whether members are decoded at the same time: measured once for a family on a machine, then remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from ..params import OVERLAPS, Overlap
from ..system.remembered import recall, remember
from .backend import Run
from .ensemble import Ensemble

_COLLECTION = "overlap"
_WARM_UP, _ROUNDS = 2, 7
_PATIENCE_S = 0.8
_MARGIN = 0.03
"""By how much a way has to be faster than one that comes before it."""


def settle(
    ensemble: Ensemble,
    key: str,
    ways: Sequence[Overlap] = OVERLAPS,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Let the members of `ensemble` overlap in the fastest of `ways`; `key`: what the answer depends on."""
    known = recall(_COLLECTION, key)
    if known in ways:
        ensemble.overlap = known
        return
    default = ensemble.overlap
    found = fastest(ensemble, ways, clock)
    ensemble.overlap = found or default
    if found:
        remember(_COLLECTION, key, found)


def fastest(
    ensemble: Ensemble, ways: Sequence[Overlap] = OVERLAPS, clock: Callable[[], float] = time.perf_counter
) -> Overlap | None:
    """The way in which a step of all members, one token of each sequence, is fastest, by medians of steps in turn; None
    where too few of them fit into the time there is. The sequences are empty afterwards."""
    n_seqs = min(ensemble.n_seq_max, ensemble.n_free(), ensemble.n_batch)
    seconds: dict[Overlap, list[float]] = {way: [] for way in ways}
    began = clock()
    for number in range(_WARM_UP + _ROUNDS):
        for way in ways:
            ensemble.overlap = way
            started = clock()
            ensemble.decode_all({name: [Run(seq, [0], 1) for seq in range(n_seqs)] for name in ensemble.members})
            for member in ensemble.members.values():
                member.logits()
            if number >= _WARM_UP:
                seconds[way].append(clock() - started)
            ensemble.forget(range(n_seqs))
        if clock() - began > _PATIENCE_S * (number + 1) / (number + 2):  # another round would take longer
            break
    if not all(len(timings) > 1 for timings in seconds.values()):
        return None
    best = ways[0]
    for way in ways[1:]:
        if median(seconds[way]) < median(seconds[best]) * (1 - _MARGIN):
            best = way
    return best
