"""Drafted against plain fused decoding, and against the large model alone.

    python benchmarks/draft.py --family FAMILY [--tokens 64] [--rounds 2] [--draft auto] [--temperature 0]
                               [--questions FILE] [--turns 0] [--workloads maths,code]
                               [--rows 1] [--threads N] [--processor]

Each prompt is answered plainly, drafted, and by the large model alone in turn, the order changing from prompt to
prompt, by one family in memory; tokens a second are of decoding alone, from a prompt that is in the cache to the end of
the answer, medians. "ratio" is the median over answers of drafted to plain, "in all" that of the time that all answers
took; "same" counts answers that are equal token for token (batches round otherwise than single steps: near ties may go
either way). The questions of FILE, one a line, are asked through the chat template,
as a workload "own", each as if the first of them, --turns many, had been asked and answered before.

With --rows 4, four answers are decoded at once, as a batch does: each workload is answered as a whole, at least eight
prompts, plainly and drafted in turn, prompts included.

--processor counts seconds of processor time, and lets the engine go by them too: for one thread on a machine that other
programs use.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from edge_dlf import FusedLlama
from edge_dlf.answers.tokenizer import Prompt
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.generation import Generation, StepResult

WORKLOADS = {
    "maths": [
        "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How "
        "many clips did Natalia sell altogether in April and May?\nAnswer:",
        "Question: A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it "
        "take?\nAnswer:",
        "Question: Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much "
        "did she earn?\nAnswer:",
        "Question: James writes a 3-page letter to 2 different friends twice a week. How many pages does he write a "
        "year?\nAnswer:",
    ],
    "code": [
        "# Return the n-th Fibonacci number.\ndef fibonacci(n):\n",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    ],
    "chat": [
        "User: What should I pack for a week by the sea?\nAssistant:",
        "User: Why is the sky blue?\nAssistant:",
    ],
    "quoting": [
        "Text: The committee met on Tuesday, heard three reports on the harbour, and put off the vote until spring.\n"
        "Repeat the text word for word, twice:\nText: The committee met",
        "List: apple, pear, plum, cherry, quince, medlar, apple, pear, plum, cherry, quince, medlar, apple, pear,",
    ],
    "traps": [  # what came before comes again, but goes on otherwise
        "Random digits: 7 1 4 9 0 2 8 3 1 5 7 2 4 0 9 6 2 8 1 7 3 5 0 4 9 8 6 1 2 7 5 3 0 8 4 6 1 9 2 5 7 0 3 8",
        "Rolls of a die: red 4, blue 1, red 6, blue 3, red 2, blue 2, red 5, blue 4, red 1, blue 6, red 3, blue 5, red",
        "Keys: a7f:91c, a3b:40e, a7f:2d8, a9c:b15, a3b:7e2, a7f:c04, a9c:38d, a3b:f61, a9c:05a, a7f:",
    ],
}
_COUNTS = ("n_drafted", "n_accepted")


@dataclass
class Tally:
    """Tokens a second of each answer; steps with their drafted and accepted tokens; answers that are the same."""

    seconds: Counter[str] = field(default_factory=Counter)
    speeds: dict[str, list[float]] = field(default_factory=lambda: {"off": [], "drafted": [], "large": []})
    steps: list[tuple[int, int]] = field(default_factory=list)
    n_same: int = 0

    @property
    def chance(self) -> float:
        """How often a guess is accepted that was verified, all before it being right."""
        n_accepted = sum(accepted for _, accepted in self.steps)
        return n_accepted / max(n_accepted + sum(accepted < drafted for drafted, accepted in self.steps), 1)

    @property
    def n_mean(self) -> float:
        return sum(drafted for drafted, _ in self.steps) / max(len(self.steps), 1)


def answer(
    llm: FusedLlama, prompt: Prompt, options: argparse.Namespace, **settings: Any
) -> tuple[list[int], float, list[tuple[int, int]]]:
    """Token ids, seconds, and the drafted and accepted tokens of each step."""
    for _ in llm.stream(prompt, max_tokens=1, draft="off"):
        pass
    stream = llm.stream(prompt, max_tokens=options.tokens, temperature=options.temperature, seed=1, **settings)
    with counted(llm.driver.decoder) as steps:
        tokens = [token.id for token in stream]
    return tokens, stream.report.counts.prefill_s + stream.report.counts.decode_s, steps


@contextmanager
def counted(decoder: Decoder) -> Iterator[list[tuple[int, int]]]:
    """Drafted and accepted tokens of each step that picks, while this lasts."""
    steps: list[tuple[int, int]] = []
    step = decoder.step

    def counting(generations: Sequence[Generation], *arguments: Any) -> list[StepResult]:
        counts = generations[0].counts
        before = counts.n_drafted, counts.n_accepted
        results = step(generations, *arguments)
        if results[0].picks:
            steps.append((counts.n_drafted - before[0], counts.n_accepted - before[1]))
        return results

    decoder.step = counting  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        decoder.step = step  # type: ignore[method-assign]


def run(llm: FusedLlama, prompts: Sequence[Prompt], options: argparse.Namespace) -> Tally:
    tally = Tally()
    ways = {"off": {"draft": "off"}, "drafted": {"draft": options.draft}, "large": {"draft": "off", "method": "large"}}
    for number, prompt in enumerate([*prompts] * options.rounds):
        order = list(ways)[number % 3 :] + list(ways)[: number % 3]
        tokens = {}
        for way in order:
            tokens[way], seconds, steps = answer(llm, prompt, options, **ways[way])
            tally.speeds[way].append(sum(accepted + 1 for _, accepted in steps) / seconds)
            tally.seconds[way] += seconds
            if way == "drafted":
                tally.steps += steps
        tally.n_same += tokens["off"] == tokens["drafted"]
    return tally


def run_rows(llm: FusedLlama, requests: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Answer all requests at once, plainly and drafted in turn. Returns the cells of the table."""
    requests = [*requests] * -(-2 * options.rows // len(requests))
    clock = llm.driver.decoder.ensemble.clock
    seconds: dict[str, list[float]] = {"off": [], "drafted": []}
    texts, counts = {}, Counter[str]()
    for number in range(options.rounds + 1):
        for way in sorted(seconds, reverse=number % 2 == 0):
            started = clock()
            draft = options.draft if way == "drafted" else "off"
            settings = {"max_tokens": options.tokens, "temperature": options.temperature, "draft": draft}
            bodies = [result["response"]["body"] for result in llm.batch(requests, ordered=True, **settings)]
            took = clock() - started
            if number:  # the first round warms up
                seconds[way].append(took)
                texts[way] = [str(body["choices"]) for body in bodies]
                counts[way] += sum(body["usage"]["completion_tokens"] for body in bodies)
                if way == "drafted":
                    counts.update({name: sum(body["edge_dlf"][name] for body in bodies) for name in _COUNTS})
    off, drafted = map(sum, seconds.values())
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    n_same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    return [
        *(f"{number:.1f}" for number in (counts["off"] / off, counts["drafted"] / drafted)),
        *(f"{number:.2f}" for number in (median(ratios), off / drafted)),
        f"{counts['n_accepted'] / max(counts['n_drafted'], 1):.0%}",
        f"{counts['n_drafted'] / counts['drafted']:.1f}",
        f"{n_same}/{len(requests)}",
    ]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def conversation(llm: FusedLlama, questions: Sequence[str], n_tokens: int) -> list[dict[str, str]]:
    """Each question alone, and its answer."""
    messages = []
    for text in questions:
        reply = llm.create_chat_completion(asked(text), max_tokens=n_tokens, temperature=0.0)["choices"][0]["message"]
        messages += [*asked(text), {"role": "assistant", "content": reply["content"]}]
    return messages


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(options.family, n_ctx=512, n_parallel=options.rows, n_threads=options.threads) as llm:
        if options.processor:
            llm.driver.decoder.ensemble.clock = time.process_time
        yield llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--draft", default="auto", type=lambda text: int(text) if text.isdigit() else text)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--workloads", help="those named [all]")
    parser.add_argument("--rows", type=int, default=1, help="answers that are decoded at once")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor", action="store_true", help="count processor time")
    options = parser.parse_args()
    wanted = options.workloads.split(",") if options.workloads else [*WORKLOADS, "own"]
    if options.rows > 1:
        main_rows(options, wanted)
        return
    print("| workload | large alone, tokens/s | plain | drafted | ratio | in all | accepted | a step | same |")
    print("|---" * 9 + "|")
    with opened(options) as llm:
        for draft in (options.draft, "off"):
            answer(llm, WORKLOADS["code"][0], options, draft=draft)
        workloads: dict[str, Sequence[Prompt]] = {name: WORKLOADS[name] for name in WORKLOADS if name in wanted}
        if options.questions and "own" in wanted:
            questions = options.questions.read_text("utf-8").splitlines()
            before = conversation(llm, questions[: options.turns], options.tokens)
            workloads["own"] = [llm.apply_chat_template([*before, *asked(text)]) for text in questions]
        for name, prompts in workloads.items():
            tally = run(llm, prompts, options)
            plain, drafted, large = tally.speeds.values()
            cells = [name, *(f"{median(values):.2f}" for values in (large, plain, drafted))]
            cells.append(f"{median(a / b for a, b in zip(drafted, plain, strict=True)):.2f}")
            cells.append(f"{tally.seconds['off'] / tally.seconds['drafted']:.2f}")
            cells += [f"{tally.chance:.0%}", f"{tally.n_mean:.1f}", f"{tally.n_same}/{len(plain)}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main_rows(options: argparse.Namespace, wanted: Sequence[str]) -> None:
    print("| workload | plain, tokens/s | drafted | ratio | in all | accepted | drafted a token | same |")
    print("|---" * 8 + "|")
    requests = {name: [{"prompt": text} for text in texts] for name, texts in WORKLOADS.items()}
    if options.questions:
        requests["own"] = [{"messages": asked(text)} for text in options.questions.read_text("utf-8").splitlines()]
    with opened(options) as llm:
        for name in requests:
            if name in wanted:
                print(f"| {' | '.join([name, *run_rows(llm, requests[name], options)])} |", flush=True)


if __name__ == "__main__":
    main()
