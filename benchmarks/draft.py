"""Drafted against plain fused decoding, and against the large model alone.

    python benchmarks/draft.py --family FAMILY [--tokens 64] [--rounds 2] [--draft auto] [--temperature 0]

Each prompt is answered plainly and drafted in turn, the order changing from prompt to prompt, by one family in memory;
tokens a second are of decoding alone. "ratio" is the median over answers of drafted to plain; "same" counts answers
that are equal token for token (batches round otherwise than single steps: near ties may go either way).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from statistics import median

from edge_dlf import FusedLlama

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
}


@dataclass
class Tally:
    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    large: list[float] = field(default_factory=list)
    n_drafted: int = 0
    n_accepted: int = 0
    n_steps: int = 0
    n_same: int = 0


def answer(llm: FusedLlama, prompt: str, options: argparse.Namespace, **settings: object) -> tuple[list[int], object]:
    stream = llm.stream(prompt, max_tokens=options.tokens, temperature=options.temperature, seed=1, **settings)
    return [token.id for token in stream], stream.report


def run(llm: FusedLlama, prompts: list[str], options: argparse.Namespace) -> Tally:
    tally = Tally()
    for number, prompt in enumerate(prompts * options.rounds):
        order = ["off", options.draft] if number % 2 else [options.draft, "off"]
        tokens = {}
        for draft in order:
            tokens[draft], report = answer(llm, prompt, options, draft=draft)
            (tally.plain if draft == "off" else tally.drafted).append(report.generation_tps)
            if draft != "off":
                tally.n_drafted += report.n_drafted
                tally.n_accepted += report.n_accepted
                tally.n_steps += report.n_steps
        tally.n_same += tokens["off"] == tokens[options.draft]
        tally.large.append(answer(llm, prompt, options, method="large", draft="off")[1].generation_tps)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--draft", default="auto", type=lambda text: int(text) if text.isdigit() else text)
    options = parser.parse_args()
    print("| workload | large alone, tokens/s | plain | drafted | ratio | accepted | drafted a step | same |")
    print("|---|---|---|---|---|---|---|---|")
    with FusedLlama.from_family(options.family, n_ctx=512) as llm:
        answer(llm, WORKLOADS["chat"][0], options, draft=options.draft)
        for name, prompts in WORKLOADS.items():
            tally = run(llm, prompts, options)
            ratio = median(a / b for a, b in zip(tally.drafted, tally.plain, strict=True))
            print(
                f"| {name} | {median(tally.large):.2f} | {median(tally.plain):.2f} | {median(tally.drafted):.2f} "
                f"| {ratio:.2f} | {tally.n_accepted / max(tally.n_drafted, 1):.0%} "
                f"| {tally.n_drafted / tally.n_steps:.1f} | {tally.n_same}/{len(tally.plain)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
