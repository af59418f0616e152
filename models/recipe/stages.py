"""The stages, in order. Each leaves files in the build folder and is skipped where they are all there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from .corpus import documents
from .data import lesson_rows, pretraining_rows
from .model import Llama, Shape
from .tasks import SEEN
from .tokens import load_tokenizer, train_tokenizer
from .train import Phases, Schedule, load_trained, train

SEED = 20240614
ROW, LONG_ROW = 128, 512
N_ROWS = 32
SHAPES = {
    "large": {"n_embd": 192, "n_layer": 6, "n_head": 3, "n_ff": 512},
    "base": {"n_embd": 96, "n_layer": 2, "n_head": 3, "n_ff": 192},
}


@dataclass(frozen=True)
class Reading:
    """Rows of documents of one seed, for so many steps. learn_all: also what no reader could foresee."""

    seed: int
    n_steps: int
    n: int
    learn_all: bool


READING = {
    "all": Reading(SEED + 1, 1440, ROW, learn_all=True),
    "all-long": Reading(SEED + 2, 160, LONG_ROW, learn_all=True),
    "foreseen": Reading(SEED + 6, 1800, ROW, learn_all=False),
    "foreseen-long": Reading(SEED + 7, 150, LONG_ROW, learn_all=False),
}
PRETRAINING = {
    # The large model reads on, twice, learning only what a reader could foresee.
    "large": (("all", 600), ("foreseen", 1800), ("foreseen", 1800), ("foreseen-long", 150)),
    "base": (("all", 1440), ("all-long", 160)),
}
SCHEDULES = {
    "large": Schedule(4350, lr=3e-3, decay=0.3),
    "base": Schedule(1600, lr=4e-3),
}
TUNING = {
    "expert": Schedule(120, lr=2e-3, warm_up=0.1, decay=0.9),
    "ceiling": Schedule(120, lr=5e-4, warm_up=0.1, decay=0.9),
}
LORA_RANK = 16


@dataclass(frozen=True)
class Build:
    """Where everything is kept until it ships."""

    folder: Path

    def path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path("tokenizer.json"))

    def load(self, name: str, *, lora: bool = False) -> Llama:
        """The trained model of that name."""
        role = name.split(".")[0]
        model = new_model("large" if role in ("large", "ceiling") else "base", self.tokenizer())
        for part in ("base", name) if lora else (name,):
            if part != "base" and lora:
                model.add_lora(LORA_RANK)
            state = torch.load(self.path(f"{part}.pt"), map_location="cpu", weights_only=True)
            load_trained(model, state["model"])
        return model


def new_model(role: str, tokenizer: Tokenizer) -> Llama:
    torch.manual_seed(SEED)
    return Llama(Shape(tokenizer.get_vocab_size(), **SHAPES[role]))


def make_tokenizer(build: Build) -> None:
    path = build.path("tokenizer.json")
    if not path.exists():
        train_tokenizer(document.text for document in documents(SEED)).save(str(path))


def make_data(build: Build) -> None:
    """Rows for pre-training."""
    for name, reading in READING.items():
        path = build.path(f"{name}.npy")
        if not path.exists():
            n_rows = reading.n_steps * N_ROWS * ROW // reading.n
            rows = pretraining_rows(build.tokenizer(), reading.seed, n_rows, reading.n, learn_all=reading.learn_all)
            partial = build.path(f"partial-{name}.npy")
            np.save(partial, rows)
            partial.replace(path)


def pretrain(build: Build, role: str) -> None:
    phases = [
        np.load(build.path(f"{name}.npy"), mmap_mode="r")[: n_steps * N_ROWS * ROW // READING[name].n]
        for name, n_steps in PRETRAINING[role]
    ]
    model = new_model(role, build.tokenizer())
    train(model, Phases(phases, N_ROWS), SCHEDULES[role], build.path(f"{role}.pt"), role, seed=SEED)


def tune(build: Build, name: str, tasks: Sequence[str], *, lora: bool) -> None:
    """Fine-tune the base (`expert.…`) or the large model (`ceiling.…`) on questions of `tasks` answered."""
    kind = name.split(".")[0]
    schedule = TUNING[kind]
    rows = lesson_rows(build.tokenizer(), tasks, SEED + 3, schedule.n_steps * N_ROWS, ROW)
    model = build.load("base" if kind == "expert" else "large")
    if lora:
        model.add_lora(LORA_RANK)
    train(model, Phases([rows], N_ROWS), schedule, build.path(f"{name}.pt"), name, seed=SEED)


def make_experts(build: Build) -> None:
    for task in SEEN:
        tune(build, f"expert.{task}", [task], lora=True)


def make_ceilings(build: Build) -> None:
    for task in SEEN:
        tune(build, f"ceiling.{task}", [task], lora=False)
    tune(build, "ceiling.all", SEEN, lora=False)


STAGES: dict[str, Callable[[Build], None]] = {
    "tokenizer": make_tokenizer,
    "data": make_data,
    "base": lambda build: pretrain(build, "base"),
    "large": lambda build: pretrain(build, "large"),
    "experts": make_experts,
    "ceilings": make_ceilings,
}
