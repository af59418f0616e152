"""How long the first token takes when a prompt is read, and when it is found in the prompt cache.

    python benchmarks/prompt_cache.py --family FAMILY [--tokens 2000] [--rounds 5] [--threads N] [--folder DIR]

The prompt is read once. In each round the family is then loaded anew, as by a later process, and finds the prompt in
the cache. Seconds to the first token of the answer, loading left out; whether the greedy answers are the same; the size
of the cache's files, and the seconds until they were written, once the answer had ended.

With --folder the cache stays there: the same command with more tokens reads those that are new.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from edge_dlf import FusedLlama

N_ANSWER = 8
TEXT = (Path(__file__).parents[1] / "LICENSE").read_text("utf-8")


def load(family: str, folder: Path, n_ctx: int, threads: int | None) -> FusedLlama:
    return FusedLlama.from_family(family, n_ctx=n_ctx, n_threads=threads, prompt_cache=folder)


def answer(llm: FusedLlama, prompt: list[int]) -> tuple[float, list[int], int]:
    """Seconds to the first token, the answer, and the tokens of the prompt that were read."""
    started = time.perf_counter()
    stream = llm.stream(prompt, max_tokens=N_ANSWER, temperature=0.0, draft="off")
    first = next(stream)
    elapsed = time.perf_counter() - started
    return elapsed, [first.id, *(token.id for token in stream)], stream.report.counts.n_prefilled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with nullcontext(asked.folder) if asked.folder else TemporaryDirectory() as folder:
        measure(asked.family, Path(folder), asked.tokens, asked.rounds, asked.threads)


def measure(family: str, folder: Path, n_tokens: int, n_rounds: int, threads: int | None) -> None:
    n_ctx = n_tokens + 2 * N_ANSWER
    with load(family, folder, n_ctx, threads) as llm:
        tokens = llm.tokenize(TEXT, special=False)
        prompt = (tokens * (n_tokens // len(tokens) + 1))[:n_tokens]
        read_s, expected, n_read = answer(llm, prompt)
        started = time.perf_counter()
    written_s = time.perf_counter() - started
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.state"))
    print("| first token of a prompt | tokens read | s |\n|---|---|---|")
    print(f"| of {n_tokens} tokens | {n_read} | {read_s:.2f} |")
    rounds = []
    for _ in range(n_rounds):
        with load(family, folder, n_ctx, threads) as llm:
            rounds.append(answer(llm, prompt))
    if rounds:
        print(f"| from the prompt cache | {rounds[0][2]} | {median(seconds for seconds, _, _ in rounds):.2f} |")
        same = all(tokens == expected for _, tokens, _ in rounds)
        each = ", ".join(f"{seconds:.2f}" for seconds, _, _ in rounds)
        print(f"\nby round: {each} s; the same answer: {'yes' if same else 'no'}")
    print(f"{n_bytes / 1e6:.0f} MB, {n_bytes / 1e3 / n_tokens:.1f} MB per 1,000 tokens, written in {written_s:.2f} s")


if __name__ == "__main__":
    main()
