"""How long the first token takes when a prompt is read, and when it is found in the prompt cache.

    python benchmarks/prompt_cache.py --family FAMILY [--tokens 2000] [--rounds 5] [--threads N]

The prompt is read once. In each round the family is then loaded anew, as by a later process, and finds the prompt in
the cache. Seconds to the first token of the answer, loading left out; then the size of the cache's files, the seconds
until they were written, and whether the greedy answers are the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from edge_dlf import FusedLlama

N_ANSWER = 8
TEXT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text("utf-8")


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
    asked = parser.parse_args()
    n_ctx = asked.tokens + 2 * N_ANSWER
    with TemporaryDirectory() as name:
        folder = Path(name)
        with load(asked.family, folder, n_ctx, asked.threads) as llm:
            tokens = llm.tokenize(TEXT, special=False)
            prompt = (tokens * (asked.tokens // len(tokens) + 1))[: asked.tokens]
            read_s, expected, n_read = answer(llm, prompt)
            started = time.perf_counter()
        written_s = time.perf_counter() - started
        n_bytes = sum(path.stat().st_size for path in folder.glob("*.state"))
        rounds = []
        for _ in range(asked.rounds):
            with load(asked.family, folder, n_ctx, asked.threads) as llm:
                rounds.append(answer(llm, prompt))
    found_s = median(seconds for seconds, _, _ in rounds)
    same = all(tokens == expected for _, tokens, _ in rounds)
    each = ", ".join(f"{seconds:.2f}" for seconds, _, _ in rounds)
    print("| first token of a prompt of | tokens read | s |\n|---|---|---|")
    print(f"| {asked.tokens} tokens, read | {n_read} | {read_s:.2f} |")
    print(f"| the same, from the prompt cache | {max(n for _, _, n in rounds)} | {found_s:.2f} |")
    print(f"\n{read_s / found_s:.0f} times as fast; by round: {each} s; the same answer: {'yes' if same else 'no'}")
    per_1000 = n_bytes / 1e3 / asked.tokens
    print(f"{n_bytes / 1e6:.0f} MB, {per_1000:.1f} MB per 1,000 tokens, written {written_s:.2f} s after the answer")


if __name__ == "__main__":
    main()
