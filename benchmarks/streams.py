"""What room of their own is worth to texts decoded together: streams of the KV cache against one cache for all.

    python benchmarks/streams.py --family FAMILY [--parallel 16] [--tokens 256] [--every 32] [--members large,base]

Each member evaluates as many prompts of 64 tokens as are decoded at once, then a token of each in one step after the
other, up to `--tokens`, in both kinds of cache in turn, each with the attention that it has on a CPU. The table has
milliseconds of such a step, medians of `--every` steps, by the length of the texts.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from statistics import median

from edge_dlf import FusedLlama
from edge_dlf.engine.backend import PLAIN_TOKENS, Run
from edge_dlf.llama import LlamaBackend

N_PROMPT = 64


def step(member: LlamaBackend, tokens: list[int], n: int) -> float:
    """Milliseconds in which token `n` is appended to each sequence."""
    started = time.perf_counter()
    member.decode([Run(seq, [tokens[n]], 1) for seq in range(member.n_seq_max)])
    member.logits()
    return 1e3 * (time.perf_counter() - started)


def measure(like: LlamaBackend, tokens: list[int], options: argparse.Namespace) -> None:
    n_ctx = -(-len(tokens) // 256) * 256
    kinds = [
        LlamaBackend(
            like.model,
            like.name,
            n_ctx=n_ctx,
            n_seq_max=options.parallel,
            streams=streams,
            n_ubatch=PLAIN_TOKENS[0] if streams else None,
            loras=like.loras,
        )
        for streams in (True, False)
    ]
    for kind in kinds:
        for seq in range(options.parallel):
            kind.decode([Run(seq, tokens[:N_PROMPT], 0)])
    steps = ([step(kind, tokens, n) for kind in kinds] for n in range(N_PROMPT, len(tokens)))
    n_text = N_PROMPT
    while times := list(islice(steps, options.every)):
        n_text += len(times)
        streams, shared = (median(column) for column in zip(*times, strict=True))
        print(f"| {like.name} | {n_text} | {shared:.1f} | {streams:.1f} | {shared / streams:.2f} |", flush=True)
    for kind in kinds:
        kind.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--members", help="those named [all]")
    options = parser.parse_args()
    print("| member | tokens of a text | one cache, ms | streams, ms | ratio |")
    print("|---|---|---|---|---|")
    with FusedLlama.from_family(options.family, n_ctx=256) as llm:
        tokens = llm.tokenize("The quick brown fox jumps over the lazy dog. " * options.tokens)[: options.tokens]
        for name, member in llm._members.backends.items():
            if options.members is None or name in options.members.split(","):
                measure(member, tokens, options)


if __name__ == "__main__":
    main()
