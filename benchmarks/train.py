"""What it costs to train an expert, by the size of its base: tokens a second, and the most memory.

    python benchmarks/train.py FOLDER [qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b] [--steps 4] [--threads 2]

The bases are files with the shapes of real models and random weights, written to FOLDER where they are not there. Each
is trained by `edge-dlf train` with its defaults, on examples of 25 tokens. Needs pip install '.[train]'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.shapes import SHAPES, model

N_EXAMPLES = 19  # one fewer than of which some are held out
STEP = 512
USUAL_STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    bases = [name for name in SHAPES if name.startswith("qwen2.5-") and name != "qwen2.5-7b"]
    parser.add_argument("bases", nargs="*", default=bases, help="names of benchmarks/shapes.py")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(f"{'base':16} {'tokens/s':>9} {f'{USUAL_STEPS} steps':>11} {'planned':>9} {'most':>9}")
    for name in options.bases:
        speed, planned, most = cost(model(options.folder, name, seed=1), options.steps, options.threads)
        minutes = USUAL_STEPS * STEP / speed / 60
        print(f"{name:16} {speed:9.0f} {minutes:7.0f} min {planned:6.1f} GB {most / 1e9:6.1f} GB", flush=True)


def cost(base: Path, n_steps: int, n_threads: int) -> tuple[float, float, int]:
    """Tokens a second, planned memory in GB, and the most bytes that the process held, mapped files among them."""
    rng = random.Random(0)
    with TemporaryDirectory() as folder:
        data, out = Path(folder, "data.jsonl"), Path(folder, "out.gguf")
        words = [" ".join(f"w{rng.randrange(9999)}" for _ in range(24)) for _ in range(N_EXAMPLES)]
        data.write_text("".join(json.dumps({"prompt": text, "answer": " w5"}) + "\n" for text in words))
        limits = ["--raw", "--steps", n_steps, "--threads", n_threads, "--batch", STEP]
        command = [sys.executable, "-m", "edge_dlf", "train", *map(str, [base, data, "-o", out, *limits])]
        with Path(folder, "said").open("w+") as said:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
            _, status, usage = os.wait4(process.pid, 0)
            said.seek(0)
            text = said.read()
    if status:
        sys.exit(text)
    speed = float(re.findall(r"([\d,]+) tokens/s", text)[-1].replace(",", ""))
    planned = float(re.findall(r"about ([\d.]+) GB", text)[0])
    return speed, planned, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
