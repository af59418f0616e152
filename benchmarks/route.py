"""Which task is a prompt of? How often words alone tell, by the number of examples of each task.

    python benchmarks/route.py TASK=EXAMPLES.jsonl TASK=EXAMPLES.jsonl … [--counts 5,20,100] [--foreign PROMPTS.txt]

A prompt gets the task of the example that is most alike: the cosine of the counts of their words, rare words counting
more, every number being the same word. It gets none if it is less alike than 95% of the task's examples are to the
nearest other one. Examples are drawn from each file, three times; the file's other prompts are told apart. The prompts
of PROMPTS.txt, one a line, belong to no task; by default they are sixty everyday ones.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_dlf.evidence.examples import read_rows

N_DRAWS = 3
EVERYDAY = Path(__file__).with_name("everyday.txt")


def prompts(path: Path) -> list[str]:
    """The prompts of a file of examples; of messages, the last one of the user."""
    rows = [row for _, row in read_rows(path)]
    return [
        row.get("prompt") or [turn["content"] for turn in row["messages"] if turn["role"] == "user"][-1] for row in rows
    ]


class Router:
    """Tells which task a prompt belongs to, by prompts of each."""

    def __init__(self, examples: Mapping[str, Sequence[str]]) -> None:
        self._tasks = list(examples)
        self._task_of = np.repeat(np.arange(len(examples)), [len(own) for own in examples.values()])
        counts = [self._words(text) for own in examples.values() for text in own]
        n_having = Counter(word for each in counts for word in each)
        self._weights = {word: math.log((1 + len(counts)) / (1 + n)) + 1 for word, n in n_having.items()}
        self._columns = {word: k for k, word in enumerate(self._weights)}
        self._vectors = np.stack([self._vector(each) for each in counts])
        alike = self._vectors @ self._vectors.T
        np.fill_diagonal(alike, -1)
        own = [alike[np.ix_(self._task_of == k, self._task_of == k)].max(axis=1) for k in range(len(self._tasks))]
        self._least = [float(np.quantile(each, 0.05)) for each in own]

    def task(self, text: str) -> str | None:
        alike = self._vectors @ self._vector(self._words(text))
        nearest = int(alike.argmax())
        k = int(self._task_of[nearest])
        return self._tasks[k] if alike[nearest] >= self._least[k] else None

    def _words(self, text: str) -> Counter[str]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return Counter("0" if word.isdigit() else word for word in words)

    def _vector(self, counts: Counter[str]) -> np.ndarray:
        unseen = max(self._weights.values())
        vector, square = np.zeros(len(self._columns)), 0.0
        for word, n in counts.items():
            value = (1 + math.log(n)) * self._weights.get(word, unseen)
            square += value * value
            if word in self._columns:
                vector[self._columns[word]] = value
        return vector / math.sqrt(square or 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK=FILE")
    parser.add_argument("--counts", default="5,20,100")
    parser.add_argument("--foreign", type=Path, default=EVERYDAY)
    options = parser.parse_args()
    files = {name: prompts(Path(path)) for name, _, path in (task.partition("=") for task in options.tasks)}
    foreign = [line for line in options.foreign.read_text().splitlines() if line]
    print(
        "| examples of each | right | another task's | none | prompts of no task that get one |\n|---|---|---|---|---|"
    )
    for count in map(int, options.counts.split(",")):
        told: Counter[str] = Counter()
        n_foreign = 0
        for draw in range(N_DRAWS):
            rng = np.random.default_rng(draw)
            orders = {name: rng.permutation(len(own)) for name, own in files.items()}
            router = Router({name: [own[k] for k in orders[name][:count]] for name, own in files.items()})
            for name, own in files.items():
                for k in orders[name][count:]:
                    task = router.task(own[k])
                    told["right" if task == name else "wrong" if task else "none"] += 1
            n_foreign += sum(router.task(text) is not None for text in foreign)
        shares = [f"{100 * told[kind] / told.total():.1f}%" for kind in ("right", "wrong", "none")]
        print(f"| {count} | {' | '.join(shares)} | {100 * n_foreign / (N_DRAWS * len(foreign)):.0f}% |")


if __name__ == "__main__":
    main()
