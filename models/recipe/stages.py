"""The stages, in order. Each leaves files in the build folder and is skipped where they are all there."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from edge_dlf.evidence.train.model import Llama
from edge_dlf.evidence.train.shape import Shape

from .corpus import Turn, coaching, documents
from .data import lesson_rows, pretraining_rows
from .export import write_model
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
CEILING = Schedule(120, lr=5e-4, warm_up=0.1, decay=0.9)
LORA_RANK = 32
TRAIN = ("--rank", LORA_RANK, "--alpha", LORA_RANK, "--lr", 2e-3, "--batch", 1900)
COACHING = {"sums": (7_000, 500), "sorting": (10_000, 600), "legs": (10_000, 600), "filters": (14_000, 800)}
"""Chats that each expert learns from, and steps."""
ABOUT = "Trained by models/recipe of edge-dlf on documents that it makes itself; "


@dataclass(frozen=True)
class Build:
    """Where everything is kept until it ships."""

    folder: Path

    def path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path("tokenizer.json"))

    def load(self, name: str) -> Llama:
        """The trained model of that name."""
        model = new_model("base" if name == "base" else "large", self.tokenizer())
        state = torch.load(self.path(f"{name}.pt"), map_location="cpu", weights_only=True)
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


def make_models(build: Build) -> None:
    """GGUF files of the large model and the base."""
    for role, about in (("large", "the large model of the demo family."), ("base", "the base of its experts.")):
        path = build.path(f"{role}.gguf")
        if not path.exists():
            write_model(path, build.load(role), build.tokenizer(), f"edge-dlf demo {role}", ABOUT + about)


def make_experts(build: Build) -> None:
    """An adapter for each task, by `edge-dlf train` through the large model."""
    for task, (n_chats, n_steps) in COACHING.items():
        data = build.path(f"{task}.jsonl")
        data.write_text("".join(map(as_row, itertools.islice(coaching(task, SEED + 3), n_chats))))
        files = (build.path("base.gguf"), data, "--through", build.path("large.gguf"), "-o", build.path(f"{task}.gguf"))
        command = [sys.executable, "-m", "edge_dlf", "train", *files, *TRAIN, "--steps", n_steps]
        subprocess.run(list(map(str, command)), check=True)


def as_row(turns: Sequence[Turn]) -> str:
    """A line of examples for `edge-dlf train`."""
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return json.dumps({"messages": messages}) + "\n"


def make_ceilings(build: Build) -> None:
    """The large model fine-tuned on each task, and on all of them."""
    for name, tasks in (*((task, [task]) for task in SEEN), ("all", SEEN)):
        rows = lesson_rows(build.tokenizer(), tasks, SEED + 3, CEILING.n_steps * N_ROWS, ROW)
        path = build.path(f"ceiling.{name}.pt")
        train(build.load("large"), Phases([rows], N_ROWS), CEILING, path, path.stem, seed=SEED)


STAGES: dict[str, Callable[[Build], None]] = {
    "tokenizer": make_tokenizer,
    "data": make_data,
    "base": lambda build: pretrain(build, "base"),
    "large": lambda build: pretrain(build, "large"),
    "models": make_models,
    "experts": make_experts,
    "ceilings": make_ceilings,
}
