"""Whether time and memory of `edge-dlf batch` grow with the number of rows.

    python benchmarks/rows.py --family FAMILY [--rows 100 1000 10000] [--tokens 2] [--parallel 16]

Each size is a process of its own; "ms a row" leaves out what a run of one row takes, which is loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(options: argparse.Namespace, n_rows: int) -> tuple[float, float]:
    """Seconds that a batch of `n_rows` takes, and its peak of memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "rows.jsonl"), Path(folder, "answers.jsonl")
        with source.open("w") as file:
            for n in range(n_rows):
                file.write(json.dumps({"id": n, "prompt": f"Row number {n} of a long file:"}) + "\n")
        command = [sys.executable, "-m", "edge_dlf", "batch", str(source), "-o", str(target), "-f", options.family]
        command += ["--raw", "--quiet", "--max-tokens", str(options.tokens), "--parallel", str(options.parallel)]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--ctx-size", "512"], stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        assert os.waitstatus_to_exitcode(status) == 0, "the batch failed"
        with target.open() as file:
            assert sum(1 for _ in file) == n_rows
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--tokens", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=16)
    options = parser.parse_args()
    print("| rows | seconds | ms a row | peak, MB |\n|---|---|---|---|")
    run(options, 1)  # kernels may have to be compiled
    loading, _ = run(options, 1)
    for n_rows in options.rows:
        seconds, peak = run(options, n_rows)
        each = 1e3 * (seconds - loading) / n_rows
        print(f"| {n_rows:,} | {seconds:.1f} | {each:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
