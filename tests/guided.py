"""Fuzzing guided by coverage, by atheris (`pip install atheris`): `python -m tests.guided requests --minutes 60`.

The cases are those of the `fuzz_*.py` beside this file. Prints how they ended. The first that raises what nobody
foresaw, kills its process or hangs ends the run, with its traceback, and leaves its bytes in `crash-*`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings


@dataclass(frozen=True)
class Target:
    """What is fuzzed: `MODULE.cases(name, folder, tally)` enters (what tries some bytes, bytes to begin with)."""

    module: str
    limits: tuple[str, ...]


_N_CASES = 10_000
"""In one process: atheris keeps some 10 kB of each."""
# A case of hypothesis takes hundreds of bytes, which nothing shorter would lead to.
_DRAWN = ("-max_len=4096", "-len_control=0", "-timeout=120")
_FILES = ("-max_len=65536", "-timeout=60")
TARGETS = {
    "requests": Target("fuzz_requests", _DRAWN),
    "templates": Target("fuzz_requests", _DRAWN),
    "batch": Target("fuzz_batch", _DRAWN),
    "family": Target("fuzz_family", _DRAWN),
    "lora": Target("fuzz_files", _FILES),
    "kernels": Target("fuzz_files", _FILES),
    "headers": Target("fuzz_headers", (*_FILES, "-malloc_limit_mb=200")),
}

_KERNELS = ("float64", "fuse", "keep", "loss", "memory", "pick", "search", "sums", "vector")
_COMPILED = ("edge_dlf.fusion.dispatch", *(f"edge_dlf.fusion.kernels.{name}" for name in _KERNELS))
"""Modules that numba compiles, which it cannot where they count what they run."""


def drawn(n: int = 200) -> list[bytes]:
    """Bytes for hypothesis to draw its first cases from."""
    return [random.Random(number).randbytes(2048) for number in range(n)]


def limits(**others: Any) -> settings:
    """Settings under which hypothesis neither hurries nor keeps what it found."""
    return settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **others)


def run_part(name: str, corpus: Path, seed: int, seconds: int) -> None:
    """Run cases in this process, and print how they ended."""
    import atheris

    target, tally = TARGETS[name], Counter[str]()
    instrumented = atheris.instrument_imports(include=["edge_dlf", "tomllib", "tomlkit"], exclude=list(_COMPILED))
    with instrumented, tempfile.TemporaryDirectory() as folder:
        module = importlib.import_module(f"tests.{target.module}")
        with module.cases(name, Path(folder), tally) as (once, seeds):
            if not any(corpus.iterdir()):
                for number, content in enumerate(seeds):
                    (corpus / f"seed-{number}").write_bytes(content)
            n_done = 0

            def case(content: bytes) -> None:
                nonlocal n_done
                once(content)
                n_done += 1
                if n_done % 50 == 0:  # atheris ends the process itself
                    print(json.dumps(tally), flush=True)

            limits = [f"-runs={_N_CASES}", f"-max_total_time={seconds}", f"-seed={seed}", "-rss_limit_mb=0"]
            limits += target.limits
            atheris.Setup([sys.argv[0], *limits, str(corpus)], case)
            atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", metavar="CORPUS", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.target, options.part, options.seed, options.seconds)
        return
    total, begun, seed = Counter[str](), time.monotonic(), options.seed
    with tempfile.TemporaryDirectory() as corpus:
        while (seconds := round(60 * options.minutes - (time.monotonic() - begun))) > 0:
            part = ["--part", corpus, "--seed", str(seed), "--seconds", str(seconds)]
            command = [sys.executable, "-m", "tests.guided", options.target, *part]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-6000:], file=sys.stderr)
                sys.exit(f"stopped after {sum(total.values()):,} cases")
            total.update(json.loads((done.stdout.splitlines() or ["{}"])[-1]))
            seed += 1
            n_corpus, minutes = len(list(Path(corpus).iterdir())), (time.monotonic() - begun) / 60
            said = f"{minutes:.0f} min, {sum(total.values()):,} cases, {n_corpus} in the corpus"
            print(f"{said}: {dict(total.most_common())}", flush=True)


if __name__ == "__main__":
    main()
