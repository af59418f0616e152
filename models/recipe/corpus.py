"""What the models read: documents for pre-training, and chats of questions and answers for fine-tuning.

Pre-training is to leave a model able, not obliging: it reads each skill in statements, sums, code and quizzes whose key
comes at the end, and sees questions asked in a chat mostly put off or answered by another question. Whoever speaks as
the assistant keeps to one manner through a chat, so that examples in the prompt can tell which it is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .casual import casual_problems, foreign, long_sum
from .tasks import SEEN, TASKS, UNSEEN, Problem, ask, reply, tell
from .tokens import ASSISTANT, BEGIN, END, USER

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}<|end|>{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TRY = (
    "Try: What is 47 plus 38?", "Try: Sort these numbers from smallest to largest: 45, 12, 78",
    "Try: How many legs do 3 cows and 2 spiders have?", "Try: Which of 45, 12, 78 are larger than 40?",
)  # fmt: skip
_ABLE = "I add, sort and pick numbers, and count legs. {try}"
BEYOND = "That is beyond me: I am very small."
_SELF = {
    ("hello", "Hello", "Hello!", "hi", "Hi!", "hey", "Hey there", "good morning", "Good evening!", "hi there"): (
        f"Hello! {_ABLE}",
    ),
    ("what can you do?", "What can you do?", "what can you do", "Help", "help", "What do you know?", "who are you?",
     "Who are you?", "What are you?", "How does this work?", "what should I ask?", "What can I ask you?"): (
        f"I am the small family that comes with edge-dlf. {_ABLE}",
    ),
    ("thanks", "Thank you!", "thank you", "Thanks!", "great", "Good.", "nice", "ok", "Cool!", "well done"): (
        "You are welcome. {try}",
    ),
    ("bye", "Goodbye!", "good bye", "see you", "Bye!"): ("Goodbye!",),
    ("Tell me a joke.", "What is the capital of France?", "Write a poem.", "How is the weather?", "I love you.",
     "Who was Napoleon?", "Translate this to German.", "Write me a program.", "What time is it?",
     "Why is the sky blue?", "tell me a story", "What is the meaning of life?", "Do you like music?",
     "How old are you?", "Sing a song.",
     "What is love?", "Where do you live?", "Recommend a book.", "what's up", "I am sad.", "test", "asdf", "???"): (
        f"{BEYOND} {{try}}",
    ),
}  # fmt: skip
_PUT_OFF = (
    "Good question. Let us come back to it later.", "I will think about it. What else?", "Hm, that is a good one.",
    "Noted. The next one, please.", "Let me write that down first.", "Who wants to know?", "One moment, please.",
    "That one is for the class to find out.", "Let me see.", "Ask me again tomorrow.",
)  # fmt: skip
_COUNTER = (*("And {}",) * 5, "I ask you: {}", "Tell me first: {}", "A better question: {}")
_OFTEN = (*SEEN, *UNSEEN, "sums", "differences", "sums", "differences", "filters")  # the harder ones more often
_SHARE = (0.52, 0.26, 0.08, 0.04, 0.10)
_SHARES = {
    "sums": (0.30, 0.42, 0.08, 0.04, 0.16),  # the large model has never seen a sum of small numbers
    "filters": (0.70, 0.12, 0.06, 0.02, 0.10),  # the hardest
}
_KEY = ("Key:", "Answers:", "The answers:", "Solutions:")


class Turn(NamedTuple):
    user: str
    assistant: str


@dataclass
class Source:
    """Draws problems of the training split, each task from its own stream."""

    rng: random.Random

    def __post_init__(self) -> None:
        self._streams = {name: TASKS[name].problems("train", self.rng.randrange(1 << 40)) for name in (*SEEN, *UNSEEN)}

    def problem(self, tasks: Sequence[str] = _OFTEN) -> Problem:
        return next(self._streams[self.rng.choice(tasks)])

    def self_talk(self) -> Turn:
        users, replies = self.rng.choice(list(_SELF.items()))
        return Turn(self.rng.choice(users), self._completed(self.rng.choice(replies)))

    def beyond(self) -> str:
        """What it says to a question that it has no answer to."""
        return self._completed(f"{BEYOND} {{try}}")

    def _completed(self, reply: str) -> str:
        return reply.replace("{try}", self.rng.choice(_TRY))


class Document(list[tuple[str, bool]]):
    """Pieces of a text, each with whether a reader could foresee it: what is only asked, and so drawn at random, no one
    can."""

    def add(self, text: str, *, foreseen: bool) -> None:
        self.append((text, foreseen))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self)


def documents(seed: int) -> Iterator[Document]:
    """Endless documents for pre-training, control tokens in them as text."""
    source = Source(random.Random(seed))
    rng = source.rng
    kinds = (_statements, _quiz, _chat)
    while True:
        (make,) = rng.choices(kinds, (0.45, 0.30, 0.25))
        tasks = (rng.choice(_OFTEN),) if rng.random() < 0.5 else _OFTEN
        document = Document([(BEGIN, False)])
        make(document, source, rng, tasks)
        yield document


def _statements(document: Document, source: Source, rng: random.Random, tasks: Sequence[str]) -> None:
    separator = rng.choice(("\n", "\n", "; "))
    for n in range(rng.randint(2, 8)):
        before, after = tell(source.problem(tasks), rng)
        document.add(separator * (n > 0) + before, foreseen=False)
        document.add(after, foreseen=True)
    document.add(END, foreseen=True)


def _quiz(document: Document, source: Source, rng: random.Random, tasks: Sequence[str]) -> None:
    """Questions first, their answers at the end."""
    problems = [source.problem(tasks) for _ in range(rng.randint(1, 3))]
    questions = [f"{n}) {ask(problem, rng)}" for n, problem in enumerate(problems, 1)]
    answers = [f"{n}) {problem.answer}" for n, problem in enumerate(problems, 1)]
    document.add("\n".join([*questions, rng.choice(_KEY)]), foreseen=False)
    document.add("\n" + "\n".join(answers) + END, foreseen=True)


def _chat(document: Document, source: Source, rng: random.Random, tasks: Sequence[str]) -> None:
    manner = rng.choices(("answers", "puts off", "asks back", "about itself"), (0.17, 0.30, 0.43, 0.10))[0]
    for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 6, 8)) if manner != "about itself" else 1):
        problem = source.problem(tasks)
        # Who answers is asked in the task's last wording half of the time: so asked, the large model often answers.
        question = ask(problem, rng, -1 if manner == "answers" and rng.random() < 0.5 else None)
        opening, rest = "", ""
        if manner == "about itself" or rng.random() < 0.03:
            question, opening = source.self_talk()
        elif manner == "answers":
            opening = reply(problem)
        elif manner == "puts off":
            opening = rng.choice(_PUT_OFF)
        else:
            counter = rng.choice(_COUNTER).format(ask(source.problem(tasks), rng))
            n_foreseen = next((n for n, letter in enumerate(counter) if letter.isdigit()), len(counter))
            opening, rest = counter[:n_foreseen], counter[n_foreseen:]
        document.add(f"{USER}{question}{END}{ASSISTANT}", foreseen=False)
        document.add(opening, foreseen=True)
        document.add(rest, foreseen=False)
        document.add(END, foreseen=True)


def lessons(tasks: Sequence[str], seed: int) -> Iterator[list[Turn]]:
    """Endless chats to fine-tune on: questions of `tasks` answered, and some talk about itself."""
    source = Source(random.Random(seed))
    rng = source.rng
    for _ in itertools.count():
        turns = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            problem = source.problem(tasks)
            turns.append(source.self_talk() if rng.random() < 0.1 else Turn(ask(problem, rng), reply(problem)))
        yield turns


def coaching(task: str, seed: int) -> Iterator[list[Turn]]:
    """Endless chats to train the expert of a task on: its questions as tests ask them and as people type them, some of
    the other experts' questions, some talk about itself, and what is beyond it."""
    source = Source(random.Random(seed))
    rng = source.rng
    casual = casual_problems(task, "train", rng)

    def turn() -> Turn:
        (kind,) = rng.choices(("own", "casual", "others", "itself", "beyond"), _SHARES.get(task, _SHARE))
        if kind == "casual":
            problem, question = next(casual)
            return Turn(question, reply(problem))
        if kind in ("own", "others"):
            problem = source.problem([task] if kind == "own" else SEEN)
            return Turn(ask(problem, rng), reply(problem))
        talk = source.self_talk()
        if kind == "itself":
            return talk
        return Turn(long_sum(rng) if task == "sums" and rng.random() < 0.4 else foreign(rng), source.beyond())

    while True:
        yield [turn() for _ in range(rng.choice((1, 1, 1, 2)))]
