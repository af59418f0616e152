"""How members on several devices overlap: measured once for a family on a machine, then remembered."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ..params import OVERLAPS, Overlap
from ..system.remembered import recall, remember
from .backend import Run
from .ensemble import Ensemble

_COLLECTION = "overlap"
_WARM_UP, _ROUNDS = 2, 7
_PATIENCE_S = 0.8
_MARGIN = 0.03
"""By how much a mode has to be faster than one that comes before it."""


def choose_overlap(ensemble: Ensemble, key: str, modes: Sequence[Overlap] = OVERLAPS) -> None:
    """Let the members of `ensemble` overlap in the fastest of `modes`.

    key: what the measurement depends on. A result for the same key is taken from the cache.
    """
    known = recall(_COLLECTION, key)
    if known in modes:
        ensemble.overlap = known
        return
    default = ensemble.overlap
    found = fastest(ensemble, modes)
    ensemble.overlap = found or default
    if found:
        remember(_COLLECTION, key, found)


def fastest(ensemble: Ensemble, modes: Sequence[Overlap] = OVERLAPS) -> Overlap | None:
    """Return the mode in which a step of one token per sequence is fastest, by medians of steps in turn.

    None where too few steps fit into the time there is. The sequences are empty afterwards.
    """
    n_seqs, clock = min(ensemble.n_seq_max, ensemble.n_free(), ensemble.n_batch), ensemble.clock
    seconds: dict[Overlap, list[float]] = {mode: [] for mode in modes}
    began = clock()
    for number in range(_WARM_UP + _ROUNDS):
        for mode in modes:
            ensemble.overlap = mode
            started = clock()
            ensemble.decode({name: [Run(seq, [0], 1) for seq in range(n_seqs)] for name in ensemble.members})
            if number >= _WARM_UP:
                seconds[mode].append(clock() - started)
            ensemble.forget(range(n_seqs))
        if clock() - began > _PATIENCE_S * (number + 1) / (number + 2):  # another round would take longer
            break
    if not all(len(timings) > 1 for timings in seconds.values()):
        return None
    best = modes[0]
    for mode in modes[1:]:
        if median(seconds[mode]) < median(seconds[best]) * (1 - _MARGIN):
            best = mode
    return best
