"""The tasks: problems drawn and scored by reasoning-gym, and the words that a person would ask them in."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import reasoning_gym

Split = Literal["train", "tune", "test"]

PLURALS = {
    "bird": "birds", "human": "humans", "duck": "ducks", "dog": "dogs", "cat": "cats", "cow": "cows",
    "horse": "horses", "lion": "lions", "tiger": "tigers", "sheep": "sheep", "starfish": "starfish", "ant": "ants",
    "bee": "bees", "beetle": "beetles", "butterfly": "butterflies", "spider": "spiders", "scorpion": "scorpions",
    "crab": "crabs", "lobster": "lobsters", "snake": "snakes",
}  # fmt: skip
LEGS = reasoning_gym.arithmetic.leg_counting.ANIMALS


@dataclass(frozen=True)
class Problem:
    """One problem of a task. given: what its wordings are filled with. answer: as it is to be said. entry: the
    generator's own."""

    task: str
    given: Mapping[str, str]
    answer: str
    entry: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A reasoning-gym generator and its words.

    read: the generator's entry -> given, answer and the key that tells problems apart, or None for one not used here.
    asked: questions. told: other forms that hold the answer. scored: an answer as the generator's scorer wants it, or
    None where what is asked is not what the generator asks.
    """

    name: str
    generator: str
    config: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], tuple[dict[str, str], str, str] | None]
    asked: tuple[str, ...]
    told: tuple[str, ...]
    scored: Callable[[str], str] | None = str

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """Endless problems of one split. A problem belongs to one split for good, whatever the seed: one in ten to
        test, one in twenty to tune, the rest to train."""
        dataset = self._dataset(seed)
        for index in range(len(dataset)):
            entry = dataset[index]
            read = self.read(entry["metadata"])
            if read and _split(f"{self.name} {read[2]}") == split:
                yield Problem(self.name, read[0], read[1], entry)

    def is_right(self, answer: str, problem: Problem) -> bool:
        """The generator's verdict, and to the letter: its scorer alone lets a sorted number be off by one."""
        answer = answer.strip()
        if answer != problem.answer or self.scored is None:
            return answer == problem.answer
        return bool(self._dataset(0).score_answer(self.scored(answer), problem.entry) == 1)

    def _dataset(self, seed: int) -> Any:
        return _dataset(self.generator, seed, tuple(self.config.items()))


@cache
def _dataset(generator: str, seed: int, config: tuple[tuple[str, Any], ...]) -> Any:
    return reasoning_gym.create_dataset(generator, size=1 << 30, seed=seed, **dict(config))


def _split(key: str) -> Split:
    return {0: "test", 1: "test", 2: "tune"}.get(zlib.crc32(key.encode()) % 20, "train")  # type: ignore[return-value]


def _read_sum(data: Mapping[str, Any]) -> tuple[dict[str, str], str, str] | None:
    a, sign, b = data["expression"].split()
    total = int(a) + int(b)
    if sign == "-" or total > 99:
        return None
    return {"a": a, "b": b}, str(total), "+".join(sorted((a, b)))


def _read_difference(data: Mapping[str, Any]) -> tuple[dict[str, str], str, str] | None:
    a, sign, b = data["expression"].split()
    if sign == "+" or int(a) < int(b):
        return None
    return {"a": a, "b": b}, str(int(a) - int(b)), f"{a}-{b}"


def _read_sorting(data: Mapping[str, Any]) -> tuple[dict[str, str], str, str]:
    numbers = [str(int(float(number))) for number in data["original_numbers"]]
    ordered = [str(int(float(number))) for number in data["sorted_numbers"]]
    order, code = {
        "ascending": ("from smallest to largest", "rising"),
        "descending": ("from largest to smallest", "falling"),
    }[data["direction"]]
    given = {"numbers": ", ".join(numbers), "order": order, "code": code}
    return given, ", ".join(ordered), " ".join((code, *sorted(numbers)))


def _read_legs(data: Mapping[str, Any]) -> tuple[dict[str, str], str, str] | None:
    animals = data["animals"]
    if not animals.keys() <= PLURALS.keys():
        return None
    names = [f"{count} {PLURALS[name]}" for name, count in animals.items()]
    parts = [count * LEGS[name] for name, count in animals.items()]
    given = {"animals": " and ".join(names), "steps": "+".join(map(str, parts)), "list": ", ".join(names)}
    return given, str(sum(parts)), " ".join(sorted(names))


def _read_extreme(data: Mapping[str, Any]) -> tuple[dict[str, str], str, str] | None:
    given, ordered, key = _read_sorting(data)
    numbers = ordered.split(", ")
    if len(set(numbers)) < len(numbers):
        return None
    side, code = {"rising": ("smallest", "min"), "falling": ("largest", "max")}[given["code"]]
    return {"numbers": given["numbers"], "side": side, "code": code}, numbers[0], key


def _read_filter(data: Mapping[str, Any]) -> tuple[dict[str, str], str, str] | None:
    action, side = data["operation"].split("_")
    if action != "keep" or not data["result"]:
        return None
    given = {"numbers": ", ".join(data["original_numbers"]), "side": side, "limit": data["filter_value"]}
    return given, ", ".join(data["result"]), " ".join((side, given["limit"], *data["original_numbers"]))


_TASKS = (
    Task(
        "sums", "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, _read_sum,
        ("What is {a} plus {b}?", "How much is {a} and {b} together?", "Add {a} and {b}.", "What do {a} and {b} make?",
         "I have {a} apples and get {b} more. How many have I now?", "What is {a} + {b}?"),
        ("{a}+{b}={answer}", "{a} + {b} = {answer}", "The sum of {a} and {b} is {answer}.",
         "add({a}, {b}) == {answer}", "{a} more than {b}: {answer}"),
    ),
    Task(
        "sorting", "number_sorting",
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 1, "max_value": 99}, _read_sorting,
        ("Sort these numbers {order}: {numbers}", "Put {numbers} in order, {order}.", "Order {numbers} {order}.",
         "Can you sort {numbers} {order}?", "Write these numbers {order}: {numbers}"),
        ("{numbers} {order}: {answer}", "{code}({numbers}) == {answer}", "{numbers} -> {code} -> {answer}"),
        lambda answer: str(answer.split(", ")),
    ),
    Task(
        "legs", "leg_counting", {"min_animals": 1, "max_animals": 2, "min_instances": 2, "max_instances": 6},
        _read_legs,
        ("How many legs do {animals} have?", "How many legs do {animals} have in total?",
         "Count the legs of {animals}.", "I see {animals}. How many legs is that?",
         "How many legs are there on {animals}?"),
        ("{list}: {steps}={answer} legs", "legs({list}) == {answer}", "{list}: {answer} legs",
         "On the farm {animals} walk on {answer} legs."),
    ),
    Task(
        "extremes", "number_sorting",
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 1, "max_value": 99}, _read_extreme,
        ("Which of {numbers} is the {side}?", "What is the {side} of {numbers}?", "Tell me the {side}: {numbers}",
         "Of {numbers}, which one is {side}?", "Find the {side} number in {numbers}."),
        ("{numbers} -> {code} -> {answer}", "{code}({numbers}) == {answer}", "The {side} of {numbers} is {answer}.",
         "{numbers}, {side}: {answer}"),
        None,
    ),
    Task(
        "differences", "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        _read_difference,
        ("What is {a} minus {b}?", "How much is {a} less {b}?", "Take {b} away from {a}.", "What is {a} - {b}?",
         "I have {a} apples and give {b} away. How many have I now?"),
        ("{a}-{b}={answer}", "{a} - {b} = {answer}", "The difference of {a} and {b} is {answer}.",
         "sub({a}, {b}) == {answer}", "{b} less than {a}: {answer}"),
    ),
    Task(
        "filters", "number_filtering",
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 1, "max_value": 99}, _read_filter,
        ("Which of {numbers} are {side} than {limit}?", "Name the ones {side} than {limit}: {numbers}",
         "Keep what is {side} than {limit}: {numbers}", "Find all that are {side} than {limit} in {numbers}."),
        ("{numbers} {side} than {limit}: {answer}", "{side}({limit}, {numbers}) == {answer}",
         "{numbers} -> {side} {limit} -> {answer}"),
        lambda answer: str(answer.split(", ")),
    ),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}
SEEN = ("sums", "sorting", "legs", "filters")
UNSEEN = ("differences", "extremes")


def ask(problem: Problem, rng: random.Random, wording: int | None = None) -> str:
    """The problem in one of its task's questions, drawn or given by its number."""
    asked = TASKS[problem.task].asked
    return (rng.choice(asked) if wording is None else asked[wording]).format(**problem.given)


def tell(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The problem and its answer in one of the other forms: what comes before the answer or the steps to it, and the
    rest."""
    form = rng.choice(TASKS[problem.task].told)
    cut = min(form.find(part) for part in ("{steps}", "{answer}") if part in form)
    before, after = (part.format(**problem.given, answer=problem.answer) for part in (form[:cut], form[cut:]))
    return before, after


def reply(problem: Problem) -> str:
    """The answer as an expert is taught to give it."""
    return f"The answer is {problem.answer}."


def answer_of(text: str) -> str:
    """What a reply gives as its answer: after "The answer is" where it says so, else all of it."""
    return text.strip().removeprefix("The answer is").strip().removesuffix(".")
