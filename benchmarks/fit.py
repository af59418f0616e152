"""Fitting the weights of the weighted fusion: the cost of a row's loss, gradient and Hessian beside NumPy; the cost and
the error of reducing rows to few tokens; the time of a fit.

    python benchmarks/fit.py [--family FAMILY --examples EXAMPLES.jsonl]

Rows are random, or those of a family's members on the answers of examples: lines {"question", "answer"} or
{"prompt", "answer"}. Timings are medians on one thread and interleave what they compare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from edge_dlf import FusedLlama
from edge_dlf.engine.backend import Run
from edge_dlf.fusion import fit
from tests import naive

N_PARALLEL_ROWS = 16


def random_rows(n_rows: int, n_vocab: int, n_members: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (M, R, V) of members that resemble each other, and tokens (R,) drawn from their mean."""
    rng = np.random.default_rng(0)
    common = rng.normal(-2.0, 2.0, (n_rows, n_vocab)) + rng.exponential(2.5, (n_rows, n_vocab))
    rows = (0.8 * common + rng.normal(0.0, 1.0, (n_members, n_rows, n_vocab))).astype(np.float32)
    return rows, (rows.mean(axis=0) + rng.gumbel(size=(n_rows, n_vocab))).argmax(axis=1)


def rows_of_examples(family: str, examples: Path, n_rows: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, rows (M, R, V) and known tokens (R,) of the first 32 tokens of each answer."""
    rows, golds = [], []
    with FusedLlama.from_family(family, n_ctx=512) as llm, examples.open() as lines:
        members = llm._ensemble.members
        names = ["large", "base", *llm.experts]
        while len(golds) < n_rows:
            example = json.loads(next(lines))
            prompt = llm.tokenize(f"Question: {example.get('question') or example['prompt']}\nAnswer: ")
            answer = llm.tokenize(example["answer"])[: 2 * N_PARALLEL_ROWS]
            text, start = [*prompt, *answer[:-1]], len(prompt) - 1
            for name in names:
                members[name].trim(0, 0)
                members[name].decode([Run(0, text[:start], 0)])
            for first in range(start, len(text), N_PARALLEL_ROWS):
                ahead = text[first : first + N_PARALLEL_ROWS]
                for name in names:
                    members[name].decode([Run(0, ahead, len(ahead))])
                rows.append(np.stack([members[name].logits()[:, : llm.n_vocab].copy() for name in names]))
            golds += answer
    return names, np.concatenate(rows, axis=1)[:, :n_rows], np.array(golds[:n_rows])


def medians(steps: list[Callable[[], object]], n_rounds: int) -> list[float]:
    """Median milliseconds of each step, interleaved, after one round to warm up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for i, (step, times) in itertools.product(range(n_rounds + 1), zip(steps, seconds, strict=True)):
        start = time.perf_counter()
        step()
        if i:
            times.append(time.perf_counter() - start)
    return [1e3 * float(np.median(times)) for times in seconds]


def show_cost_of_a_row(n_rounds: int) -> None:
    print("| loss, gradient and Hessian of a row, V = 151,936 | NumPy float64, ms | 1 thread, ms | times faster |")
    print("|---|---|---|---|")
    for n_members in (2, 3, 4):
        rows, golds = random_rows(1, 151_936, n_members)
        whole, weights = fit.whole(list(rows), [""] * n_members, golds, 151_936), np.full(n_members, 1 / n_members)

        def plain(rows: np.ndarray = rows, weights: np.ndarray = weights, gold: int = int(golds[0])) -> object:
            return naive.weighted_loss(rows[:, 0], weights, gold)

        def ours(whole: fit.AnswerRows = whole, weights: np.ndarray = weights) -> object:
            return fit.losses(whole, weights)

        baseline, ms = medians([plain, ours], n_rounds)
        print(f"| M = {n_members} | {baseline:.2f} | {ms:.3f} | {baseline / ms:.0f} |")


def show_kept_rows(rows: fit.AnswerRows, n_seeds: int) -> None:
    """Error of rows reduced to few tokens, at several weights and of the fitted weights."""
    found = fit.fit_weights(rows)
    n_members = len(rows.names)
    others = [np.eye(n_members)[0], np.eye(n_members)[-1], np.append([1.0, -1.0], np.eye(n_members - 2)[-1])]
    print(
        f"\n{len(rows)} rows, members {', '.join(rows.names)}; fitted to whole rows: weights {found.weights.round(3)},"
    )
    print(f"standard errors {found.standard_errors.round(3)}, {found.loss:.5f} nats a token\n")
    print(
        "| tokens kept | bytes a row | ms a row | mean loss off by, nats: fitted weights | large | last expert"
        " | static α = 1 | one row's loss off by (root mean square, fitted weights) | fitted weights off by, at most"
        " | loss of these on whole rows above the best |"
    )
    print("|" + "---|" * 10)
    for n_kept in (50, 100, 150, 300):
        start = time.perf_counter()
        kept = [fit.keep(rows, n_kept, seed) for seed in range(n_seeds)]
        ms = 1e3 * (time.perf_counter() - start) / n_seeds / len(rows)
        errors = [
            np.stack([fit.losses(one, w).values - fit.losses(rows, w).values for one in kept])
            for w in (found.weights, *others)
        ]
        fits = [fit.fit_weights(one).weights for one in kept]
        off = max(float(abs(w - found.weights).max()) for w in fits)
        above = max(float(fit.losses(rows, w).values.mean()) for w in fits) - found.loss
        means = " | ".join(f"{abs(error.mean(axis=1)).max():.5f}" for error in errors)
        rms = float(np.sqrt((errors[0] ** 2).mean()))
        size = 4 * n_kept * (n_members + 1)
        print(f"| {n_kept} | {size:,} | {ms:.2f} | {means} | {rms:.4f} | {off:.4f} | {above:.6f} |")


def show_time_of_a_fit(rows: fit.AnswerRows) -> None:
    print("\n| fit to kept rows of 100 tokens | s, 1 thread | s, 2 threads | Newton steps |\n|---|---|---|---|")
    kept = fit.keep(rows, 100, 0)
    for n_rows in (2_000, 40_000, 400_000):
        many = kept.take(np.arange(n_rows) % len(kept))
        seconds = []
        for n_threads in (1, 2):
            start = time.perf_counter()
            found = fit.fit_weights(many, n_threads=n_threads)
            seconds.append(time.perf_counter() - start)
        print(f"| {n_rows:,} rows | {seconds[0]:.2f} | {seconds[1]:.2f} | {found.n_steps} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", help="take the rows from these models")
    parser.add_argument("--examples", type=Path, help="prompts and answers for --family")
    parser.add_argument("--rows", type=int, default=256, help="rows of --family")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=8, help="samples for the error of kept rows")
    arguments = parser.parse_args()
    show_cost_of_a_row(arguments.rounds)
    if arguments.family:
        names, logits, golds = rows_of_examples(arguments.family, arguments.examples, arguments.rows)
    else:
        logits, golds = random_rows(32, 151_936, 3)
        names = ["large", "base", "expert"]
    rows = fit.whole(list(logits), names, golds, logits.shape[2])
    show_kept_rows(rows, arguments.seeds)
    show_time_of_a_fit(rows)


if __name__ == "__main__":
    main()
