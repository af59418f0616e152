"""Accuracy of edge-dlf's methods on a task, by edge-dlf itself."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from edge_dlf import FusedLlama

from .casual import casual_problems
from .corpus import BEYOND
from .tasks import TASKS, Problem, Split, answer_of, ask, reply

Message = dict[str, str]
MAX_TOKENS = 24
NEWCOMER = Path(__file__).with_name("newcomer.txt")


@dataclass(frozen=True)
class Score:
    """How many of n prompts a method answered rightly."""

    n_right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.n_right / self.n

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval."""
        z, p, n = 1.96, self.accuracy, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def questions(
    task: str, split: Split, n: int, seed: int, n_shots: int = 0, *, casual: bool = False
) -> Iterator[tuple[Problem, list[Message]]]:
    """n problems of a split as chats, after `n_shots` problems of the training split with their answers. No question
    comes twice.

    casual: whether they are typed as people do.
    """
    rng = random.Random(seed)
    problems, shots = TASKS[task].problems(split, seed), TASKS[task].problems("train", seed + 1)
    formal = ((problem, ask(problem, rng)) for problem in problems)
    drawn = casual_problems(task, split, rng) if casual else formal
    asked: set[str] = set()
    while len(asked) < n:
        problem, question = next(drawn)
        if question in asked:
            continue
        asked.add(question)
        messages = []
        for _ in range(n_shots):
            shot = next(shots)
            messages += [_message("user", ask(shot, rng)), _message("assistant", reply(shot))]
        yield problem, [*messages, _message("user", question)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def answers(llm: FusedLlama, chats: Sequence[Sequence[Message]], settings: Mapping[str, Any]) -> Iterator[str]:
    """The greedy answer to each chat, in their order."""
    requests = ({"messages": list(messages)} for messages in chats)
    for result in llm.batch(requests, ordered=True, temperature=0.0, max_tokens=MAX_TOKENS, **settings):
        if result["error"]:
            raise RuntimeError(result["error"]["message"])
        yield result["response"]["body"]["choices"][0]["message"]["content"]


def evaluate(
    llm: FusedLlama,
    task: str,
    settings: Mapping[str, Any],
    *,
    split: Split,
    n: int,
    seed: int,
    n_shots: int = 0,
    casual: bool = False,
) -> Score:
    """Score of one method on one task; the same prompts for every method."""
    problems, chats = zip(*questions(task, split, n, seed, n_shots, casual=casual), strict=True)
    name = settings.get("method", "dynamic")
    said = tqdm(answers(llm, chats, settings), desc=f"{task}, {name}", total=n, unit="prompt", leave=False)
    pairs = [(answer_of(text), problem) for text, problem in zip(said, problems, strict=True)]
    if casual:
        return Score(sum(answer == problem.answer for answer, problem in pairs), n)
    return Score(sum(TASKS[task].is_right(answer, problem) for answer, problem in pairs), n)


def newcomer() -> list[tuple[str, str]]:
    """Questions written by hand, not by the recipe's wordings, and their answers; "beyond" where there is none."""
    lines = NEWCOMER.read_text().splitlines()
    return [(question, answer) for question, _, answer in (line.rpartition(" → ") for line in lines)]


def evaluate_newcomer(llm: FusedLlama, settings: Mapping[str, Any]) -> Score:
    """Score of one method on the questions of a newcomer."""
    rows = newcomer()
    said = answers(llm, [[_message("user", question)] for question, _ in rows], settings)
    right = [
        text.startswith(BEYOND) if answer == "beyond" else answer_of(text) == answer
        for text, (_, answer) in zip(said, rows, strict=True)
    ]
    return Score(sum(right), len(right))


class Results:
    """Scores by key in a JSON-lines file: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._scores = {row.pop("key"): Score(**row) for row in map(json.loads, lines)}

    def get(self, key: str) -> Score | None:
        """The score of that key, None where it has not been run."""
        return self._scores.get(key)

    def add(self, key: str, score: Score) -> None:
        self._scores[key] = score
        with self._path.open("a") as file:
            print(json.dumps({"key": key, **asdict(score)}), file=file)
