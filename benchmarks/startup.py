"""What edge-dlf adds to a process's first token and to its memory, beside the models alone.

    python benchmarks/startup.py --family FAMILY [--rounds 5]

Fresh processes in turn, after one that warms the disk cache and compiles the kernels: "models alone" loads the members
with llama.cpp and evaluates the prompt on each; "edge-dlf" does it through `FusedLlama.stream` and takes one token.
Memory is the peak resident set, memory-mapped weights included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PROMPT = "Question: What is 17 * 23?\nAnswer:"
N_CTX = 4096


def models_alone(family: str) -> None:
    from edge_dlf.backend import Run
    from edge_dlf.family import FamilySpec
    from edge_dlf.files import check_files
    from edge_dlf.llama import LlamaBackend, Model

    files = check_files(FamilySpec.load(family))
    models = {path: Model(path) for path in {info.path for info in files.models.values()}}
    members = [
        LlamaBackend(models[info.path], name, n_ctx=N_CTX, loras=files.loras.get(name, ()))
        for name, info in files.models.items()
    ]
    tokens = members[0].model.tokenize(PROMPT.encode(), special=True)
    for member in members:
        member.decode([Run(0, tokens, 1)])
        member.logits()


def through_edge_dlf(family: str) -> None:
    from edge_dlf import FusedLlama

    llm = FusedLlama.from_family(family, n_ctx=N_CTX)
    next(llm.stream(PROMPT, temperature=0.0))


def child(what: str, family: str) -> None:
    started = time.perf_counter()
    {"models": models_alone, "edge-dlf": through_edge_dlf}[what](family)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(time.perf_counter() - started, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["models", "edge-dlf"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.family)
        return
    results: dict[str, list[tuple[float, float]]] = {"models": [], "edge-dlf": []}
    for number in range(options.rounds + 1):
        for what, rows in results.items():
            command = [sys.executable, str(Path(__file__)), "--family", options.family, "--child", what]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if number:
                seconds, peak = map(float, output.split())
                rows.append((seconds, peak))
    print("| | first token, s | peak memory, MB |\n|---|---|---|")
    for what, rows in results.items():
        label = {"models": "models alone", "edge-dlf": "edge-dlf"}[what]
        print(f"| {label} | {median(s for s, _ in rows):.2f} | {median(p for _, p in rows) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
