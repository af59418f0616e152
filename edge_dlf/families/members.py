"""The members of a family in memory: models, one context each, and how much of the machine the contexts take."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from ..engine.ensemble import Ensemble
from ..engine.overlap import choose_overlap
from ..engine.prompt_cache import PromptCache
from ..errors import OutOfMemoryError
from ..llama import Interrupt, LlamaBackend, Model, gpus, repacks_weights, system_info, versions
from ..params import OVERLAPS, Number, Overlap
from ..system.machine import this_machine
from ..system.remembered import states
from .files import FamilyFiles
from .footprint import footprint
from .guard import require_adapters_run, require_runs
from .plan import Plan, Planner

logger = logging.getLogger(__name__)

_ONE_TEXT = frozenset({"arwkv7", "plamo2", "rwkv6qwen2"})
"""Architectures of which llama.cpp computes wrong logits for prompts of several texts in one batch."""
MAX_PARALLEL = 256
"""Sequences that llama.cpp can tell apart."""
_AUTO_PARALLEL = 16, 32
"""Default number of sequences decoded at once: on a CPU, and on a GPU."""
_THREAD_SAFE = ("CUDA", "ROCm", "MTL")
"""Prefixes of the names of devices whose contexts may be used from several threads."""
_STREAM = 256
"""llama.cpp rounds the positions of a stream of a KV cache up to a multiple of this."""
_STREAMS_WEIGHTS = 64 * 2**20
"""Bytes of the largest model from which a KV stream for each sequence is faster."""
_MOVED_BYTES = 128 * 2**20
"""Most bytes of one sequence's KV stream: two streams are copied while they are swapped."""
_LONG = "rope_factors_long.weight"
"""Tensor of models that turn keys by other factors in long contexts."""
_CELLS_PER_SEQUENCE = 1024
"""Positions of the shared KV cache for each sequence; a longer sequence uses what others leave free."""


def plan_memory(
    files: FamilyFiles,
    *,
    n_ctx: int,
    n_parallel: int | Literal["auto"] = 1,
    names: Collection[str] = (),
    beside: Plan | None = None,
    **asked: Any,
) -> Plan:
    """Find room for members of `files`, before they are loaded, on this machine as it is now.

    names: the members; by default those that the method in the family's defaults decodes.
    beside: plan of members that are in memory already, whose number of sequences and size of caches the others get.
    Other arguments are those of FusedLlama; those in `asked` go to Planner.

    Sequences share as many positions as memory allows, of one context at least, and more than that only where they push
    no layer off a GPU. Raises OutOfMemoryError or InvalidParameterError.
    """
    machine = this_machine(gpus())
    asked_for = Number(1, MAX_PARALLEL, is_whole=True, words=("auto",)).read("n_parallel", n_parallel)
    n_seqs = _AUTO_PARALLEL[bool(machine.gpus)] if asked_for == "auto" else asked_for
    if n_seqs > 1 and (alone := sorted(_ONE_TEXT.intersection(info.architecture for info in files.models.values()))):
        logger.warning("llama.cpp computes texts of %s rightly one at a time only, so that is done", alone[0])
        n_seqs = 1
    planner = Planner(
        files,
        machine,
        n_seqs=beside.n_seqs if beside else n_seqs,
        repacks=repacks_weights(),
        names=names or files.roles(files.spec.settings()).members,
        beside=beside,
        **asked,
    )
    if beside:
        return planner.plan(beside.n_cells)
    if planner.lacks_gpu:
        logger.warning("there is no GPU that this build of llama.cpp can use: everything runs on the CPU")
    n_shared = n_seqs * min(n_ctx, _CELLS_PER_SEQUENCE)
    return planner.plan(max(n_ctx, planner.largest_n_cells(n_shared, n_ctx) if n_shared > n_ctx else 0))


class Members:
    """Models and contexts of the members in `plan`, loaded; others of the family are loaded when they are needed.

    planned: `plan_memory` with all arguments that made `plan`.
    plan: of all members that are loaded.
    backends: role -> its context.
    vocabulary: the large model, or its tokens alone where it is not a member.
    lanes: groups of roles that run one after the other: each member that is wholly on GPUs alone, and all others, which
        share the CPU, together.
    key: text that identifies everything that their speed depends on.
    interrupt: stops them all.

    n_ctx, settings (n_threads, type_k, type_v): as in FusedLlama. Raises LoadError, OutOfMemoryError or
        InvalidParameterError.
    """

    def __init__(
        self, files: FamilyFiles, plan: Plan, planned: Callable[..., Plan], *, n_ctx: int, **settings: Any
    ) -> None:
        self.interrupt = Interrupt()
        on_host = tuple(name for name in files.models if name not in plan.on_gpu)
        self.lanes = (*((name,) for name in files.models if name in plan.on_gpu), *([on_host] if on_host else []))
        self.backends: dict[str, LlamaBackend] = {}
        self.key = _key(files, plan, settings)
        self.plan = dataclasses.replace(plan, members=())
        self._files, self._planned, self._n_ctx, self._settings = files, planned, n_ctx, settings
        self._models: dict[Path, Model] = {}
        self._state_keys: dict[str, bytes] = {}
        self._streams: bool | None = None
        large = files.models["large"].path
        with ExitStack() as self._closing:
            self._load(plan)
            if large not in self._models:
                self.vocabulary = Model(large, vocab_only=True)
                self._closing.callback(self.vocabulary.close)
            else:
                self.vocabulary = self._models[large]
            self._closing = self._closing.pop_all()

    def ensemble(self, prompt_cache: PromptCache | None = None) -> Ensemble:
        """Return the members as the engine decodes them, which asks for the others when a request needs them."""
        files, names = self._files, tuple(self._files.models)
        return Ensemble(
            self.backends,
            files.n_vocab,
            self.lanes,
            names=names,
            load=self._load_more,
            correctors=files.correctors,
            maps=files.tokens.maps,
            prompt_cache=prompt_cache,
            state_keys=self._state_keys,
        )

    def set_overlap(self, ensemble: Ensemble, overlap: Overlap | Literal["auto"]) -> None:
        """Let members that are wholly on GPUs be decoded at the same time, as asked, or as is fastest here."""
        if overlap != "auto":
            ensemble.overlap = overlap
            if overlap != "off" and len(ensemble.groups) == 1:
                logger.warning("no member is wholly on a GPU: they are decoded in turn")
        elif len(ensemble.groups) > 1:
            choose_overlap(ensemble, self.key, ways_to_overlap())

    def _load(self, plan: Plan) -> Mapping[str, LlamaBackend]:
        """Load the members of `plan`. Returns their contexts. What an error leaves half done is freed."""
        files, loaded = self._files, dict(self._models)
        backends: dict[str, LlamaBackend] = {}
        with ExitStack() as stack:
            file_states = {member.name: self._file_states(member.name) for member in plan.members}
            for member in plan.members:
                info = files.models[member.name]
                if info.path not in loaded:
                    where = plan.layers[member.name], plan.splits[member.name]
                    require_runs(info, *where)
                    loaded[info.path] = Model(info.path, *where, info.tensors)
                    stack.callback(loaded[info.path].close)
            if adapters := {m.name: files.loras[m.name] for m in plan.members if m.name in files.loras}:
                one = next(iter(adapters))
                require_adapters_run(files.models[one], adapters, plan.layers[one], plan.splits[one])
            if self._streams is None:
                self._streams = self._can_stream(plan, loaded)
            # Plain attention reads every cell of a cache, flash attention leaves out those of other sequences.
            has_own_cache = self._streams or plan.n_seqs == 1
            for member in plan.members:
                name = member.name
                backends[name] = LlamaBackend(
                    loaded[files.models[name].path],
                    name,
                    n_ctx=self._n_ctx,
                    n_seq_max=plan.n_seqs,
                    n_cells=plan.n_cells,
                    streams=self._streams,
                    n_ubatch=member.n_ubatch if has_own_cache else None,
                    loras=files.loras.get(name, ()),
                    interrupt=self.interrupt,
                    **self._settings,
                )
                stack.callback(backends[name].close)
                self._state_keys[name] = self._state_key(backends[name], file_states[name])
            self._closing.push(stack.pop_all())
        self._models, self.backends = loaded, {**self.backends, **backends}
        self.plan = dataclasses.replace(self.plan, members=(*self.plan.members, *plan.members))
        return backends

    def _file_states(self, name: str) -> list[Any]:
        """What tells the files of a member from others, and from what may lie there later."""
        paths = [*self._files.models[name].shards, *(path for path, _ in self._files.loras.get(name, ()))]
        return [[str(path.resolve()), *state] for path, state in zip(paths, states(paths), strict=True)]

    def _state_key(self, member: LlamaBackend, file_states: list[Any]) -> bytes:
        """All that a member's states depend on beside the tokens."""
        n_positions = member.n_ctx if member.has_streams else member.n_cells
        facts = [
            [versions(), system_info(), [[gpu.name, gpu.description] for gpu in gpus()]],
            [file_states, [scale for _, scale in member.loras]],
            [self._settings["type_k"] or "f16", self._settings["type_v"] or "f16", member.n_ubatch is None],
            # A state has a place for each stream, and some models turn keys by the size of the context.
            member.n_seq_max if member.has_streams else 1,
            n_positions if _LONG in self._files.models[member.name].tensors else None,
        ]
        return blake2b(json.dumps(facts).encode()).digest()

    def _load_more(self, names: Sequence[str]) -> Mapping[str, LlamaBackend]:
        """Load members beside those that are loaded. Raises LoadError or OutOfMemoryError."""
        missing = ", ".join(names)
        try:
            plan = self._planned(names=names, beside=self.plan)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"this method also needs {missing}: {error}") from error
        logger.warning("loading %s, which the family's own method does not need", missing)
        return self._load(plan)

    def _can_stream(self, plan: Plan, loaded: Mapping[Path, Model]) -> bool:
        """Whether each sequence gets a KV stream of its own.

        Attention over one cache for all goes through every sequence's cells; with a stream for each, only through its
        own. What can be saved of a stream lacks what a window has left behind, and a trim may need again.
        """
        if not _have_own_room(plan, self._n_ctx) or max(m.n_bytes for m in loaded.values()) < _STREAMS_WEIGHTS:
            return False
        others = [footprint(info) for info in self._files.models.values() if info.path not in loaded]
        return all(model.can_trim and not model.has_window for model in loaded.values()) and all(
            not own.state and own.n_masks == 1 for own in others
        )

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends an answer for any member, loaded or not."""
        # What llama.cpp tells by their text, every model that has these tokens has by the same text.
        return self.vocabulary.is_eog(token) or token in self._files.tokens.ends

    def close(self) -> None:
        """Free contexts and weights. Calling it twice is no error."""
        self._closing.close()


def ways_to_overlap() -> tuple[Overlap, ...]:
    """Ways to overlap that are safe here: llama.cpp is tested with contexts in several threads on some backends only;
    on others crashes are reported."""
    return OVERLAPS if all(gpu.name.startswith(_THREAD_SAFE) for gpu in gpus()) else ("off", "queue")


def _key(files: FamilyFiles, plan: Plan, settings: Mapping[str, Any]) -> str:
    paths = {path: None for info in files.models.values() for path in info.shards}
    paths |= {path: None for pairs in files.loras.values() for path, _ in pairs}
    facts = [
        system_info(),
        [[gpu.name, gpu.description, gpu.total_bytes] for gpu in gpus()],
        [[str(path.resolve()), *state] for path, state in zip(paths, states(list(paths)), strict=True)],
        [[member.name, plan.layers[member.name], member.split] for member in plan.members],
        [plan.n_seqs, *settings.values()],
    ]
    return json.dumps(facts)


def _have_own_room(plan: Plan, n_ctx: int) -> bool:
    """Whether each of several sequences has room for a whole context of its own, and not much to move."""
    is_whole = plan.n_seqs > 1 and n_ctx % _STREAM == 0 and plan.n_cells == n_ctx * plan.n_seqs
    return is_whole and max(member.cache_bytes for member in plan.members) <= plan.n_seqs * _MOVED_BYTES
