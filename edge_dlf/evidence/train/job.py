"""One training from its files to the adapter: what is checked before, and what is written at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ...api import FusedLlama
from ...errors import InvalidParameterError, ModelFileError, require
from ...families.manifest import sampled_digest
from ...families.spec import FamilySpec
from ...gguf.header import header_hash
from ...gguf.info import read_info
from ..examples import Example
from .adapter import write_lora
from .base import base_shape, read_base
from .batches import Batches, n_read, split
from .loop import State, Training, read_checkpoint
from .memory import check_memory, device, matrix_dtype
from .objective import Fused, Objective, alone
from .rows import constant_rows, n_kept_of

Kind: TypeAlias = Literal["expert", "fusion", "corrector"]
"""What answers: the expert alone, the large model + expert − base, or the large model + expert."""

_KEY = "edge_dlf.trained"
_HELD_OUT = 0.05, 64
"""Part of the prompts that is held out, and how many at most."""
_MOST_SEEN = 20_000_000
"""Examples that are seen at most, each as often as there are epochs; their order is held in memory."""
_FEW_STEPS, _MOST_EPOCHS = 200, 20
"""By default examples are seen again until there are so many steps, so often at most."""


@dataclass(frozen=True)
class Settings:
    """How to train; the command's options.

    batch: tokens of a step. epochs: None takes as many as give steps enough. steps: None takes all of the epochs.
    """

    rank: int = 16
    alpha: float = 32.0
    lr: float = 4e-4
    batch: int = 512
    epochs: int | None = None
    steps: int | None = None
    max_length: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """What is to be trained on what.

    base: GGUF that the adapter is over. data: files of examples. out: the adapter.
    large: GGUF of the model to train through, None for an expert that answers alone. others: adapters over the base
    that are fused already, each with an equal share of α.
    """

    base: Path
    data: Sequence[Path]
    out: Path
    large: Path | None
    kind: Kind
    settings: Settings
    others: Sequence[Path] = ()

    @property
    def checkpoint(self) -> Path:
        """The file that an unfinished training leaves beside the adapter."""
        return self.out.with_name(f"{self.out.name}.checkpoint")

    def check(self) -> int:
        """Check the files, and return how many tokens an example may have. Raises InvalidParameterError, LoadError."""
        for path in (self.base, self.large, *self.others, *self.data):
            if path and path.exists() and self.out.exists() and path.samefile(self.out):
                raise InvalidParameterError(f"{self.out}: is read, and cannot be the output too")
        require(self.out.parent.is_dir(), f"{self.out}: there is no folder {self.out.parent}")
        if self.out.exists() and not _is_adapter(self.out):
            raise InvalidParameterError(f"{self.out}: is there already, and is no adapter that could be replaced")
        n_ctx = base_shape(self.base, self.settings.max_length).n_ctx
        if self.large:
            n_ctx = min(n_ctx, read_info(self.large).n_ctx_train or n_ctx)
        return n_ctx

    def family(self) -> FamilySpec:
        """The members that read the examples before training, of which only the needed ones are loaded."""
        experts = {f"expert{number}": path for number, path in enumerate(self.others)} or {"expert": self.base}
        spec = FamilySpec.from_files(self.large or self.base, self.base, experts)
        return replace(spec, defaults={"method": "large"})

    def weights(self) -> dict[str, float]:
        """Weight of each member in the row that the new expert is added to."""
        share = 1.0 / len(self.others) if self.others else 0.0
        others = {f"expert{number}": share for number in range(len(self.others))}
        return {"large": 1.0, **({"base": -1.0, **others} if others else {})}


class Prepared:
    """Examples in tokens, the rows to train through, and the order of both.

    n_vocab: tokens of the large model, or of the base where there is none.
    taken, held_out: numbers of the examples to train on, and of the others. n_steps: of the training.
    n_bytes: memory that it will take.

    Raises InvalidParameterError, OutOfMemoryError.
    """

    def __init__(self, job: Job, examples: Sequence[Example], n_vocab: int) -> None:
        self.job, self.examples, settings = job, examples, job.settings
        require(examples, f"{job.data[0]}: has no examples")
        share, most = _HELD_OUT
        n_prompts = len({example.prompt for example in examples})
        self.taken, self.held_out = split(examples, min(most, round(share * n_prompts)), settings.seed)
        an_epoch = len(Batches(examples, self.taken, settings.batch, 1, settings.seed))
        wanted = settings.steps or min(_FEW_STEPS, _MOST_EPOCHS * an_epoch)
        n_epochs = settings.epochs or math.ceil(wanted / an_epoch) + bool(settings.steps)  # epochs differ by a batch
        is_possible = n_epochs * len(self.taken) <= _MOST_SEEN
        require(
            is_possible, f"{n_epochs:,} epochs would see more than {_MOST_SEEN:,} examples: fewer --steps or --epochs"
        )
        self.batches = Batches(examples, self.taken, settings.batch, n_epochs, settings.seed)
        self.n_steps = min(settings.steps or len(self.batches), len(self.batches))
        self.n_ctx = max(map(n_read, examples))
        self.shape = base_shape(job.base, self.n_ctx)
        self.key = self._key()
        self.is_done = job.out.exists() and read_info(job.out).metadata.get(f"{_KEY}.key") == self.key
        read_checkpoint(job.checkpoint, self.key)
        self.n_kept = n_kept_of(n_vocab, examples)
        no_row = np.zeros((3, self.n_kept), np.float32)
        no_rows = [np.broadcast_to(no_row, (len(example.answer), *no_row.shape)) for example in examples]
        self.n_bytes = check_memory(self.shape, settings.rank, self._objective(no_rows), self.batches.largest())

    def read_rows(self, llm: FusedLlama, n_threads: int, tell: Callable[[int], None]) -> list[npt.NDArray[np.float32]]:
        """Rows of the models to train through; none for an expert that answers alone."""
        if self.job.large is None:
            return []
        return constant_rows(llm, self.job.weights(), self.examples, self.n_kept, n_threads, tell=tell)

    def train(self, rows: Sequence[npt.NDArray[np.float32]], tell: Callable[[State], None]) -> State:
        """Train, write the adapter and remove the checkpoint."""
        job, settings = self.job, self.job.settings
        model = read_base(job.base, self.n_ctx, matrix_dtype())
        torch.manual_seed(settings.seed)
        model.add_lora(settings.rank, settings.alpha / settings.rank)
        training = Training(
            model,
            self.batches,
            self.held_out,
            self._objective(rows),
            lr=settings.lr,
            n_steps=self.n_steps,
            checkpoint=job.checkpoint,
            key=self.key,
        )
        training.run(tell)
        write_lora(job.out, model, dict(self._about()))
        job.checkpoint.unlink(missing_ok=True)
        return training.state

    def _objective(self, rows: Sequence[npt.NDArray[np.float32]]) -> Objective:
        return alone if self.job.large is None else Fused(rows, has_base=self.job.kind == "fusion")

    def _key(self) -> str:
        """All that the adapter depends on, in short."""
        job = self.job
        digest = blake2b(digest_size=16)
        models = [sampled_digest(path, read_info(path)) for path in (job.base, job.large, *job.others) if path]
        digest.update(json.dumps([models, job.kind, asdict(job.settings), self.n_steps]).encode())
        for example in self.examples:
            digest.update(json.dumps([example.prompt, example.answer, example.weight]).encode())
        return digest.hexdigest()

    def _about(self) -> Iterator[tuple[str, str]]:
        job = self.job
        through = f" through {job.large.name}" if job.large else ""
        yield "general.name", job.out.stem
        yield "general.description", f"LoRA over {job.base.name}, trained{through} by edge-dlf on {job.data[0].name}"
        yield f"{_KEY}.through", job.kind
        yield f"{_KEY}.key", self.key
        if job.large:
            yield f"{_KEY}.large", header_hash(job.large)


def where() -> str:
    """The device that training runs on, in a word."""
    return "a GPU" if device().type == "cuda" else "the CPU"


def _is_adapter(path: Path) -> bool:
    try:
        return read_info(path).is_adapter
    except ModelFileError:
        return False
