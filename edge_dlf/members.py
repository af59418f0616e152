"""The members of a family in memory: models, one context each, and how much of the machine the contexts take."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import psutil

from .errors import InvalidParameterError
from .files import FamilyFiles
from .llama import Interrupt, LlamaBackend, Model, cell_bytes, offloads_to_gpu

MAX_PARALLEL = 256
"""Sequences that llama.cpp can tell apart."""
_AUTO_PARALLEL = 16, 32
"""Sequences decoded at once where nobody says how many: on a CPU, and on a GPU."""
_CELLS_PER_SEQUENCE = 1024
"""Positions of the shared KV cache for each sequence; one that grows beyond takes what others leave."""


class Members:
    """Models and contexts of `files`, loaded.

    models: each file once, the large model's first. backends: role -> its context. interrupt: stops them all.
    n_gpu_layers, n_threads, n_ctx, type_k, type_v: as in FusedLlama. n_parallel: sequences to decode at once; "auto"
    takes what memory allows. Raises LoadError, OutOfMemoryError or InvalidParameterError.
    """

    def __init__(
        self,
        files: FamilyFiles,
        *,
        n_ctx: int,
        n_parallel: int | Literal["auto"],
        n_gpu_layers: int | Mapping[str, int],
        n_threads: int,
        type_k: str | None,
        type_v: str | None,
    ) -> None:
        layers = files.layers(n_gpu_layers)
        self.interrupt = Interrupt()
        self.backends: dict[str, LlamaBackend] = {}
        loaded: dict[Path, Model] = {}
        with ExitStack() as stack:
            for name, info in files.models.items():
                if info.path not in loaded:
                    loaded[info.path] = Model(info.path, layers[name])
                    stack.callback(loaded[info.path].close)
            models = {name: loaded[info.path] for name, info in files.models.items()}
            bytes_each = sum(cell_bytes(model, type_k, type_v) for model in models.values())
            n_seq_max, n_cells = _share(n_parallel, n_ctx, bytes_each)
            for name, model in models.items():
                self.backends[name] = LlamaBackend(
                    model,
                    name,
                    n_ctx=n_ctx,
                    n_seq_max=n_seq_max,
                    n_cells=n_cells,
                    n_threads=n_threads,
                    type_k=type_k,
                    type_v=type_v,
                    loras=files.loras.get(name, ()),
                    interrupt=self.interrupt,
                )
                stack.callback(self.backends[name].close)
            self.models = tuple(loaded.values())
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Free contexts and weights. Calling it twice is no error."""
        self._closing.close()


def _share(n_parallel: int | Literal["auto"], n_ctx: int, cell_bytes: float) -> tuple[int, int]:
    """Sequences, and positions that they share. cell_bytes: what a position takes in all members."""
    is_number = isinstance(n_parallel, int) and not isinstance(n_parallel, bool) and 1 <= n_parallel <= MAX_PARALLEL
    if not is_number and n_parallel != "auto":
        raise InvalidParameterError(f"n_parallel must be auto or 1 to {MAX_PARALLEL}, not {n_parallel!r}")
    n_seq = _AUTO_PARALLEL[offloads_to_gpu()] if n_parallel == "auto" else n_parallel
    n_fitting = int(psutil.virtual_memory().available / 2 / cell_bytes) if cell_bytes else n_seq * n_ctx
    n_cells = max(n_ctx, min(n_seq * min(n_ctx, _CELLS_PER_SEQUENCE), n_fitting))
    if n_parallel == "auto":
        n_seq = max(1, min(n_seq, n_cells * 4 // _CELLS_PER_SEQUENCE))
    return n_seq, n_cells
