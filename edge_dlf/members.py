"""The members of a family in memory: models, one context each, and how much of the machine the contexts take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import InvalidParameterError
from .files import FamilyFiles
from .guard import require_harmless
from .llama import Interrupt, LlamaBackend, Model, gpus, repacks_weights
from .machine import this_machine
from .plan import Planner

logger = logging.getLogger(__name__)

MAX_PARALLEL = 256
"""Sequences that llama.cpp can tell apart."""
_AUTO_PARALLEL = 16, 32
"""Sequences decoded at once where nobody says how many: on a CPU, and on a GPU."""
_CELLS_PER_SEQUENCE = 1024
"""Positions of the shared KV cache for each sequence; one that grows beyond takes what others leave."""


@dataclass(frozen=True)
class Placement:
    """How a family is to lie in memory: sequences decoded at once, positions that they share in each KV cache, and of
    each role n_gpu_layers and the share of them that each GPU holds. on_gpu: roles of which no layer is on the host."""

    n_seq_max: int
    n_cells: int
    layers: Mapping[str, int]
    splits: Mapping[str, tuple[float, ...]]
    on_gpu: frozenset[str] = frozenset()


def place(
    files: FamilyFiles,
    *,
    n_ctx: int,
    n_parallel: int | Literal["auto"],
    n_gpu_layers: int | Mapping[str, int],
    main_gpu: int | Mapping[str, int] | None,
    tensor_split: Sequence[float] | None,
    type_k: str | None,
    type_v: str | None,
) -> Placement:
    """Find room for `files`, before anything is loaded, on this machine as it is now. Arguments as in FusedLlama.

    Sequences share as many positions as memory allows, of one context at least. Raises OutOfMemoryError or
    InvalidParameterError.
    """
    machine = this_machine(gpus())
    wants_gpu = n_gpu_layers.values() if isinstance(n_gpu_layers, Mapping) else [n_gpu_layers]
    if not machine.gpus and (max(wants_gpu, default=0) > 0 or main_gpu is not None or tensor_split is not None):
        logger.warning("there is no GPU that this build of llama.cpp can use: everything runs on the CPU")
    n_seq_max = _n_seq_max(n_parallel, is_on_gpu=bool(machine.gpus))
    planner = Planner(
        files,
        machine,
        n_gpu_layers=n_gpu_layers,
        main_gpu=main_gpu,
        tensor_split=tensor_split,
        type_k=type_k,
        type_v=type_v,
        n_seqs=n_seq_max,
        repacks=repacks_weights(),
    )
    n_shared = n_seq_max * min(n_ctx, _CELLS_PER_SEQUENCE)
    n_cells = max(n_ctx, planner.largest_n_cells(n_shared) if n_shared > n_ctx else 0)
    plan = planner.plan(n_cells)
    whole = frozenset(member.name for member in plan.members if member.n_gpu_layers == member.n_layers)
    return Placement(n_seq_max, n_cells, plan.layers, plan.splits, whole)


class Members:
    """Models and contexts of `files`, loaded.

    models: each file once, the large model's first. backends: role -> its context. interrupt: stops them all.
    n_ctx, n_threads, type_k, type_v: as in FusedLlama. Raises LoadError, OutOfMemoryError or InvalidParameterError.
    """

    def __init__(
        self,
        files: FamilyFiles,
        placement: Placement,
        *,
        n_ctx: int,
        n_threads: int,
        type_k: str | None,
        type_v: str | None,
    ) -> None:
        self.interrupt = Interrupt()
        self.backends: dict[str, LlamaBackend] = {}
        loaded: dict[Path, Model] = {}
        with ExitStack() as stack:
            for name, info in files.models.items():
                if info.path not in loaded:
                    where = placement.layers[name], placement.splits[name]
                    require_harmless(info, *where)
                    loaded[info.path] = Model(info.path, *where)
                    stack.callback(loaded[info.path].close)
            models = {name: loaded[info.path] for name, info in files.models.items()}
            for name, model in models.items():
                self.backends[name] = LlamaBackend(
                    model,
                    name,
                    n_ctx=n_ctx,
                    n_seq_max=placement.n_seq_max,
                    n_cells=placement.n_cells,
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


def _n_seq_max(n_parallel: int | Literal["auto"], *, is_on_gpu: bool) -> int:
    is_number = isinstance(n_parallel, int) and not isinstance(n_parallel, bool) and 1 <= n_parallel <= MAX_PARALLEL
    if not is_number and n_parallel != "auto":
        raise InvalidParameterError(f"n_parallel must be auto or 1 to {MAX_PARALLEL}, not {n_parallel!r}")
    return _AUTO_PARALLEL[is_on_gpu] if n_parallel == "auto" else int(n_parallel)
