"""One training loop for whole models: pre-training and ceilings. It resumes from its checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from edge_dlf.evidence.train.model import Linear, Llama

_SAVE_EVERY_S = 90.0


@dataclass(frozen=True)
class Schedule:
    """lr: of matrices (Muon, in AdamW's units) and of the rest (AdamW); warm-up, constant, then linear to 0."""

    n_steps: int
    lr: float
    warm_up: float = 0.02
    decay: float = 0.4

    def lr_at(self, step: int) -> float:
        done = (step + 1) / self.n_steps
        return self.lr * min(1.0, done / self.warm_up, (1 - done) / self.decay + 1 / self.n_steps)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Batches(Protocol):
    """By step: tokens and targets, each (B, N) int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> tuple[Tensor, Tensor]: ...


Loss = Callable[[Tensor, Tensor], Tensor]


def train(
    model: Llama,
    batches: Batches,
    schedule: Schedule,
    checkpoint: Path,
    name: str,
    *,
    seed: int,
) -> None:
    """Train `model` in place on the batches in turn, over one schedule.

    Under torchrun each process takes its share of
    every batch. Raises ValueError where the batches do not suffice for the schedule.
    """
    rank, n_processes = join()
    if len(batches) < schedule.n_steps:
        raise ValueError(f"{name}: there are batches for {len(batches)} steps, not {schedule.n_steps}")
    torch.manual_seed(seed)
    model.to(device())
    optimizers = _optimizers(model)
    n_done = _resume(checkpoint, model, optimizers)
    loss_of = torch.compile(model.loss, dynamic=False) if _can_compile() else model.loss
    saved, smooth = time.monotonic(), math.nan
    with tqdm(total=schedule.n_steps, initial=n_done, desc=name, unit="step", mininterval=2, disable=rank > 0) as bar:
        for step in range(n_done, schedule.n_steps):
            batch = batches[step]
            with torch.autocast(device().type, torch.bfloat16):
                loss = shared_loss(model, loss_of, batch, rank, n_processes)
            loss.backward()
            _average(model, n_processes)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = schedule.lr_at(step)
                optimizer.step()
                optimizer.zero_grad()
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix_str(f"loss {smooth:.3f}")
            bar.update()
            if rank == 0 and (time.monotonic() - saved > _SAVE_EVERY_S or step + 1 == schedule.n_steps):
                _save(checkpoint, model, optimizers, step + 1)
                saved = time.monotonic()


def shared_loss(model: Llama, loss_of: Loss, batch: tuple[Tensor, Tensor], rank: int, n_processes: int) -> Tensor:
    """What a process minimises on its share of the batch's rows: the mean of all processes' is the batch's own loss."""
    tokens, targets = (part[rank::n_processes].to(device()) for part in batch)
    if not len(tokens):
        return 0.0 * torch.stack([parameter.sum() for parameter in _trained(model).values()]).sum()
    share = n_processes * int((targets >= 0).sum()) / int((batch[1] >= 0).sum()) if n_processes > 1 else 1.0
    return loss_of(tokens, targets) * share


def join() -> tuple[int, int]:
    """This process's rank and how many there are. On CPUs that others use too, processes are quicker than threads."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _average(model: Llama, n_processes: int) -> None:
    """Make every process's gradients their mean."""
    if n_processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / n_processes).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Phases:
    """Batches of each phase's rows in turn and in order.

    phases: rows (R, 2, n) of tokens and targets. A step takes `n_rows` rows of the first phase's length, as many tokens
    of the others.
    """

    def __init__(self, phases: Sequence[np.ndarray], n_rows: int) -> None:
        n_tokens = n_rows * phases[0].shape[-1]
        self._parts = []
        for rows in phases:
            each = max(1, n_tokens // rows.shape[-1])
            self._parts += [(rows, start, start + each) for start in range(0, len(rows) - each + 1, each)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rows, start, stop = self._parts[step]
        part = torch.from_numpy(np.asarray(rows[start:stop], dtype=np.int64))
        return part[:, 0], part[:, 1]


def _optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = {
        id(parameter) for module in model.modules() if isinstance(module, Linear) for parameter in module.parameters()
    }
    matrices = [parameter for parameter in trained if id(parameter) in hidden]
    others = [parameter for parameter in trained if id(parameter) not in hidden]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _can_compile() -> bool:
    """Compiling takes a C++ compiler; EDGE_DLF_COMPILE=0 does without."""
    return os.environ.get("EDGE_DLF_COMPILE", "1") != "0"


def _resume(checkpoint: Path, model: Llama, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location=device(), weights_only=True)
    load_trained(model, state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def load_trained(model: Llama, weights: Mapping[str, Any]) -> None:
    """Give `model` the weights of a checkpoint: those that are trained, all of them."""
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    if missing & _trained(model).keys():
        raise ValueError("the checkpoint is of another model")


def _trained(model: Llama) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save(checkpoint: Path, model: Llama, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    state = {"model": _trained(model), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)
