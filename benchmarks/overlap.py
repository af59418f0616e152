"""Whether members on the CPU should share its cores at the same time or take turns with all of them.

    python benchmarks/overlap.py --family FAMILY [--steps 24] [--tokens 1]

One step evaluates --tokens tokens on every member. "in turn" gives each member all threads; the others split the
threads between groups that run at the same time. All ways take turns, step by step, in one process; the table
has medians.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import llama_cpp as lib

from edge_dlf import FusedLlama
from edge_dlf.engine.backend import Run
from edge_dlf.llama import default_n_threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1)
    options = parser.parse_args()
    n_cores = default_n_threads()
    with FusedLlama.from_family(options.family, n_ctx=512) as llm:
        ensemble = llm._ensemble
        names = tuple(ensemble.members)
        half = max(1, n_cores // 2)
        ways = {
            f"in turn, {n_cores} threads each": ((names,), n_cores),
            f"large beside the others in turn, {half} threads each": ((names[:1], names[1:]), half),
            f"all side by side, {max(1, n_cores // len(names))} threads each": (
                tuple((name,) for name in names),
                max(1, n_cores // len(names)),
            ),
            f"all side by side, {n_cores} threads each": (tuple((name,) for name in names), n_cores),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        prompt = llm.tokenize("The quick brown fox jumps over the lazy dog. " * 8)[:64]
        for number in range(options.steps + 2):
            for way, (groups, n_threads) in ways.items():
                for member in ensemble.members.values():
                    lib.llama_set_n_threads(member._ctx, n_threads, n_threads)
                ensemble.groups, ensemble.overlap = groups, "threads"
                for name in names:
                    ensemble.shorten(name, 0, len(prompt))
                    if rest := prompt[ensemble.n_held(name, 0) :]:
                        ensemble.decode({name: [Run(0, rest, 1)]})
                tokens = prompt[: options.tokens]
                started = time.perf_counter()
                ensemble.decode({name: [Run(0, tokens, len(tokens))] for name in names})
                if number >= 2:
                    seconds[way].append(time.perf_counter() - started)
    print(f"| {options.tokens} tokens, ms a step | median | best |\n|---|---|---|")
    for way, timings in seconds.items():
        print(f"| {way} | {1e3 * median(timings):.1f} | {1e3 * min(timings):.1f} |")


if __name__ == "__main__":
    main()
