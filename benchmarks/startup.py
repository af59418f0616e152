"""What edge-dlf adds to a process's first token and to its memory, beside the models alone.

    python benchmarks/startup.py --family FAMILY [--rounds 5]
    python benchmarks/startup.py --family FAMILY --checks          only what is checked before anything is loaded
    python benchmarks/startup.py --family demo --command           the command as a user starts it

Fresh processes in turn, after one that warms the disk cache and compiles the kernels: "models alone" loads the members
with llama.cpp and evaluates the prompt on each; "edge-dlf" does it through `FusedLlama.stream` and takes one token.
Memory is the peak resident set, memory-mapped weights included.

With --command, in each round: the first ever answer, with an empty folder for compiled kernels; the second one; and
--help. Seconds to the first letter on stdout and to the end, and processor time, user and system, of the command and of
the processes that it waited for.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROMPT = "Question: What is 17 * 23?\nAnswer:"
N_CTX = 4096


def models_alone(family: str) -> None:
    from edge_dlf.engine.backend import Run
    from edge_dlf.families.files import check_files
    from edge_dlf.families.spec import FamilySpec
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


def checks(family: str) -> None:
    """Time the check of every header, of the tokenizer and of memory, the files' first pages in the disk cache."""
    from edge_dlf.families.files import check_files
    from edge_dlf.families.plan import Planner
    from edge_dlf.families.spec import FamilySpec
    from edge_dlf.system.machine import this_machine

    started = time.perf_counter()
    files = check_files(FamilySpec.load(family))
    read = time.perf_counter()
    Planner(files, this_machine()).plan(N_CTX)
    print(read - started, time.perf_counter() - read)


def show_checks(family: str, rounds: int) -> None:
    command = [sys.executable, str(Path(__file__)), "--family", family, "--child", "checks"]
    rows = []
    for _ in range(rounds + 1):
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append([float(number) * 1e3 for number in output.split()])
    headers, memory = zip(*rows[1:], strict=True)
    print("| ms, fresh processes | median | best |\n|---|---|---|")
    print(f"| headers and tokenizer | {median(headers):.0f} | {min(headers):.0f} |")
    print(f"| memory | {median(memory):.0f} | {min(memory):.0f} |")


def run_command(arguments: list[str], kernels: str) -> tuple[float, float, float]:
    """Seconds to the first letter and to the end, and processor time, of `edge-dlf` with these arguments."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": kernels}
    command = [sys.executable, "-m", "edge_dlf", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(1)
    first = time.perf_counter() - started
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return first, elapsed, usage.ru_utime + usage.ru_stime


def show_commands(family: str, rounds: int) -> None:
    answer = ["generate", "--family", family, "--temperature", "0", "--max-tokens", "16", "--raw", PROMPT]
    results: dict[str, list[tuple[float, float, float]]] = {}
    run_command(["--help"], tempfile.gettempdir())  # warms the disk cache
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as kernels:
            for what, arguments in {"first answer": answer, "second answer": answer, "--help": ["--help"]}.items():
                results.setdefault(what, []).append(run_command(arguments, kernels))
    print("| medians, s | first letter | end | processor time |\n|---|---|---|---|")
    for what, rows in results.items():
        print(f"| {what} | " + " | ".join(f"{median(column):.2f}" for column in zip(*rows, strict=True)) + " |")


def child(what: str, family: str) -> None:
    if what == "checks":
        checks(family)
        return
    started = time.perf_counter()
    {"models": models_alone, "edge-dlf": through_edge_dlf}[what](family)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(time.perf_counter() - started, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--command", action="store_true")
    parser.add_argument("--child", choices=["models", "edge-dlf", "checks"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.family)
        return
    if options.command:
        show_commands(options.family, options.rounds)
        return
    if options.checks:
        show_checks(options.family, options.rounds)
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
