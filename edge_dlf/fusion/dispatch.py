"""How kernels run: on rows of logits wherever they lie in memory, and on several threads together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import NonFiniteLogitsError
from .kernels.vector import HAS_INF, HAS_NAN, NONE_FINITE, kernel

Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = Float32Array | Sequence[Float32Array]
"""K rows of one member: an array (K, width), or K arrays (width,) or (1, width)."""

_FAULTS = {HAS_NAN: "NaN", HAS_INF: "+inf", NONE_FINITE: "no finite value"}


@kernel
def _address(array: Any) -> Any:
    """Memory address of an array's first element; five times quicker than `array.ctypes.data`."""
    return array.ctypes.data


def row_addresses(members: Sequence[Rows], n_rows: int, n_vocab: int) -> Int64Array:
    """Addresses (K, M) of the members' rows. The caller keeps the arrays alive while the addresses are used.

    Raises ValueError unless each member has K float32 rows of at least `n_vocab` contiguous logits.
    """
    addresses: list[list[int]] = []
    for rows in members:
        if isinstance(rows, np.ndarray) and rows.ndim == 2 and _is_usable(rows, n_rows, n_vocab):
            start, stride = _address(rows), rows.strides[0]
            addresses.append([start + k * stride for k in range(n_rows)])
        elif not isinstance(rows, np.ndarray) and len(rows) == n_rows and all(_is_row(row, n_vocab) for row in rows):
            addresses.append([_address(row) for row in rows])
        else:
            raise ValueError(
                f"rows must be K = {n_rows} of {n_vocab} or more contiguous float32 logits for each member"
            )
    return np.array(list(zip(*addresses, strict=True)), np.int64)


def _is_row(row: Float32Array, n_vocab: int) -> bool:
    return row.ndim in (1, 2) and _is_usable(row.reshape(-1, row.shape[-1]), 1, n_vocab)


def _is_usable(rows: Float32Array, n_rows: int, n_vocab: int) -> bool:
    return rows.shape[0] == n_rows and rows.shape[1] >= n_vocab and rows.dtype == np.float32 and rows.strides[1] == 4


def non_finite(name: str, condition: int) -> NonFiniteLogitsError:
    """The error for a member whose row has this condition."""
    return NonFiniteLogitsError(name, _FAULTS[condition])


class Threads:
    """`n_threads` threads, the caller among them, that run a kernel together.

    The kernel shares out its work by atomic counters, which are new for each run. A thread that wakes late finds less
    work left, or none, and no other thread waits for it.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(n_threads - 1)]
        for jobs in self._queues:
            threading.Thread(target=_work, args=(jobs,), name="edge-dlf-kernels", daemon=True).start()

    def run(self, kernel: Callable[..., None], *args: Any) -> npt.NDArray[np.int64]:
        """Run `kernel(*args, counters)` on every thread. Returns the counters, (8,), as the kernel left them."""
        counters = np.zeros(8, np.int64)
        for jobs in self._queues:
            jobs.put((kernel, args, counters))
        kernel(*args, counters)
        return counters

    def __del__(self) -> None:
        for jobs in self._queues:
            jobs.put(None)


def _work(jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        kernel, args, counters = job
        kernel(*args, counters)
        del kernel, args, counters, job
