"""How people really type: the tasks in other words, and what is beyond the models.

Experts learn from these beside the questions of `tasks`, and one of the tables asks them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .tasks import LEGS, PLURALS, Problem, Split, Task

_ORDERS = {
    "rising": ("ascending", "in ascending order", "from small to big", "from low to high", "smallest first", "upwards"),
    "falling": ("descending", "in descending order", "from big to small", "from high to low", "largest first",
                "downwards"),
}  # fmt: skip
_SIDES = {"rising": ("smallest", "lowest", "minimum"), "falling": ("biggest", "highest", "maximum")}
_LIMITS = {
    "smaller": ("below", "under", "less than", "lower than"),
    "larger": ("above", "over", "more than", "bigger than"),
}
_READ = tuple[dict[str, str], str, str]


def _forms(values: tuple[str, ...]) -> dict[str, str]:
    """Words for one thing, as what wordings are filled with: w0, w1, …"""
    return {f"w{n}": value for n, value in enumerate(values)}


def _each(n: int, *wordings: str) -> tuple[str, ...]:
    """The wordings with each of n words in the place of {w}."""
    return tuple(wording.replace("{w}", f"{{w{k}}}") for k in range(n) for wording in wordings)


def _read_sum(data: Mapping[str, Any]) -> _READ | None:
    """The generator's two terms, added; half of the second ones keep their last digit alone."""
    expression = data["expression"]
    a, b = (int(term) for term in expression.split()[::2])
    terms = [a, b % 10 if zlib.crc32(expression.encode()) & 1 else b]
    if sum(terms) > 99:
        return None
    return _adding(terms), str(sum(terms)), "+".join(sorted(map(str, terms)))


def _adding(terms: Sequence[int]) -> dict[str, str]:
    words = list(map(str, terms))
    given = {"plus": " + ".join(words), "tight": "+".join(words), "words": " plus ".join(words)}
    return {**given, "list": _joined(words, "and")}


def _joined(words: list[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _numbers(data: Mapping[str, Any]) -> tuple[str, str, str]:
    """The numbers as given and in order, and the order's name."""
    code = {"ascending": "rising", "descending": "falling"}[data["direction"]]
    given, ordered = (", ".join(str(int(float(n))) for n in data[f"{k}_numbers"]) for k in ("original", "sorted"))
    return given, ordered, code


def _read_ordered(data: Mapping[str, Any]) -> _READ:
    numbers, ordered, code = _numbers(data)
    return {"numbers": numbers, **_forms(_ORDERS[code])}, ordered, " ".join((code, *sorted(numbers.split(", "))))


def _read_sorted(data: Mapping[str, Any]) -> _READ | None:
    given, ordered, key = _read_ordered(data)
    return (given, ordered, key) if key.startswith("rising") else None


def _read_extreme(data: Mapping[str, Any]) -> _READ:
    numbers, ordered, code = _numbers(data)
    each = numbers.split(", ")
    given = {"numbers": numbers, "or": _joined(each, "or"), **_forms(_SIDES[code])}
    return given, ordered.split(", ")[0], " ".join((code, *sorted(each)))


def _read_legs(data: Mapping[str, Any]) -> _READ | None:
    animals = data["animals"]
    if not animals.keys() <= PLURALS.keys():
        return None
    names = [f"{count} {PLURALS[name]}" if count > 1 else _one(name) for name, count in animals.items()]
    total = sum(count * LEGS[name] for name, count in animals.items())
    given = {"animals": " and ".join(names), "list": ", ".join(names)}
    return (given, str(total), " ".join(sorted(names))) if total < 100 else None


def _one(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _read_filter(data: Mapping[str, Any]) -> _READ | None:
    action, side = data["operation"].split("_")
    if action != "keep" or not data["result"]:
        return None
    given = {"numbers": ", ".join(data["original_numbers"]), "limit": data["filter_value"], **_forms(_LIMITS[side])}
    return given, ", ".join(data["result"]), " ".join((side, given["limit"], *data["original_numbers"]))


def _task(name: str, generator: str, read: Callable[..., _READ | None], asked: tuple[str, ...], **config: int) -> Task:
    return Task(name, generator, config, read, asked, (), None)


_LIST = {"max_decimals": 0, "min_value": 1, "max_value": 99}
CASUAL = {
    "sums": (
        _task(
            "sums", "chain_sum", _read_sum,
            ("What is {plus}?", "{plus}", "{plus} =", "{plus} = ?", "How much is {plus}?", "{tight}", "{tight}=",
             "{tight}?", "What is {tight}?", "Calculate {plus}", "Compute {tight}", "{words}", "What is {words}?",
             "How much is {words}?", "Add {list}.", "Add {list} together", "Add up {list}", "Sum of {list}",
             "How much is {list}?", "{list} together", "What is the sum of {list}?", "What do {list} make together?",
             "What do you get if you add {list}?"),
            min_terms=2, max_terms=2, min_digits=1, max_digits=2,
        ),
    ),
    "sorting": (
        _task(
            "sorting", "number_sorting", _read_sorted,
            ("Sort {numbers}", "Sort {numbers}.", "Order {numbers}", "Sort these: {numbers}",
             "Sort these numbers: {numbers}", "Please sort {numbers}", "Can you sort {numbers}?",
             "Put {numbers} in order.", "{numbers} sorted"),
            min_numbers=3, max_numbers=4, **_LIST,
        ),
        _task(
            "sorting", "number_sorting", _read_ordered,
            _each(6, "Sort {numbers} {w}", "Sort these numbers {w}: {numbers}", "Order {numbers} {w}.",
                  "Sort {w}: {numbers}"),
            min_numbers=3, max_numbers=4, **_LIST,
        ),
        _task(
            "extremes", "number_sorting", _read_extreme,
            _each(3, "Which of {numbers} is the {w}?", "What is the {w} of {numbers}?", "{w} of {numbers}",
                  "Find the {w}: {numbers}", "Which is the {w}, {or}?", "Which number is the {w}: {numbers}?"),
            min_numbers=2, max_numbers=4, **_LIST,
        ),
    ),
    "legs": (
        _task(
            "legs", "leg_counting", _read_legs,
            ("How many legs have {animals}?", "How many legs do {animals} have together?", "Legs of {animals}",
             "{animals}: how many legs?", "How many legs in total do {animals} have?",
             "What is the number of legs of {animals}?", "There are {animals}. How many legs are there?",
             "I have {animals}. How many legs do they have?", "How many legs do {list} have?",
             "{list}: legs?", "Count legs: {list}", "How many legs are on {animals}?"),
            min_animals=1, max_animals=2, min_instances=1, max_instances=9,
        ),
        _task(
            "legs", "leg_counting", _read_legs,
            ("How many legs does {animals} have?", "How many legs has {animals}?", "Legs of {animals}"),
            min_animals=1, max_animals=1, min_instances=1, max_instances=1,
        ),
    ),
    "filters": (
        _task(
            "filters", "number_filtering", _read_filter,
            _each(4, "Which of {numbers} are {w} {limit}?", "Which are {w} {limit}: {numbers}", "{numbers} {w} {limit}",
                  "Which numbers are {w} {limit}: {numbers}?", "Keep what is {w} {limit}: {numbers}",
                  "Find all {w} {limit} in {numbers}", "Numbers {w} {limit} in {numbers}"),
            min_numbers=3, max_numbers=4, **_LIST,
        ),
    ),
}  # fmt: skip


def casual_problems(task: str, split: Split, rng: random.Random) -> Iterator[tuple[Problem, str]]:
    """Endless problems for one expert, each with the question as somebody types it."""
    streams = [(form, form.problems(split, rng.randrange(1 << 40))) for form in CASUAL[task]]

    def draw() -> Iterator[tuple[Problem, str]]:
        while True:
            form, problems = rng.choices(streams, [len(form.asked) for form, _ in streams])[0]
            problem = next(problems)
            yield problem, loose(rng.choice(form.asked).format(**problem.given), rng)

    return draw()


def loose(text: str, rng: random.Random) -> str:
    """The text with a capital letter, a mark, commas or an apostrophe more or less."""
    if rng.random() < 0.15:
        text = text.replace("What is", "What's")
    if rng.random() < 0.08:
        text = text.replace(", ", " ")
    if rng.random() < 0.5:
        text = text[0].lower() + text[1:]
    return text.rstrip("?. ") if rng.random() < 0.4 else text


_NOUNS = (
    "the moon", "the sun", "a tree", "water", "music", "my car", "a house", "the sea", "love", "time", "gold", "bread",
    "coffee", "football", "a computer", "the internet", "history", "art", "my brother", "a dragon", "winter", "money",
    "a book", "the president", "a rainbow", "chess", "cheese", "a train", "electricity", "the brain", "a good film",
    "an atom", "python", "llama.cpp", "a neural network", "logits fusion", "paris", "a river", "my homework",
)  # fmt: skip
_PLACES = (
    "France", "Germany", "Japan", "Brazil", "Italy", "China", "India", "Spain", "Canada", "Egypt", "Kenya", "Peru",
    "Norway", "Turkey", "Berlin", "London", "Rome", "New York", "Tokyo", "Africa", "Europe", "Texas",
)  # fmt: skip
_PEOPLE = (
    "Einstein", "Napoleon", "Shakespeare", "Mozart", "Newton", "Cleopatra", "Picasso", "Marie Curie", "Obama", "Plato",
    "Alan Turing", "Beethoven", "Columbus", "Darwin",
)  # fmt: skip
_LANGUAGES = ("German", "French", "Spanish", "Chinese", "Latin", "Russian", "Italian", "English", "Japanese", "Python")
_ABOUT = (
    "What is {noun}?", "Tell me about {noun}.", "Who invented {noun}?", "Why do people like {noun}?",
    "How old is {noun}?",
    "Write a poem about {noun}.", "Write a story about {noun}", "What do you think of {noun}?", "Explain {noun}",
    "How does {noun} work?", "How do I draw {noun}?", "Where can I find {noun}?", "What colour is {noun}?",
    "Do you know {noun}?", "Do you like {noun}?", "Can you help me with {noun}?", "I need {noun}.", "I like {noun}",
    "Is {noun} dangerous?", "Give me a joke about {noun}", "Describe {noun}", "Sing about {noun}", "{noun}",
    "Why is {noun} so big?", "How much does {noun} cost?", "When did {noun} begin?", "What rhymes with {noun}?",
    "Translate {noun} into {language}.", "How do you say {noun} in {language}?", "Do you speak {language}?",
    "Write a {language} program", "Say something in {language}", "What is the capital of {place}?",
    "How many people live in {place}?", "How far is it to {place}?", "What is the weather in {place}?",
    "Where is {place}?", "What should I eat in {place}?", "I come from {place}.", "Who rules {place}?",
    "Who was {person}?", "When was {person} born?", "Tell me about {person}", "What did {person} do?",
    "Did {person} live in {place}?", "Is {person} still alive?", "What would {person} say about {noun}?",
)  # fmt: skip
_NUMERIC = (
    "What is {a} times {b}?", "{a} * {b}", "{a}*{b}", "What is {a} x {b}?", "Multiply {a} and {b}.", "{a} / {b}",
    "What is {a} divided by {b}?", "Divide {a} by {b}", "Is {a} a prime number?", "Is {a} even?", "{a} squared",
    "What is the square root of {a}?", "What is {a} percent of {b}?", "What is {big} plus {large}?", "{big} + {large}",
    "{big}+{large}", "What is {high} plus {higher}?", "{high} + {higher}", "{high}+{higher}",
    "How much is {big} + {a}?", "{big} + {b}", "What is {big} and {large}?", "Add {big} and {large}.",
    "How many days are in {a} weeks?", "What was in the year {year}?", "How many wheels do {few} cars have?",
    "How many eyes do {few} dogs have?", "Convert {a} miles to km", "What is the average of {a} and {b}?",
    "Count to {a}", "Double {a}", "What is half of {a}?", "Draw {few} circles",
)  # fmt: skip


def long_sum(rng: random.Random) -> str:
    """A sum of three or four terms, which is beyond them too."""
    (form,) = CASUAL["sums"]
    given = _adding([rng.randint(1, rng.choice((9, 99))) for _ in range(rng.choice((3, 3, 4)))])
    return loose(rng.choice(form.asked).format(**given), rng)


def foreign(rng: random.Random) -> str:
    """A question that is beyond the models."""
    numbers = {
        "a": rng.randint(2, 99), "b": rng.randint(2, 20), "few": rng.randint(2, 9), "year": rng.randint(1200, 2030),
        "big": rng.randint(100, 9999), "large": rng.randint(100, 9999),
        "high": rng.randint(60, 99), "higher": rng.randint(60, 99),
    }  # fmt: skip
    words = {"noun": _NOUNS, "place": _PLACES, "person": _PEOPLE, "language": _LANGUAGES}
    form = rng.choice(_NUMERIC if rng.random() < 0.35 else _ABOUT)
    text = form.format(**numbers, **{name: rng.choice(values) for name, values in words.items()})
    return loose(text[0].upper() + text[1:], rng)
