"""Memory planned before anything is loaded: what each member takes, how layers are shared out, and what would fit.

Members decode the same tokens and share one machine: every model keeps its weights once, every member a context of its
own. Where GPUs cannot hold all, small models go there first: they run as often as the large one and cost less. Of
several GPUs a model gets one where one can hold it, the fullest such one; otherwise its layers are spread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..engine.backend import N_LENT, N_ROWS
from ..errors import OutOfMemoryError
from ..system.machine import Machine
from .files import FamilyFiles
from .footprint import Footprint, footprint, rounded

KERNELS_BYTES = 150_000_000
"""Compiled kernels and their compiler."""
_KERNELS_ADDRESS_BYTES = 450_000_000  # the same with threads' stacks and arenas, of which little is ever touched
_GPU_RESERVE_BYTES = 400_000_000  # the driver's own, on each GPU
_LEAST_CELLS = 256
_SPARE = 0.01  # share of the free memory that a context named in an error leaves: the next process has a little less
_PIPELINE_COPIES = 4  # of what goes into a graph, where llama.cpp spreads one over several GPUs


@dataclass(frozen=True)
class MemberPlan:
    """Memory and layers of one member, on the host and on GPUs together.

    weights_bytes: LoRA adapters included; 0 for a model that is shared with the member `shares_with`.
    n_layers, n_gpu_layers: all layers, the head counted as one, and those of them on GPUs.
    split: share of these that each GPU holds.
    n_ubatch: tokens to evaluate at a time with plain attention, if each sequence has a cache of its own; None for flash
        attention.
    """

    name: str
    weights_bytes: int
    cache_bytes: int
    buffer_bytes: int
    n_layers: int
    n_gpu_layers: int
    split: tuple[float, ...] = ()
    shares_with: str | None = None
    n_ubatch: int | None = None


@dataclass(frozen=True)
class Plan:
    """A family in memory.

    n_seqs: sequences decoded at once.
    n_cells: positions that they share in the KV cache of each member.
    layers: n_gpu_layers of each member, as llama.cpp takes it.
    host_bytes, each_gpu_bytes: what all members together take there.
    left_bytes: what is left on each GPU, below 0 if too little.
    address_bytes: of address space, in which repacked weights count twice.
    """

    n_seqs: int
    n_cells: int
    members: tuple[MemberPlan, ...]
    layers: Mapping[str, int]
    host_bytes: int
    each_gpu_bytes: tuple[int, ...]
    left_bytes: tuple[int, ...]
    address_bytes: int

    @property
    def splits(self) -> dict[str, tuple[float, ...]]:
        """Share of each member's layers that each GPU holds; empty without a GPU."""
        return {member.name: member.split for member in self.members}

    @property
    def on_gpu(self) -> frozenset[str]:
        """Members of which no layer is on the host."""
        return frozenset(member.name for member in self.members if member.n_gpu_layers == member.n_layers)

    @property
    def n_on_gpu(self) -> int:
        """Layers of all models on GPUs."""
        return sum(member.n_gpu_layers for member in self.members if not member.shares_with)

    @property
    def n_bytes(self) -> int:
        """Bytes of all members."""
        return sum(member.weights_bytes + member.cache_bytes + member.buffer_bytes for member in self.members)


class _Layout(NamedTuple):
    """Where one model is: layers on GPUs, the share of each GPU, and bytes on the host and on each GPU.

    Without any layer there, a GPU with a share computes long batches.
    """

    n_gpu: int
    split: tuple[float, ...]
    host_bytes: int
    each_gpu_bytes: tuple[int, ...]


@dataclass(frozen=True)
class _Model:
    """One file, and the members that are contexts over it.

    wanted: n_gpu_layers asked for, -1 for as many as fit.
    split: shares of GPUs asked for.
    """

    size: Footprint
    members: tuple[str, ...]
    lora_bytes: int
    wanted: int
    split: tuple[float, ...] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.size.layers) + 1

    def layout(self, n_gpu: int, split: Sequence[float], n_cells: int, n_rows: int, n_seqs: int) -> _Layout:
        """Put the head and the last n_gpu - 1 layers on GPUs, divided by `split`.

        What has many rows is computed there all the same: llama.cpp lends it weights and caches of the host one by one.
        """
        own, n_members = self.size, len(self.members)
        n_low = len(own.layers) - max(n_gpu - 1, 0)
        cells = rounded(n_cells)
        caches = [int(kv * cells) + own.states(n_seqs) // len(own.layers) for kv in own.kv]
        layers = [w + n_members * cache for w, cache in zip(own.layers, caches, strict=True)]
        host = own.input + own.vocabulary + sum(layers[:n_low]) + n_members * own.checkpoints
        n_used = sum(share > 0 for share in split)
        compute = own.compute(n_cells, n_rows, n_copies=_PIPELINE_COPIES if n_used > 1 and n_gpu else 1)
        host += n_members * (compute if n_low else 4 * n_rows * own.n_vocab)
        lent = max(own.widest, *caches) if n_low else 0
        if not n_gpu and n_rows >= N_LENT:
            lent = max(lent, own.output)
        loras = self.lora_bytes if n_gpu else 0
        each = [n_members * (compute + lent) + loras if share > 0 else 0 for share in split]
        if not n_gpu:
            host += self.lora_bytes + (0 if own.is_tied else own.output)
            return _Layout(0, tuple(split), host, tuple(each))
        for number, n_bytes in enumerate([*layers[n_low:], own.output]):
            each[gpu_of_layer(number, n_gpu, split)] += n_bytes
        return _Layout(n_gpu, tuple(split), host, tuple(each))


def gpu_of_layer(number: int, n_gpu: int, split: Sequence[float]) -> int:
    """The GPU that llama.cpp gives the layer `number` of `n_gpu` to: the first whose shares, with all before it, exceed
    its part of the way through them."""
    total, before = math.fsum(split), 0.0
    for gpu, share in enumerate(split):
        before += share
        if before / total > number / n_gpu:
            return gpu
    return len(split) - 1


class Planner:
    """Plans a family for one machine.

    n_gpu_layers, main_gpu, tensor_split: as in FusedLlama; -1 layers are all that fit.
    n_rows: rows of logits that one decode may ask for.
    n_seqs: sequences decoded at once.
    repacks: whether the CPU keeps weights twice.
    names: members to plan; None for all.
    beside: plan of members that are in memory already; weights that they have are not needed again.
    Its attribute `lacks_gpu` says whether a GPU was asked for on a machine without one.

    Raises InvalidParameterError for cache types, names of members and GPUs that do not exist.
    """

    def __init__(
        self,
        files: FamilyFiles,
        machine: Machine,
        *,
        n_gpu_layers: int | Mapping[str, int] = -1,
        main_gpu: int | Mapping[str, int] | None = None,
        tensor_split: Sequence[float] | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        n_rows: int = N_ROWS,
        n_seqs: int = 1,
        repacks: bool = True,
        names: Collection[str] | None = None,
        beside: Plan | None = None,
    ) -> None:
        self.machine = machine
        self._repacks = repacks
        self._files = files
        self._wanted = files.layers(n_gpu_layers)
        self._splits = files.splits(main_gpu, tensor_split, len(machine.gpus))
        is_wanted = max(self._wanted.values()) > 0 or main_gpu is not None or tensor_split is not None
        self.lacks_gpu = is_wanted and not machine.gpus
        self._n_rows, self._n_seqs = max(n_rows, n_seqs), n_seqs
        self._names = tuple(name for name in files.models if names is None or name in names)
        self._beside = beside.members if beside else ()
        sizes = {files.models[name].path: footprint(files.models[name], type_k, type_v) for name in self._names}
        self._models = [self._model(path, size) for path, size in sizes.items()]

    def _model(self, path: Path, own: Footprint) -> _Model:
        roles = [name for name, info in self._files.models.items() if info.path == path]
        members = tuple(name for name in roles if name in self._names)
        loras = {lora for name in members for lora, _ in self._files.loras.get(name, ())}
        n_lora_bytes = sum(lora.stat().st_size for lora in loras)
        wanted, split = min(self._wanted[roles[0]], len(own.layers) + 1), self._splits.get(roles[0])
        if loaded := next((member for member in self._beside if member.name in roles), None):
            own, wanted, split = own.without_weights(), loaded.n_gpu_layers, loaded.split
        return _Model(own, members, n_lora_bytes, wanted if self.machine.gpus else 0, split)

    def plan(self, n_cells: int) -> Plan:
        """The family with `n_cells` positions in every KV cache. Raises OutOfMemoryError, which says what would fit."""
        best = self._arranged(n_cells)
        if not self._fits(best):
            raise OutOfMemoryError(self._why(best))
        return best

    def largest_n_cells(self, at_most: int, least: int = 0, spare: float = 0.0) -> int:
        """The largest context up to `at_most` that fits; 0 if not even the smallest does.

        least: a larger context than this counts only if it moves no more layers off the GPUs than this one does.
        spare: share of the free memory that it leaves free.
        """
        n_on_gpu = self._arranged(least).n_on_gpu if least else 0
        low, high = 0, at_most // _LEAST_CELLS
        while low < high:
            middle = (low + high + 1) // 2
            arranged = self._arranged(middle * _LEAST_CELLS)
            if self._fits(arranged, spare) and arranged.n_on_gpu >= n_on_gpu:
                low = middle
            else:
                high = middle - 1
        return low * _LEAST_CELLS

    def _arranged(self, n_cells: int, n_wanted: int | None = None) -> Plan:
        """Give GPUs what is asked for, then whole models from the smallest on, then the layers for which there is room.

        Layers of a part of a model leave larger models room to compute their prompts there.
        n_wanted: in place of what is asked for.
        """
        wanted = {model: model.wanted if n_wanted is None else n_wanted for model in self._models}
        left = [max(0, gpu.free_bytes - _GPU_RESERVE_BYTES) for gpu in self.machine.gpus]
        layouts: dict[_Model, _Layout] = {}
        order = sorted(self._models, key=lambda m: (wanted[m] < 0, sum(m.size.layers) + m.size.output))
        for number, model in enumerate(order):
            lent = sum(sum(self._lent(larger, left, n_cells).each_gpu_bytes) for larger in order[number + 1 :])
            for layout in self._layouts(model, wanted[model], left, n_cells):
                layouts[model] = layout
                is_part = wanted[model] < 0 < layout.n_gpu < model.n_layers
                rooms = [room - lent * (is_part and room == max(left)) for room in left]
                if all(n_bytes <= room for n_bytes, room in zip(layout.each_gpu_bytes, rooms, strict=True)):
                    break
            left = [room - taken for room, taken in zip(left, layouts[model].each_gpu_bytes, strict=True)]
        each = tuple(map(sum, zip(*(layout.each_gpu_bytes for layout in layouts.values()), strict=True)))
        host = sum(layout.host_bytes for layout in layouts.values()) + (0 if self._beside else KERNELS_BYTES)
        if self.machine.gpus and all(device.shares_host for device in self.machine.gpus):
            host += sum(each)
        copies = sum(m.size.repacked for m, layout in layouts.items() if self._repacks and not layout.n_gpu)
        members = {name: self._member(name, m, layout, n_cells) for m, layout in layouts.items() for name in m.members}
        in_order = tuple(members[name] for name in self._names)
        layers = {
            m.name: self._wanted[m.name] if m.n_gpu_layers == m.n_layers or not self.machine.gpus else m.n_gpu_layers
            for m in in_order
        }
        address = host + copies + _KERNELS_ADDRESS_BYTES
        return Plan(self._n_seqs, n_cells, in_order, layers, host, each, tuple(left), address)

    def _layouts(self, model: _Model, n_wanted: int, left: Sequence[int], n_cells: int) -> Iterator[_Layout]:
        """Layouts of a model, best first: the most layers on GPUs; as asked for, or on one GPU, the fullest first, so
        that a larger model finds an empty one, or spread by the memory that is left. The last uses no GPU."""
        numbers = range(len(left))
        splits = [model.split] if model.split else [_only(n, len(left)) for n in sorted(numbers, key=left.__getitem__)]
        if not model.split and len(left) > 1 and sum(room > 0 for room in left) > 1:
            splits.append(tuple(float(max(0, room)) for room in left))
        for n_gpu in [n_wanted] if n_wanted >= 0 else range(model.n_layers, -1, -1):
            for split in splits if n_gpu else ():
                yield model.layout(n_gpu, split, n_cells, self._n_rows, self._n_seqs)
        if n_wanted <= 0:
            yield self._lent(model, left, n_cells)
            yield model.layout(0, (0.0,) * len(left), n_cells, self._n_rows, self._n_seqs)

    def _lent(self, model: _Model, left: Sequence[int], n_cells: int) -> _Layout:
        """The layout of a model without layers on GPUs, of which one computes long batches: the emptiest."""
        split = model.split or _only(max(range(len(left)), key=left.__getitem__, default=0), len(left))
        return model.layout(0, split, n_cells, self._n_rows, self._n_seqs)

    def _member(self, name: str, model: _Model, layout: _Layout, n_cells: int) -> MemberPlan:
        own, shares = model.size, model.members[0] if name != model.members[0] else None
        loras = sum(path.stat().st_size for path, _ in self._files.loras.get(name, ()))
        copy = own.output if own.is_tied and layout.n_gpu else 0
        return MemberPlan(
            name,
            weights_bytes=loras + (0 if shares else own.weights + copy),
            cache_bytes=own.cache(n_cells) + own.states(self._n_seqs) + own.checkpoints,
            buffer_bytes=own.compute(n_cells, self._n_rows) + (0 if shares else own.vocabulary),
            n_layers=model.n_layers,
            n_gpu_layers=layout.n_gpu,
            split=layout.split,
            shares_with=shares,
            # Of prompts that the CPU computes beside a GPU, the weights go over once for each batch.
            n_ubatch=None if self.machine.gpus else own.n_ubatch(n_cells // self._n_seqs, self._n_seqs),
        )

    def _fits(self, best: Plan, spare: float = 0.0) -> bool:
        address, share = self.machine.address_bytes, 1.0 - spare
        return (
            min(best.left_bytes, default=0) >= 0
            and best.host_bytes <= share * self.machine.free_bytes
            and (address is None or best.address_bytes <= share * address)
        )

    def _why(self, best: Plan) -> str:
        """What is missing, and what would fit."""
        *others, last = (name for model in self._models for name in model.members)
        names = f"{', '.join(others)} and {last} need" if others else f"{last} needs"
        if min(best.left_bytes, default=0) < 0:
            number = min(range(len(best.left_bytes)), key=best.left_bytes.__getitem__)
            device, n_bytes = self.machine.gpus[number], best.each_gpu_bytes[number]
            where = "the GPU" if len(self.machine.gpus) == 1 else device.name
            need = f"{names} {_gb(n_bytes)} on {where} with these layers, {_gb(device.free_bytes)} are free there"
            shared = self._arranged(best.n_cells, -1)
            layers = ",".join(f"{m.name}={m.n_gpu_layers}" for m in shared.members if not m.shares_with)
            if self._fits(shared):
                return f"{need}; n_gpu_layers of {layers} would fit"
        else:
            free, limit, total = self.machine.free_bytes, self.machine.limit, best.host_bytes
            if self.machine.address_bytes is not None and best.address_bytes > self.machine.address_bytes:
                total, free, limit = best.address_bytes, self.machine.address_bytes, "ulimit -v"
            left = f"{_gb(free)} are free" + (f" (by {limit})" if limit else "")
            caches = sum(len(model.members) * model.size.cache(best.n_cells) for model in self._models)
            need = f"{names} {_gb(total)}, {_gb(caches)} of it for a context of {best.n_cells}; {left}"
        fitting = self.largest_n_cells(best.n_cells, spare=_SPARE)
        if fitting:
            return f"{need}; a context of {fitting} would fit"
        return f"{need}; not even the smallest context would fit: take smaller files or a stronger quantization"


def _only(number: int, n_gpus: int) -> tuple[float, ...]:
    """The whole share for one GPU."""
    return tuple(float(n == number) for n in range(n_gpus))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
