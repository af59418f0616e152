"""An expert trained alone, through the large model, and as a corrector: what each is worth in the fusion.

    python benchmarks/through.py filters sorting [--n 300] [--steps 120]

For each task of the shipped family, three adapters over its base are trained on the same lessons with the same steps,
by `edge-dlf train`. Then questions of the test split are asked, and greedy answers that are right are counted. Every
adapter gets the same questions. Needs pip install '.[recipe]'. Takes some minutes for each task on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.weights import FAMILY, right
from edge_dlf import FusedLlama
from edge_dlf.evidence.stats import paired
from models.recipe.corpus import lessons
from models.recipe.stages import SEED, as_row

LARGE, BASE = FAMILY / "large-q8_0.gguf", FAMILY / "base-q8_0.gguf"
N_LESSONS = 7680
TRAIN = ("--rank", 16, "--alpha", 16, "--lr", 2e-3, "--batch", 1900)
KINDS = {"alone": (), "through": ("--through", LARGE), "corrector": ("--through", LARGE, "--no-base")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--n", type=int, default=300, help="questions of each task")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    for task in options.tasks:
        with TemporaryDirectory() as folder:
            compare(task, Path(folder), options.n, options.steps)


def compare(task: str, folder: Path, n: int, n_steps: int) -> None:
    """Train the adapters of one task, and print what each gives."""
    data = folder / "lessons.jsonl"
    data.write_text("".join(map(as_row, itertools.islice(lessons([task], SEED + 3), N_LESSONS))))
    outcomes = {}
    for kind, how in KINDS.items():
        adapter = folder / f"{kind}.gguf"
        command = ["train", BASE, data, "-o", adapter, *how, *TRAIN, "--steps", n_steps]
        subprocess.run([sys.executable, "-m", "edge_dlf", *map(str, command)], check=True)
        with FusedLlama(LARGE, BASE, {task: adapter}, n_ctx=512, n_threads=1, n_parallel=32) as llm:
            if not outcomes:
                outcomes["large"] = right(llm, task, "test", n, {"method": "large"})
            outcomes[kind] = right(llm, task, "test", n, {"method": "static"})
    for kind, outcome in outcomes.items():
        difference, low, high = (100 * value for value in paired(outcome, outcomes["alone"]))
        against = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}] against alone"
        print(f"{task:10} {kind:10} {100 * sum(outcome) / n:5.1f}%   {against}", flush=True)


if __name__ == "__main__":
    main()
