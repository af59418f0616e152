"""Prompts and answers as batches of tokens, by llama.cpp's own tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edge_dlf.answers.text import to_bytes
from edge_dlf.answers.tokenizer import Tokenizer
from edge_dlf.errors import ContextOverflowError, InvalidParameterError
from edge_dlf.llama import Model
from edge_dlf.system.jsonl import parse_object, read_lines

from ..recipe.data import IGNORED

_POOL = 50
"""Batches' worth of examples that are sorted by length together."""


@dataclass(frozen=True)
class Example:
    """prompt: token ids. answer: those that are learnt, the end of text among them."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Tokens that are read: all but the last."""
        return len(self.prompt) + len(self.answer) - 1


def read_examples(data: Path, base: Path, n_ctx: int) -> list[Example]:
    """The lines {"prompt": …, "answer": …} of `data` in the tokens of `base`: prompts as edge-dlf reads raw ones.

    Raises InvalidParameterError, or ContextOverflowError for one longer than `n_ctx`, which name the line.
    """
    model = Model(base, n_gpu_layers=0)
    try:
        tokenizer = Tokenizer(model, model.n_vocab)
        if model.eos is None:
            raise InvalidParameterError(f"{base}: has no token that ends a text")
        examples = []
        for where, prompt, answer in _pairs(data):
            answered = [*model.tokenize(to_bytes(answer), special=False), model.eos]
            example = Example(tokenizer.prompt(prompt), answered)
            if len(example) > n_ctx:
                raise ContextOverflowError(f"{where}: has {len(example)} tokens; the longest may have {n_ctx}")
            examples.append(example)
    finally:
        model.close()
    if not examples:
        raise InvalidParameterError(f"{data}: has no examples")
    return examples


def _pairs(data: Path) -> Iterator[tuple[str, str, str]]:
    try:
        with data.open("rb") as file:
            for line in read_lines(file):
                where = f"{data}:{line.number}"
                try:
                    row = parse_object(line.content or b"")
                except ValueError as error:
                    raise InvalidParameterError(f"{where}: is {error}") from None
                for key in ("prompt", "answer"):
                    if not isinstance(row.get(key), str):
                        raise InvalidParameterError(f"{where}: needs {key!r}, a string")
                yield where, row["prompt"], row["answer"]
    except OSError as error:
        raise InvalidParameterError(f"{data}: {(error.strerror or str(error)).lower()}") from error


class Batches:
    """Every example once in each epoch, in another order each time; those of a batch are of like length.

    n_tokens: of a batch, what fills up its rows included; an example that is longer is a batch alone.
    """

    def __init__(self, examples: Sequence[Example], n_tokens: int, n_epochs: int, seed: int) -> None:
        self._examples = examples
        self._batches: list[list[int]] = []
        rng = random.Random(seed)
        for _ in range(n_epochs):
            batches = list(self._epoch(n_tokens, rng))
            rng.shuffle(batches)
            self._batches += batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        batch = [self._examples[k] for k in self._batches[step]]
        tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        for k, example in enumerate(batch):
            tokens[k, : len(example)] = torch.tensor((example.prompt + example.answer)[:-1])
            targets[k, len(example.prompt) - 1 : len(example)] = torch.tensor(example.answer)
        return tokens, targets

    def _epoch(self, n_tokens: int, rng: random.Random) -> Iterator[list[int]]:
        order = list(range(len(self._examples)))
        rng.shuffle(order)
        mean = sum(map(len, self._examples)) / len(order)
        n_pool = max(1, round(_POOL * n_tokens / mean))
        for start in range(0, len(order), n_pool):
            batch: list[int] = []
            for k in sorted(order[start : start + n_pool], key=lambda k: len(self._examples[k])):
                if batch and (len(batch) + 1) * len(self._examples[k]) > n_tokens:
                    yield batch
                    batch = []
                batch.append(k)
            yield batch
