"""What plain attention saves beside llama.cpp's flash attention, by length of the text and tokens in a batch.

    python benchmarks/attention.py --family FAMILY [--lengths 64,256,512,1024] [--sizes 1,2,4,8] [--prompt 512]
                                   [--ctx-size 4096] [--rounds 5] [--members large,base]

Each member gets two contexts over the same weights, one with flash attention and whole batches, one with plain
attention as a `FusedLlama` of one sequence and this --ctx-size has it on a CPU. Both evaluate the same batches in
turn: single steps and drafts after a text of each length, and --prompt more tokens of a prompt. Milliseconds are
medians; a ratio above 1 is in favour of plain attention.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from edge_dlf import FusedLlama
from edge_dlf.engine.backend import N_BATCH, Run
from edge_dlf.llama import LlamaBackend


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def fill(member: LlamaBackend, tokens: list[int]) -> None:
    """Let the member hold `tokens` and nothing else."""
    member.trim(0, 0)
    for start in range(0, len(tokens), N_BATCH):
        member.decode([Run(0, tokens[start : start + N_BATCH], 0)])


def batch(member: LlamaBackend, tokens: list[int], n_past: int, n_rows: int) -> float:
    """Milliseconds in which `tokens` follow the first `n_past`."""
    member.trim(0, n_past)
    started = time.perf_counter()
    member.decode([Run(0, tokens, n_rows)])
    member.logits()
    return 1e3 * (time.perf_counter() - started)


def measure(like: LlamaBackend, tokens: list[int], options: argparse.Namespace) -> None:
    kinds = [
        LlamaBackend(like.model, like.name, n_ctx=like.n_ctx, n_ubatch=n_ubatch, loras=like.loras)
        for n_ubatch in (None, like.n_ubatch)
    ]
    for n_past in options.lengths:
        for kind in kinds:
            fill(kind, tokens[:n_past])
        for n in [*options.sizes, options.prompt]:
            n_rows, n_rounds = (n, options.rounds) if n != options.prompt else (1, max(1, options.rounds // 3))
            # The first batch of a size builds llama.cpp's graph, as a step of another size does.
            times = [
                [min(batch(kind, tokens[n_past:][:n], n_past, n_rows) for _ in range(2)) for kind in kinds]
                for _ in range(n_rounds)
            ]
            flash, plain = (median(column) for column in zip(*times, strict=True))
            print(f"| {like.name} | {n_past} | {n} | {flash:.2f} | {plain:.2f} | {flash / plain:.2f} |", flush=True)
    for kind in kinds:
        kind.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--lengths", type=numbers, default=[64, 256, 512, 1024])
    parser.add_argument("--sizes", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--ctx-size", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--members", help="those named [all]")
    options = parser.parse_args()
    print("| member | tokens of a text | tokens in a batch | flash, ms | plain, ms | ratio |")
    print("|---|---|---|---|---|---|")
    with FusedLlama.from_family(options.family, n_ctx=options.ctx_size) as llm:
        text = llm.tokenize("The committee met on Tuesday and put off the vote until spring.\n" * 400)
        for name in options.members.split(",") if options.members else llm._ensemble.members:
            member = llm._ensemble.members[name]
            if member.n_ubatch:
                measure(member, text, options)
            else:
                print(f"{name} has flash attention here")


if __name__ == "__main__":
    main()
