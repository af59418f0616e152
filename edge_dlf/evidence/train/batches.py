"""Examples as batches of like length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..examples import Example

_POOL = 50
"""Batches' worth of examples that are sorted by length together."""
_FEWEST_HELD_OUT = 20
"""Prompts below which none is held out."""


@dataclass(frozen=True)
class Batch:
    """Some examples side by side.

    numbers: of the examples. tokens: what is read, (B, N).
    places: of the R answer tokens to foretell, in `tokens` flattened. golds: these tokens. weights: of their losses,
    relative to the largest.
    """

    numbers: tuple[int, ...]
    tokens: Tensor
    places: Tensor
    golds: Tensor
    weights: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a change made to each tensor."""
        return Batch(self.numbers, *map(change, (self.tokens, self.places, self.golds, self.weights)))


def n_read(example: Example) -> int:
    """Tokens that are read of an example: all but the last."""
    return len(example.prompt) + len(example.answer) - 1


def as_batch(examples: Sequence[Example], numbers: Sequence[int]) -> Batch:
    """The examples of these numbers, filled up to the longest of them."""
    chosen = [examples[number] for number in numbers]
    width = max(map(n_read, chosen))
    heaviest = max(example.weight for example in chosen)
    tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
    places: list[int] = []
    golds: list[int] = []
    weights: list[float] = []
    for k, example in enumerate(chosen):
        tokens[k, : n_read(example)] = torch.tensor((example.prompt + example.answer)[:-1])
        first = k * width + len(example.prompt) - 1
        places += range(first, first + len(example.answer))
        golds += example.answer
        weights += [example.weight / heaviest] * len(example.answer)
    return Batch(tuple(numbers), tokens, torch.tensor(places), torch.tensor(golds), torch.tensor(weights))


class Batches:
    """Every example once in each epoch, in another order each time; those of a batch are of like length.

    numbers: of the examples to take. n_tokens: of a batch, what fills up its rows included; an example that is longer
    is a batch alone.
    """

    def __init__(
        self, examples: Sequence[Example], numbers: Sequence[int], n_tokens: int, n_epochs: int, seed: int
    ) -> None:
        self.examples = examples
        self._batches: list[list[int]] = []
        rng = random.Random(seed)
        for _ in range(n_epochs):
            batches = list(self._epoch(list(numbers), n_tokens, rng))
            rng.shuffle(batches)
            self._batches += batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        return as_batch(self.examples, self._batches[step])

    def largest(self) -> list[Batch]:
        """The batches that take the most memory: most tokens, most pairs of tokens, most answer tokens."""

        def shape(numbers: list[int]) -> tuple[int, int]:
            return len(numbers), max(n_read(self.examples[number]) for number in numbers)

        def n_answers(numbers: list[int]) -> int:
            return sum(len(self.examples[number].answer) for number in numbers)

        found = [
            max(self._batches, key=lambda numbers: shape(numbers)[0] * shape(numbers)[1]),
            max(self._batches, key=lambda numbers: shape(numbers)[0] * shape(numbers)[1] ** 2),
            max(self._batches, key=n_answers),
        ]
        return [as_batch(self.examples, numbers) for numbers in found]

    def _epoch(self, order: list[int], n_tokens: int, rng: random.Random) -> Iterator[list[int]]:
        rng.shuffle(order)
        mean = sum(n_read(self.examples[number]) for number in order) / len(order)
        n_pool = max(1, round(_POOL * n_tokens / mean))
        for start in range(0, len(order), n_pool):
            batch: list[int] = []
            for number in sorted(order[start : start + n_pool], key=lambda k: n_read(self.examples[k])):
                if batch and (len(batch) + 1) * n_read(self.examples[number]) > n_tokens:
                    yield batch
                    batch = []
                batch.append(number)
            yield batch


def split(examples: Sequence[Example], n_held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the examples to train on, and of those held out; examples with one prompt stay together."""
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[:n_held_out] if len(prompts) >= _FEWEST_HELD_OUT else ())
    numbers = range(len(examples))
    return (
        [number for number in numbers if examples[number].prompt not in held_out],
        [number for number in numbers if examples[number].prompt in held_out],
    )
