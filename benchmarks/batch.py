"""Many requests at once, against the bound that the members themselves set, and against one request at a time.

    python benchmarks/batch.py --family FAMILY [--parallel 16] [--rows 64] [--single 4] [--tokens 128] [--rounds 2]

The bound is what the members alone need for the same tokens: each prompt prefilled in one batch, and every decoding
step with all sequences at work, both measured before and after each round at the lengths that the rows have. "of the
bound" is bound over time taken. "single" answers some of the rows one at a time, without drafting.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

from edge_dlf import FusedLlama
from edge_dlf.engine.backend import Run

TEMPLATES = (
    "{a} buys {n} boxes of pencils with {m} pencils in each box. {a} gives {k} pencils to {b}. How many pencils does "
    "{a} have left?",
    "A train with {n} carriages carries {m} passengers in each carriage. At the next station {k} passengers get off "
    "and nobody gets on. How many passengers are on the train now?",
    "{a} reads {n} pages of a book every day for {m} days, and {b} reads {k} pages more than that altogether. How many "
    "pages does {b} read?",
    "A baker bakes {n} trays of rolls, {m} rolls on each tray. By noon {k} rolls are sold. At {n} cents each, how many "
    "cents would the rolls that are left bring?",
)
NAMES = ("Ana", "Boris", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")


def questions() -> Iterator[str]:
    """Word problems, each another one."""
    n = 0
    while True:
        form = TEMPLATES[n % len(TEMPLATES)]
        numbers = {"n": 3 + n % 17, "m": 4 + 7 * n % 29, "k": 2 + 5 * n % 11}
        yield form.format(a=NAMES[n % 8], b=NAMES[(n + 3) % 8], **numbers)
        n += 1


def rows(n: int, tokens: int) -> list[dict[str, object]]:
    source = questions()
    return [{"id": i, "prompt": f"Question: {next(source)}\nAnswer:", "max_tokens": tokens} for i in range(n)]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def member_costs(llm: FusedLlama, n_parallel: int, n_prompt: int, n_answer: int) -> tuple[float, float]:
    """Seconds that all members need for a token of a prompt of `n_prompt`, and for a step with `n_parallel` sequences,
    which hold a prompt and half an answer."""
    ensemble, prompt = llm._ensemble, (llm.tokenize(next(questions())) * n_prompt)[:n_prompt]
    prefill = step = 0.0
    ensemble.forget(range(n_parallel))
    for name, member in ensemble.members.items():

        def run(runs: list[Run], name: str = name) -> None:
            ensemble.decode({name: runs})

        fills = []
        for seq in range(n_parallel):
            fills.append(timed(lambda seq=seq: run([Run(seq, prompt, 1)])))
            half = prompt[:1] * (n_answer // 2)
            for start in range(0, len(half), member.n_batch):
                run([Run(seq, half[start : start + member.n_batch], 1)])
        steps = [timed(lambda: run([Run(seq, prompt[:1], 1) for seq in range(n_parallel)])) for _ in range(5)]
        prefill += median(fills) / n_prompt
        step += median(steps)
    ensemble.forget(range(n_parallel))
    return prefill, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    print("| round | rows | rows/hour | tokens/s | of the bound | single rows/hour | times single |")
    print("|---|---|---|---|---|---|---|")
    with (
        FusedLlama.from_family(options.family, n_ctx=1024, n_parallel=options.parallel) as many,
        FusedLlama.from_family(options.family, n_ctx=1024) as one,
    ):
        requests = rows(options.rows, options.tokens)
        list(many.batch(rows(options.parallel, 4), temperature=0.0))
        for number in range(options.rounds):
            before = member_costs(many, options.parallel, 60, 64)
            started = time.perf_counter()
            usages = [r["response"]["body"]["usage"] for r in many.batch(requests, temperature=0.0)]
            seconds = time.perf_counter() - started
            n_prompt = sum(usage["prompt_tokens"] for usage in usages)
            n_answer = sum(usage["completion_tokens"] for usage in usages)
            after = member_costs(many, options.parallel, n_prompt // len(usages), n_answer // len(usages))
            prefill, step = ((a + b) / 2 for a, b in zip(before, after, strict=True))
            bound = n_prompt * prefill + n_answer / options.parallel * step
            stride = max(1, options.rows // options.single)
            some = requests[number % stride :: stride][: options.single]
            alone = timed(lambda some=some: list(one.batch(some, temperature=0.0, draft="off"))) / len(some)
            print(
                f"| {number + 1} | {len(usages)} | {3600 * len(usages) / seconds:.0f} | {n_answer / seconds:.2f} "
                f"| {bound / seconds:.2f} | {3600 / alone:.0f} | {alone * len(usages) / seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
