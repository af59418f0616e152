"""The training loop: steps, held-out loss, early stop, and a checkpoint from which the same command continues."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...errors import EdgeDLFError, InvalidParameterError
from ...system.durable import replacing
from ..examples import Example
from .batches import Batch, Batches, as_batch
from .memory import device, matrix_dtype
from .model import Llama
from .objective import Objective

_SAVE_EVERY_S = 60.0
_N_CHECKS = 10
"""Times that the held-out loss is computed over a whole training."""
_PATIENCE = 5
"""Checks in a row without a lower held-out loss after which training stops."""
_LARGEST_GRADIENT = 1.0
_WARM_UP = 0.05
_LARGEST = torch.finfo(torch.float16).max
"""Weights are written in F16."""


class Check(NamedTuple):
    """The held-out examples after `step` steps.

    loss: −log p in nats a token. right: part of the answers whose every token was the likeliest.
    sample: number of one example, and the tokens that were the likeliest along its answer.
    """

    step: int
    loss: float
    right: float
    sample: tuple[int, tuple[int, ...]]


@dataclass
class State:
    """How far training is.

    step: steps done, of n_steps. loss: moving average over steps, in nats a token. n_tokens: read by the steps of this
    run, in `elapsed_s`.
    checks: so far; best: the one with the lowest loss.
    """

    n_steps: int
    step: int = 0
    loss: float = math.nan
    n_tokens: int = 0
    elapsed_s: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @property
    def best(self) -> Check | None:
        return min(self.checks, key=lambda check: check.loss, default=None)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or the last few checks brought nothing."""
        worse = len(self.checks) - 1 - self.checks.index(self.best) if self.best else 0
        return self.step >= self.n_steps or worse >= _PATIENCE


class Training:
    """One LoRA in training.

    key: all that the result depends on, in short. A checkpoint of another key is refused.
    """

    def __init__(
        self,
        model: Llama,
        batches: Batches,
        held_out: Sequence[int],
        objective: Objective,
        *,
        lr: float,
        n_steps: int,
        checkpoint: Path,
        key: str,
    ) -> None:
        self._model = model.to(device())
        self._batches, self._objective, self._lr = batches, objective, lr
        self._checkpoint, self._key = checkpoint, key
        self._held_out = _held_out_batches(batches.examples, held_out)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._trained.values(), betas=(0.9, 0.98), weight_decay=0.0)
        self._best: dict[str, Tensor] = {}
        self._is_lost = False
        self.state = State(n_steps)
        self._load()

    def run(self, tell: Callable[[State], None]) -> None:
        """Train to the end, and give the model the weights with the lowest held-out loss.

        tell: called after every step and every check; what it raises ends training, of which nothing is lost.

        Raises EdgeDLFError where the loss or a weight grows beyond all numbers.
        """
        state, began_s = self.state, time.monotonic()
        saved_s = began_s
        if not state.step and not self._checkpoint.exists():
            self.save()  # so that a folder that cannot be written is told at once
        every = max(1, math.ceil(state.n_steps / _N_CHECKS))
        try:
            while True:
                is_due = state.step % every == 0 or state.step == state.n_steps
                if is_due and self._held_out and not (state.checks and state.checks[-1].step == state.step):
                    self._check()
                    tell(state)
                if state.is_over:
                    break
                self._step(self._batches[state.step])
                state.elapsed_s = time.monotonic() - began_s
                if time.monotonic() > saved_s + _SAVE_EVERY_S:
                    self.save()
                    saved_s = time.monotonic()
                tell(state)
        finally:
            if not self._is_lost:
                self.save()
        if self._best:
            self._model.load_state_dict(self._best, strict=False)
        if not all(parameter.abs().max() <= _LARGEST for parameter in self._trained.values()):
            self._give_up("a weight has become too large to be written: begin anew with a lower --lr")

    def _give_up(self, why: str) -> NoReturn:
        """End a training that would end the same way again, and remove its checkpoint. Raises EdgeDLFError."""
        self._is_lost = True
        self._checkpoint.unlink(missing_ok=True)
        raise EdgeDLFError(why)

    def save(self) -> None:
        """Write the checkpoint, all at once. Raises EdgeDLFError."""
        content = {
            "key": self._key,
            "weights": dict(self._trained),
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
            "step": self.state.step,
            "loss": self.state.loss,
            "checks": [tuple(check) for check in self.state.checks],
        }
        with replacing(self._checkpoint) as file:
            torch.save(content, file)

    def _load(self) -> None:
        content = read_checkpoint(self._checkpoint, self._key)
        if content is None:
            return
        self._model.load_state_dict(content["weights"], strict=False)
        self._optimizer.load_state_dict(content["optimizer"])
        self._best = {name: tensor.to(device()) for name, tensor in content["best"].items()}
        self.state.step, self.state.loss = content["step"], content["loss"]
        self.state.checks = [Check(*check) for check in content["checks"]]

    def _step(self, batch: Batch) -> None:
        state = self.state
        batch = batch.each(_on_device)
        with _autocast():
            values = self._objective(self._model, batch).values
        loss = (values * batch.weights).sum() / batch.weights.sum()
        if not torch.isfinite(loss):
            why = "begin anew with a lower --lr" if state.step else "the models cannot be trained on these answers"
            self._give_up(f"the loss of step {state.step + 1} is {loss.item()}: {why}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), _LARGEST_GRADIENT)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * _share_of_lr(state.step, state.n_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        state.step += 1
        state.n_tokens += batch.tokens.numel()
        state.loss = loss.item() if math.isnan(state.loss) else 0.95 * state.loss + 0.05 * loss.item()

    def _check(self) -> None:
        total = n_tokens = n_right = n_examples = 0.0
        sample: tuple[int, tuple[int, ...]] = (-1, ())
        for batch in self._held_out:
            batch = batch.each(_on_device)
            with torch.no_grad(), _autocast():
                values, choices = self._objective(self._model, batch)
            total, n_tokens = total + values.sum().item(), n_tokens + len(values)
            lengths = [len(self._batches.examples[number].answer) for number in batch.numbers]
            right = [bool(part.all()) for part in (choices == batch.golds).split(lengths)]
            n_right, n_examples = n_right + sum(right), n_examples + len(right)
            turn = len(self.state.checks) % len(batch.numbers)
            sample = batch.numbers[turn], tuple(choices.split(lengths)[turn].tolist())
        check = Check(self.state.step, total / n_tokens, n_right / n_examples, sample)
        if self.state.best is None or check.loss < self.state.best.loss:
            self._best = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self.state.checks.append(check)


def read_checkpoint(path: Path, key: str) -> Mapping[str, Any] | None:
    """Read the checkpoint at `path`, None where there is none. Raises InvalidParameterError for one of another key."""
    if not path.exists():
        return None
    try:
        content: Mapping[str, Any] = torch.load(path, "cpu", weights_only=True) if path.is_file() else {}
        is_ours = content["key"] == key
    except Exception as error:
        raise InvalidParameterError(f"{path}: is no checkpoint that can be read; delete it to begin anew") from error
    if not is_ours:
        raise InvalidParameterError(
            f"{path}: belongs to a training with other settings or data; give those to continue it, delete the file to "
            "begin anew, or choose another -o"
        )
    return content


def _held_out_batches(examples: Sequence[Example], numbers: Sequence[int]) -> list[Batch]:
    """The held-out examples in batches of a few, in an order that does not change."""
    by_length = sorted(numbers, key=lambda number: len(examples[number].prompt))
    return [as_batch(examples, by_length[start : start + 8]) for start in range(0, len(by_length), 8)]


def _share_of_lr(step: int, n_steps: int) -> float:
    """The learning rate rises over the first steps, then falls linearly to 0."""
    done = (step + 1) / n_steps
    return min(1.0, done / _WARM_UP, (1.0 - done) / (1.0 - _WARM_UP) + 1.0 / n_steps)


def _autocast() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = torch.autocast(
        device().type, torch.bfloat16, enabled=matrix_dtype() == torch.bfloat16
    )
    return context


def _on_device(tensor: Tensor) -> Tensor:
    return tensor.to(device())
