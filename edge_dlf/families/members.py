"""The members of a family in memory: models, one context each, and how much of the machine the contexts take."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidParameterError
from ..llama import Interrupt, LlamaBackend, Model, gpus, repacks_weights, system_info
from ..params import OVERLAPS, Overlap
from ..system.machine import this_machine
from ..system.remembered import states
from .files import FamilyFiles
from .guard import require_runs
from .plan import Plan, Planner

logger = logging.getLogger(__name__)

MAX_PARALLEL = 256
"""Sequences that llama.cpp can tell apart."""
_AUTO_PARALLEL = 16, 32
"""Default number of sequences decoded at once: on a CPU, and on a GPU."""
_THREAD_SAFE = ("CUDA", "ROCm", "MTL")
"""Prefixes of the names of devices whose contexts may be used from several threads."""
_STREAM = 256
"""llama.cpp rounds the positions of a stream of a KV cache up to a multiple of this."""
_STREAMS_WEIGHTS = 64 * 2**20
"""The smallest large model, in bytes, for which a KV stream for each sequence is faster."""
_MOVED_BYTES = 128 * 2**20
"""Most bytes of one sequence's KV stream: two streams are copied while they are swapped."""
_CELLS_PER_SEQUENCE = 1024
"""Positions of the shared KV cache for each sequence; a longer sequence uses what others leave free."""


def plan_memory(
    files: FamilyFiles,
    *,
    n_ctx: int,
    n_parallel: int | Literal["auto"],
    **asked: Any,
) -> Plan:
    """Find room for `files`, before anything is loaded, on this machine as it is now. Arguments as in FusedLlama; those
    in `asked` go to Planner.

    Sequences share as many positions as memory allows, of one context at least, and more than that only where they push
    no layer off a GPU. Raises OutOfMemoryError or InvalidParameterError.
    """
    machine = this_machine(gpus())
    is_number = isinstance(n_parallel, int) and not isinstance(n_parallel, bool) and 1 <= n_parallel <= MAX_PARALLEL
    if not is_number and n_parallel != "auto":
        raise InvalidParameterError(f"n_parallel must be auto or 1 to {MAX_PARALLEL}, not {n_parallel!r}")
    n_seqs = _AUTO_PARALLEL[bool(machine.gpus)] if n_parallel == "auto" else int(n_parallel)
    planner = Planner(files, machine, n_seqs=n_seqs, repacks=repacks_weights(), **asked)
    if planner.lacks_gpu:
        logger.warning("there is no GPU that this build of llama.cpp can use: everything runs on the CPU")
    n_shared = n_seqs * min(n_ctx, _CELLS_PER_SEQUENCE)
    return planner.plan(max(n_ctx, planner.largest_n_cells(n_shared, n_ctx) if n_shared > n_ctx else 0))


class Members:
    """Models and contexts of `files`, loaded.

    models: each file once, the large model's first.
    backends: role -> its context.
    lanes: groups of roles that run one after the other: each member that is wholly on GPUs alone, and all others, which
        share the CPU, together.
    key: text that identifies everything that their speed depends on.
    interrupt: stops them all.

    n_ctx, n_threads, type_k, type_v: as in FusedLlama. Raises LoadError, OutOfMemoryError or InvalidParameterError.
    """

    def __init__(
        self,
        files: FamilyFiles,
        plan: Plan,
        *,
        n_ctx: int,
        n_threads: int | None,
        type_k: str | None,
        type_v: str | None,
    ) -> None:
        self.interrupt = Interrupt()
        on_host = tuple(name for name in files.models if name not in plan.on_gpu)
        self.lanes = (*((name,) for name in files.models if name in plan.on_gpu), *([on_host] if on_host else []))
        self.backends: dict[str, LlamaBackend] = {}
        loaded: dict[Path, Model] = {}
        with ExitStack() as stack:
            for name, info in files.models.items():
                if info.path not in loaded:
                    where = plan.layers[name], plan.splits[name]
                    require_runs(info, *where)
                    loaded[info.path] = Model(info.path, *where, info.tensors)
                    stack.callback(loaded[info.path].close)
            models = {name: loaded[info.path] for name, info in files.models.items()}
            # Attention over one cache for all goes through every sequence's cells; with a stream for each, only through
            # its own. What can be saved of a stream lacks what a window has left behind, and a trim may need again.
            streams = _have_own_room(plan, n_ctx) and models["large"].n_bytes >= _STREAMS_WEIGHTS
            streams = streams and all(model.can_trim and not model.has_window for model in models.values())
            # Plain attention reads every cell of a cache, flash attention leaves out those of other sequences.
            has_own_cache = streams or plan.n_seqs == 1
            for member in plan.members:
                name = member.name
                self.backends[name] = LlamaBackend(
                    models[name],
                    name,
                    n_ctx=n_ctx,
                    n_seq_max=plan.n_seqs,
                    n_cells=plan.n_cells,
                    streams=streams,
                    n_ubatch=member.n_ubatch if has_own_cache else None,
                    n_threads=n_threads,
                    type_k=type_k,
                    type_v=type_v,
                    loras=files.loras.get(name, ()),
                    interrupt=self.interrupt,
                )
                stack.callback(self.backends[name].close)
            self.models = tuple(loaded.values())
            self.key = _key(files, plan, n_threads, type_k, type_v)
            self._closing = stack.pop_all()

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends an answer for any member."""
        return any(model.is_eog(token) for model in self.models)

    def close(self) -> None:
        """Free contexts and weights. Calling it twice is no error."""
        self._closing.close()


def ways_to_overlap() -> tuple[Overlap, ...]:
    """Ways to overlap that are safe here: llama.cpp is tested with contexts in several threads on some backends only;
    on others crashes are reported."""
    return OVERLAPS if all(gpu.name.startswith(_THREAD_SAFE) for gpu in gpus()) else ("off", "queue")


def _key(files: FamilyFiles, plan: Plan, *computed: object) -> str:
    paths = {path: None for info in files.models.values() for path in info.shards}
    paths |= {path: None for pairs in files.loras.values() for path, _ in pairs}
    facts = [
        system_info(),
        [[gpu.name, gpu.description, gpu.total_bytes] for gpu in gpus()],
        [[str(path.resolve()), *state] for path, state in zip(paths, states(list(paths)), strict=True)],
        [[name, plan.layers[name], plan.splits[name]] for name in files.models],
        [plan.n_seqs, *computed],
    ]
    return json.dumps(facts)


def _have_own_room(plan: Plan, n_ctx: int) -> bool:
    """Whether each of several sequences has room for a whole context of its own, and not much to move."""
    is_whole = plan.n_seqs > 1 and n_ctx % _STREAM == 0 and plan.n_cells == n_ctx * plan.n_seqs
    return is_whole and max(member.cache_bytes for member in plan.members) <= plan.n_seqs * _MOVED_BYTES
