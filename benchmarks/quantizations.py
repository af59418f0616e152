"""How fast a model would be in other quantizations: batches of a few tokens, in turn.

    python benchmarks/quantizations.py MODEL.gguf [--types Q4_0,Q8_0] [--sizes 1,2,4] [--rounds 20] [--threads N]

The other files are made of MODEL.gguf as it is, as `llama-quantize --allow-requantize` does, and removed afterwards:
good for speed, not for answers. Each batch follows a text of 64 tokens. Milliseconds are medians, a ratio is the median
of MODEL.gguf's time over the other's in the same round.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import llama_cpp

from edge_dlf.engine.backend import PLAIN_TOKENS, Run
from edge_dlf.errors import EdgeDLFError
from edge_dlf.gguf.info import read_info
from edge_dlf.llama import LlamaBackend, Model, default_n_threads
from edge_dlf.llama.runtime import initialise

N_PAST = 64


def requantized(path: Path, kind: str, folder: str, n_threads: int) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize, params.nthread = True, n_threads
    target = Path(folder) / f"{kind}.gguf"
    if llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), params):
        raise EdgeDLFError(f"{path}: cannot be made {kind}")
    return target


def opened(path: Path, n_threads: int) -> LlamaBackend:
    model = Model(path, weights=read_info(path).tensors)
    member = LlamaBackend(model, path.stem, n_ctx=256, n_ubatch=PLAIN_TOKENS[0], n_threads=n_threads)
    member.decode([Run(0, [*range(10, 10 + N_PAST)], 0)])
    return member


def batch_ms(member: LlamaBackend, n: int) -> float:
    member.trim(0, N_PAST)
    started = time.perf_counter()
    member.decode([Run(0, [*range(200, 200 + n)], n)])
    member.logits()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", default="Q4_0,Q8_0")
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=default_n_threads())
    options = parser.parse_args()
    kinds = options.types.split(",")
    initialise()
    with TemporaryDirectory() as folder:
        paths = [options.model, *(requantized(options.model, kind, folder, options.threads) for kind in kinds)]
        members = [opened(path, options.threads) for path in paths]
    print("| tokens at once | as it is, ms |" + "".join(f" {kind} | times faster |" for kind in kinds))
    print("|---" * (2 + 2 * len(kinds)) + "|")
    for n in map(int, options.sizes.split(",")):
        # The first batch of a size builds llama.cpp's graph, as a step of another size does.
        rounds = [[min(batch_ms(member, n) for _ in range(2)) for member in members] for _ in range(options.rounds)]
        own, *others = zip(*rounds, strict=True)
        cells = [f"{median(own):.1f}"]
        for ms in others:
            cells += [f"{median(ms):.1f}", f"{median(a / b for a, b in zip(own, ms, strict=True)):.2f}"]
        print(f"| {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
