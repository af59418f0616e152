"""The members of a family in memory: models, one context each, and how much of the machine the contexts take."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import InvalidParameterError
from ..llama import Interrupt, LlamaBackend, Model, gpus, repacks_weights, system_info
from ..params import OVERLAPS, Overlap
from ..system.machine import this_machine
from ..system.remembered import states
from .files import FamilyFiles
from .guard import require_harmless
from .plan import Planner

logger = logging.getLogger(__name__)

MAX_PARALLEL = 256
"""Sequences that llama.cpp can tell apart."""
_AUTO_PARALLEL = 16, 32
"""Sequences decoded at once where nobody says how many: on a CPU, and on a GPU."""
_THREAD_SAFE = ("CUDA", "ROCm", "MTL")
"""Names of devices, as they begin."""
_STREAM = 256
"""Positions of which llama.cpp makes a stream of a KV cache a multiple."""
_STREAMS_WEIGHTS = 64 * 2**20
"""Bytes of the large model from which on streams pay: of less, a batch in parts costs more than they save."""
_MOVED_BYTES = 128 * 2**20
"""Keys and values of one text, of which two are in memory once more while they change places."""
_CELLS_PER_SEQUENCE = 1024
"""Positions of the shared KV cache for each sequence; one that grows beyond takes what others leave."""


@dataclass(frozen=True)
class Placement:
    """How a family is to lie in memory: sequences decoded at once, positions that they share in each KV cache, and of
    each role n_gpu_layers and the share of them that each GPU holds. on_gpu: roles of which no layer is on the host.
    streams: whether each sequence has room for a whole context of its own, and not much to move. n_ubatch: where each
    sequence has a cache of its own, of each role as `MemberPlan` has it."""

    n_seq_max: int
    n_cells: int
    layers: Mapping[str, int]
    splits: Mapping[str, tuple[float, ...]]
    on_gpu: frozenset[str] = frozenset()
    streams: bool = False
    n_ubatch: Mapping[str, int | None] = field(default_factory=dict)


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

    Sequences share as many positions as memory allows, of one context at least, and more than that only where they push
    no layer off a GPU. Raises OutOfMemoryError or InvalidParameterError.
    """
    machine = this_machine(gpus())
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
    wants_gpu = n_gpu_layers.values() if isinstance(n_gpu_layers, Mapping) else [n_gpu_layers]
    if not machine.gpus and (max(wants_gpu, default=0) > 0 or main_gpu is not None or tensor_split is not None):
        logger.warning("there is no GPU that this build of llama.cpp can use: everything runs on the CPU")
    n_shared = n_seq_max * min(n_ctx, _CELLS_PER_SEQUENCE)
    n_cells = max(n_ctx, planner.largest_n_cells(n_shared, n_ctx) if n_shared > n_ctx else 0)
    plan = planner.plan(n_cells)
    whole = frozenset(member.name for member in plan.members if member.n_gpu_layers == member.n_layers)
    is_whole = n_seq_max > 1 and n_ctx % _STREAM == 0 and n_cells == n_ctx * n_seq_max
    streams = is_whole and max(member.cache_bytes for member in plan.members) <= n_seq_max * _MOVED_BYTES
    n_ubatch = {member.name: member.n_ubatch for member in plan.members}
    return Placement(n_seq_max, n_cells, plan.layers, plan.splits, whole, streams, n_ubatch)


class Members:
    """Models and contexts of `files`, loaded.

    models: each file once, the large model's first. backends: role -> its context. lanes: roles by what computes them,
    a GPU for one at a time, and the CPU, whose cores the others share. key: what their speed depends on. interrupt:
    stops them all.
    n_ctx, n_threads, type_k, type_v: as in FusedLlama. Raises LoadError, OutOfMemoryError or InvalidParameterError.
    """

    def __init__(
        self,
        files: FamilyFiles,
        placement: Placement,
        *,
        n_ctx: int,
        n_threads: int | None,
        type_k: str | None,
        type_v: str | None,
    ) -> None:
        self.interrupt = Interrupt()
        on_host = tuple(name for name in files.models if name not in placement.on_gpu)
        self.lanes = (*((name,) for name in files.models if name in placement.on_gpu), *([on_host] if on_host else []))
        self.backends: dict[str, LlamaBackend] = {}
        loaded: dict[Path, Model] = {}
        with ExitStack() as stack:
            for name, info in files.models.items():
                if info.path not in loaded:
                    where = placement.layers[name], placement.splits[name]
                    require_harmless(info, *where)
                    loaded[info.path] = Model(info.path, *where, info.tensors)
                    stack.callback(loaded[info.path].close)
            models = {name: loaded[info.path] for name, info in files.models.items()}
            # Attention over one cache for all goes through every sequence's cells; with a stream for each, only through
            # its own. What can be saved of a stream lacks what a window has left behind, and a trim may need again.
            streams = placement.streams and models["large"].n_bytes >= _STREAMS_WEIGHTS
            streams = streams and all(model.can_trim and not model.has_window for model in models.values())
            # Plain attention reads every cell of a cache, flash attention leaves out those of other sequences.
            has_own_cache = streams or placement.n_seq_max == 1
            for name, model in models.items():
                self.backends[name] = LlamaBackend(
                    model,
                    name,
                    n_ctx=n_ctx,
                    n_seq_max=placement.n_seq_max,
                    n_cells=placement.n_cells,
                    streams=streams,
                    n_ubatch=placement.n_ubatch.get(name) if has_own_cache else None,
                    n_threads=n_threads,
                    type_k=type_k,
                    type_v=type_v,
                    loras=files.loras.get(name, ()),
                    interrupt=self.interrupt,
                )
                stack.callback(self.backends[name].close)
            self.models = tuple(loaded.values())
            self.key = _key(files, placement, n_threads, type_k, type_v)
            self._closing = stack.pop_all()

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends an answer for any member."""
        return any(model.is_eog(token) for model in self.models)

    def close(self) -> None:
        """Free contexts and weights. Calling it twice is no error."""
        self._closing.close()


def ways_to_overlap() -> tuple[Overlap, ...]:
    """Ways to overlap that are safe to try here. llama.cpp tests contexts in several threads on these backends; of
    others, crashes are reported."""
    return OVERLAPS if all(gpu.name.startswith(_THREAD_SAFE) for gpu in gpus()) else ("off", "queue")


def _key(files: FamilyFiles, placement: Placement, *computed: object) -> str:
    paths = {path: None for info in files.models.values() for path in info.shards}
    paths |= {path: None for pairs in files.loras.values() for path, _ in pairs}
    facts = [
        system_info(),
        [[gpu.name, gpu.description, gpu.total_bytes] for gpu in gpus()],
        [[str(path.resolve()), *state] for path, state in zip(paths, states(list(paths)), strict=True)],
        [[name, placement.layers[name], placement.splits[name]] for name in files.models],
        [placement.n_seq_max, *computed],
    ]
    return json.dumps(facts)


def _n_seq_max(n_parallel: int | Literal["auto"], *, is_on_gpu: bool) -> int:
    is_number = isinstance(n_parallel, int) and not isinstance(n_parallel, bool) and 1 <= n_parallel <= MAX_PARALLEL
    if not is_number and n_parallel != "auto":
        raise InvalidParameterError(f"n_parallel must be auto or 1 to {MAX_PARALLEL}, not {n_parallel!r}")
    return _AUTO_PARALLEL[is_on_gpu] if n_parallel == "auto" else int(n_parallel)
