"""The memory that training will take, found before it begins by a dry run in which nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import OutOfMemoryError
from ...system.machine import this_machine
from .batches import Batch
from .model import Llama
from .objective import Objective
from .shape import Shape

_RUNTIME_BYTES = 400 << 20
"""What torch takes beside tensors."""
_STATE = 6
"""Numbers for each weight that is trained: itself, its gradient, two moments of AdamW, and the best so far twice."""
_TRANSIENT = 1.25
"""Tensors that live for a moment only, relative to those that are kept for the gradient."""


def device() -> torch.device:
    """Where training runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matrix_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it quickly."""
    has_bfloat16 = device().type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def check_memory(shape: Shape, rank: int, objective: Objective, batches: Sequence[Batch]) -> int:
    """Return the bytes that training on the largest of these batches takes.

    Raises OutOfMemoryError, with the numbers, where there are fewer.
    """
    needed = planned_bytes(shape, rank, objective, batches)
    if device().type == "cuda":
        free, limit = torch.cuda.mem_get_info()[0], "of the GPU"
    else:
        machine = this_machine()
        free, limit = machine.free_bytes, f"by {machine.limit}" if machine.limit else "of memory"
    if needed > free:
        raise OutOfMemoryError(
            f"training needs about {needed / 1e9:.1f} GB {limit}, and {free / 1e9:.1f} GB are free; "
            "a smaller --batch, --max-length or --rank needs less"
        )
    return needed


def planned_bytes(shape: Shape, rank: int, objective: Objective, batches: Sequence[Batch]) -> int:
    """Bytes of weights, of what is trained, and of what the largest batch keeps for its gradient."""
    dtype = matrix_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = Llama(shape).requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
        model.add_lora(rank)
        weights = {name: parameter.untyped_storage() for name, parameter in model.named_parameters()}
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        n_bytes = sum(storage.nbytes() for storage in weights.values())
        known = {storage._cdata for storage in weights.values()}
        most = max(_kept_bytes(model, objective, batch.each(fake.from_tensor), known) for batch in batches)
    loading = 6 * prod((shape.n_vocab, shape.n_embd))  # the largest matrix in float32, and its copy
    state = (_STATE - 1) * 4 * n_trained
    n_most: int = n_bytes + max(loading, state + int(_TRANSIENT * most)) + _RUNTIME_BYTES
    return n_most


def _kept_bytes(model: Llama, objective: Objective, batch: Batch, known: set[int]) -> int:
    """Bytes that a forward pass keeps for the gradient."""
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)  # or another one would get the same number
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=matrix_dtype() == torch.bfloat16):
        objective(model, batch)
    return sum(kept.values())
