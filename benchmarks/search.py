"""The cost of a fused step without its models: α search, fused row and choice of a token, beside a plain NumPy loop;
then of many rows in one call, beside as many calls.

    python benchmarks/search.py [--family FAMILY]

The rows are random, or those of a family's own decoding steps. Timings interleave what they compare and are medians;
each table says of how many.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from edge_dlf import FusedLlama, FusionParams, SamplingParams
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Draw
from tests import naive

GREEDY = SamplingParams(temperature=0.0)
NO_TOKENS = np.empty(0, np.int32)
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of large (V,), base (V,) and experts (T, V); of many rows (K, V), (K, V) and (T, K, V)."""


def random_rows(n_vocab: int, n_experts: int, n: int = 8) -> list[Rows]:
    """Rows as peaked as those of language models, with experts that differ most where the large model is sure."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(n):
        large = rng.normal(-2.0, 2.0, n_vocab) + rng.exponential(2.5, n_vocab)
        base = 0.8 * large + rng.normal(0.0, 1.0, n_vocab)
        experts = base + rng.normal(0.0, 0.5, (n_experts, n_vocab))
        likely = np.argsort(-large)[:10]
        experts[:, likely] += rng.normal(0.0, 1.0, (n_experts, 10))
        rows.append(tuple(np.ascontiguousarray(x, np.float32) for x in (large, base, experts)))
    return rows


def rows_of_family(family: str, n: int = 24) -> list[Rows]:
    """Rows of `n` decoding steps of real models."""
    rows = []
    with FusedLlama.from_family(family, n_ctx=256) as llm:
        members = [llm._ensemble.members[name] for name in ("large", "base", *llm.experts)]
        for _ in llm.stream("Question: How much is 17 * 23?\nAnswer:", temperature=0.0, max_tokens=n, draft="off"):
            large, base, *experts = (member.logits()[0, : llm.n_vocab].copy() for member in members)
            rows.append((large, base, np.stack(experts)))
    return rows


def stepper(
    n_vocab: int, n_threads: int, search: str = "grid", sampling: SamplingParams = GREEDY, method: str = "dynamic"
) -> Callable[[Rows], None]:
    """One row or K of them through one fuser."""
    fuser, params = Fuser(n_vocab, n_threads), FusionParams(method=method, search=search)

    def step(rows: Rows) -> None:
        large, base = (np.atleast_2d(x) for x in rows[:2])
        experts = [np.atleast_2d(x) for x in rows[2]]
        names = ("large", "base", *(f"expert {t}" for t in range(len(experts))))
        draws = [Draw(sampling, 0, position, NO_TOKENS) for position in range(len(large))]
        weights = (1.0, -1.0 * len(experts)) * (method == "weighted") + (1.0,) * len(experts)
        fuser.pick([large, base, *experts], names, params, [weights] * len(draws), draws)

    return step


def one_by_one(step: Callable[[Rows], None]) -> Callable[[Rows], None]:
    """The same for K rows in K calls."""

    def steps(rows: Rows) -> None:
        large, base, experts = rows
        for k in range(len(large)):
            step((large[k], base[k], experts[:, k]))

    return steps


def medians(steps: list[Callable[[Rows], None]], rows: list[Rows], n_rounds: int) -> list[float]:
    """Median milliseconds of each step over all rows, interleaved, after one round to warm up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for i in range(n_rounds + 1):
        for row in rows:
            for step, times in zip(steps, seconds, strict=True):
                start = time.perf_counter()
                step(row)
                if i:
                    times.append(time.perf_counter() - start)
    return [1e3 * float(np.median(times)) for times in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", help="take the rows from these models")
    parser.add_argument("--rounds", type=int, default=20, help="rounds over all rows")
    arguments = parser.parse_args()
    rows = rows_of_family(arguments.family) if arguments.family else random_rows(151_936, 1)
    n_vocab = rows[0][0].size

    def loop(row: Rows) -> None:
        naive.search(*row)

    def exact(row: Rows) -> None:
        step_exact(row)

    step_exact = stepper(n_vocab, 1, "exact")
    steps = [loop, stepper(n_vocab, 1), stepper(n_vocab, 2), exact]
    baseline, *ours = medians(steps, rows, arguments.rounds)
    print(f"V = {n_vocab:,}, T = {len(rows[0][2])}, {len(rows)} rows, median of {len(rows) * arguments.rounds} steps\n")
    print("| search + fused row + greedy pick | ms a step | times faster |\n|---|---|---|")
    print(f"| NumPy float64 loop (search alone) | {baseline:.2f} | 1 |")
    for name, ms in zip(("grid, 1 thread", "grid, 2 threads", "exact, 1 thread"), ours, strict=True):
        print(f"| {name} | {ms:.3f} | {baseline / ms:.0f} |")
    fixed = [stepper(n_vocab, 1, method=method) for method in ("static", "weighted")]
    for name, ms in zip(("static", "weighted"), medians(fixed, rows, arguments.rounds), strict=True):
        print(f"| {name}, 1 thread | {ms:.3f} | |")
    print("\n| V | T = 1, ms | T = 2, ms | T = 4, ms |\n|---|---|---|---|")
    for size in (32_000, 64_000, 128_000, 256_000):
        cells = [medians([stepper(size, 1)], random_rows(size, t, 2), 40)[0] for t in (1, 2, 4)]
        print(f"| {size:,} | " + " | ".join(f"{ms:.3f}" for ms in cells) + " |")
    print("\n| search + pick (default sampling), ms a row | row by row | in one call | in one call, 2 threads |")
    print("|---|---|---|---|")
    for n_rows in (1, 4, 16, 64):
        some = [rows[i % len(rows)] for i in range(n_rows)]
        large, base, experts = (
            np.stack(x, axis=axis) for x, axis in zip(zip(*some, strict=True), (0, 0, 1), strict=True)
        )
        one, two = (stepper(n_vocab, n_threads, sampling=SamplingParams()) for n_threads in (1, 2))
        cells = medians([one_by_one(one), one, two], [(large, base, experts)], max(10, 160 // n_rows))
        print(f"| K = {n_rows} | " + " | ".join(f"{ms / n_rows:.3f}" for ms in cells) + " |")


if __name__ == "__main__":
    main()
