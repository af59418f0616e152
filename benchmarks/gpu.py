"""Fused decoding with the shapes of real models: one table for this machine's GPU, or for its CPU where it has none.

    python benchmarks/gpu.py FOLDER [--families 13b+1.1b,13b+7b,7b+0.5b] [--small] [--steps 32] [--batches 1,4,16,32,64]
    python benchmarks/gpu.py --record FAMILY

Models are made in FOLDER where they are not there: Q4_K_M, random weights, the right vocabulary (6 to 16 GB a family,
23 in all; --small 0.3). Steps are whole ones of `Decoder`, medians; the ways to overlap take turns, step by step.

Of random weights nothing can be accepted. So drafted steps do all the work of drafting and verifying, and whether a
guess is right is replayed: accepted.txt says, position by position, whether an expert's choice was the fusion's (with
Qwen2.5-Coder 1.5B and a GSM8K LoRA over 0.5B, greedy, by --record). "floor" is what the bytes to read allow, against
the large model alone.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.draft import WORKLOADS
from benchmarks.shapes import model
from edge_dlf import FusedLlama, FusionParams, SamplingParams
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.evidence import bench
from edge_dlf.families.files import check_files
from edge_dlf.families.spec import FamilySpec
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Draw, Pick
from edge_dlf.llama import default_n_threads, device, gpus
from edge_dlf.llama.ggml import call
from edge_dlf.params import OVERLAPS

FAMILIES = {
    "13b+1.1b": ("llama2-13b", "llama-1.1b"),
    "13b+7b": ("llama2-13b", "llama2-7b"),
    "7b+0.5b": ("qwen2.5-7b", "qwen2.5-0.5b"),
    "small llama": ("small-llama", "smaller-llama"),
    "small qwen": ("small-qwen", "smaller-qwen"),
}
ACCEPTED = Path(__file__).with_name("accepted.txt")
N_CTX = 512
N_PROMPT = 64
_GREEDY = SamplingParams(temperature=0.0)


class Replay:
    """Makes what a decoder picks agree with its drafts as a recorded run did; everything is computed nevertheless.

    accepted: for each position, "1" where the drafted token is to be picked.
    """

    def __init__(self, fuser: Fuser, accepted: str) -> None:
        self._accepted, self._guesses = accepted, dict[int, int]()
        self._fuser, self._pick = fuser, fuser.pick
        fuser.pick = self.pick  # type: ignore[method-assign]

    def close(self) -> None:
        """Let the fuser pick as before."""
        self._fuser.pick = self._pick  # type: ignore[method-assign]

    def pick(self, rows: Any, names: Sequence[str], fusion: Any, weights: Any, draws: Sequence[Draw]) -> list[Pick]:
        picks = self._pick(rows, names, fusion, weights, draws)
        if len(names) == 1:  # the drafting member
            self._guesses[draws[0].position] = picks[0].token
            return picks
        replayed = []
        for pick, draw in zip(picks, draws, strict=True):
            guess = self._guesses.get(draw.position)
            if guess is not None:
                is_right = self._accepted[draw.position % len(self._accepted)] == "1"
                pick = pick._replace(token=guess if is_right else guess ^ 1)
            replayed.append(pick)
        return replayed


@dataclass
class Bench:
    """One family in memory, and what is measured of it."""

    llm: FusedLlama
    n_steps: int

    @property
    def decoder(self) -> Decoder:
        return self.llm.driver.decoder

    @property
    def ensemble(self) -> Ensemble:
        return self.decoder.ensemble

    def begin(self, method: str = "dynamic", n_draft: int | None = 0) -> Generation:
        """A generation whose prompt has been evaluated."""
        fusion = FusionParams(method=method)
        prompt = [10 + n * 7 % 250 for n in range(N_PROMPT)]
        roles = self.ensemble.roles(fusion)
        self.ensemble.forget()
        prompts = dict.fromkeys(self.ensemble.members, prompt)
        generation = Generation(GenerationRequest(roles, prompts, fusion, _GREEDY, n_draft=n_draft))
        self.decoder.begin(generation)
        self.decoder.step([generation])
        return generation

    def step_s(self, method: str) -> float:
        """Seconds of one plain step."""
        generation = self.begin(method)
        return median(_timed(lambda: self.decoder.step([generation])) for _ in range(self.n_steps))

    def overlapped_s(self) -> dict[str, float]:
        """Seconds of one plain step of the fusion, by the way in which members overlap, the ways taking turns."""
        chosen = self.ensemble.overlap
        ways = OVERLAPS if len(self.ensemble.groups) > 1 else (chosen,)
        generation, seconds = self.begin(), {way: [] for way in ways}
        for _ in range(self.n_steps):
            for way in ways:
                self.ensemble.overlap = way
                seconds[way].append(_timed(lambda: self.decoder.step([generation])))
        self.ensemble.overlap = chosen
        return {way: median(timings) for way, timings in seconds.items()}

    def parts_s(self, n: int) -> tuple[float, dict[str, float]]:
        """Tokens a second of `n` sequences at once; and seconds of the parts of a step of them: the members with what
        they copy, search and choice, and the rest, which is Python."""
        ensemble, fuser, spent = self.ensemble, self.decoder.fuser, defaultdict[str, list[float]](list)
        decode, pick = ensemble.decode, fuser.pick

        def timed(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                started = time.perf_counter()
                result = work(*arguments)
                spent[what].append(time.perf_counter() - started)
                return result

            return run

        ensemble.decode, fuser.pick = timed("members", decode), timed("search", pick)  # type: ignore[method-assign]
        try:
            tps = bench.parallel_tps(self.llm, n)
        finally:
            ensemble.decode, fuser.pick = decode, pick  # type: ignore[method-assign]
        members, search = (median(spent[name][-bench.N_PARALLEL_STEPS :]) for name in ("members", "search"))
        return tps, {"members": members, "search and choice": search, "Python": max(0.0, n / tps - members - search)}

    def drafted_tps(self, accepted: str) -> float:
        """Tokens a second with drafts that are accepted as in a recorded run."""
        decoder = self.decoder
        replay = Replay(decoder.fuser, accepted)
        try:
            generation = self.begin(n_draft=None)
            for _ in range(self.n_steps):  # where costs and acceptance are learnt
                decoder.step([generation])
            n_before, started = len(generation.tokens), time.perf_counter()
            for _ in range(2 * self.n_steps):
                decoder.step([generation])
            return (len(generation.tokens) - n_before) / (time.perf_counter() - started)
        finally:
            replay.close()


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measured(spec: FamilySpec, batches: Sequence[int], n_steps: int, bandwidth: float | None) -> dict[str, str]:
    """A column of the table."""
    files = check_files(spec)
    experts = {role: source.local_path() for role, source, scale in spec.members[2:] if scale is None}
    n_threads = default_n_threads()
    gpu = next(iter(gpus()), None)
    memory = bandwidth or (bench.gpu_bytes_s(gpu) if gpu else bench.memory_bytes_s(n_threads))
    models = spec.large.local_path(), spec.base.local_path(), experts
    with FusedLlama(*models, n_ctx=N_CTX, n_threads=n_threads, n_parallel=max(batches)) as llm:
        run = Bench(llm, n_steps)
        names = tuple(run.ensemble.members)
        speeds = {name: bench.member_speed(run.ensemble, name, files, (None, None)) for name in names}
        large = run.step_s("large")
        fused = run.overlapped_s()
        best = fused[run.ensemble.overlap]
        drafted = {name: run.drafted_tps(bits) for name, bits in accepted().items()}
        batched = {n: run.parts_s(n) for n in batches}
    n_bytes = sum(speed["token_bytes"] for speed in speeds.values())
    row_bytes = 4 * max(info.n_vocab or 0 for info in files.models.values())
    rows = {f"{name} alone, tokens/s": f"{speed['decode_tps']['median']:.1f}" for name, speed in speeds.items()}
    rows["large alone with choice, tokens/s"] = f"{1 / large:.1f}"
    labels = {"off": "one after the other", "queue": "queued", "threads": "threads"}
    for way, seconds in fused.items():
        label = labels[way] if len(fused) > 1 else "plain"
        rows[f"fused, {label}: tokens/s (times slower than large; floor)"] = (
            f"{1 / seconds:.1f} ({seconds / large:.2f}; {n_bytes / speeds['large']['token_bytes']:.2f})"
        )
    for name, tps in drafted.items():
        rows[f"fused, drafted, accepted as in {name}: tokens/s (times large)"] = f"{tps:.1f} ({tps * large:.2f})"
    fewest = batched[batches[0]][0]
    for n, (tps, _) in batched.items():
        rows[f"fused, {n} at once: tokens/s (times {batches[0]})"] = f"{tps:.1f} ({tps / fewest:.1f})"
    for n in sorted({batches[0], max((n for n in batches if n <= 32), default=batches[0])}):
        for part, seconds in batched[n][1].items():
            rows[f"a step of {n}: {part}, ms"] = f"{1e3 * seconds:.2f}"
        copying = fetch_s(gpu.name if gpu else "CPU", n * len(names) * row_bytes)
        rows[f"a step of {n}: copying its rows, by itself, ms"] = f"{1e3 * copying:.3f}"
    rows["read a step, GB"] = f"{n_bytes / 1e9:.3f}"
    share = f" ({n_bytes / best / memory:.0%} of {memory / 1e9:.0f})" if memory else ""
    rows["read a second, GB (of the memory's)"] = f"{n_bytes / best / 1e9:.1f}{share}"
    return rows


def fetch_s(name: str, n_bytes: int) -> float:
    """Seconds in which `n_bytes` come from a device to the host."""
    with device.tensors(name, n_bytes, 1) as (_, (source,)):
        target = np.empty(n_bytes, np.int8)
        place = ctypes.c_void_p(target.ctypes.data)
        none, size = ctypes.c_size_t(0), ctypes.c_size_t(n_bytes)
        return device.best_s(lambda: call("ggml_backend_tensor_get", None, source, place, none, size))


def accepted() -> dict[str, str]:
    """Workload -> 1 or 0 for each position."""
    return dict(line.split() for line in ACCEPTED.read_text().splitlines())


def record(family: str) -> None:
    """Print a line for each workload: 1 where the expert's own choice was the fusion's."""
    settings = {"max_tokens": 48, "temperature": 0.0, "repeat_penalty": 1.0, "draft": "off", "trace": True}
    with FusedLlama.from_family(family, n_ctx=512) as llm:
        for name, prompts in WORKLOADS.items():
            bits = ""
            for prompt in prompts:
                for token in llm.stream(prompt, **settings):
                    assert token.trace is not None
                    bits += "01"[token.trace.members[llm.experts[0]].token == token.id]
            print(name, bits, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--families")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batches", default="1,4,16,32,64")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the memory, in place of a measurement")
    parser.add_argument("--record", metavar="FAMILY")
    options = parser.parse_args(arguments)
    if options.record:
        record(options.record)
        return
    if not options.folder:
        parser.error("FOLDER is missing")
    chosen = options.families or ("small llama,small qwen" if options.small else "13b+1.1b,13b+7b,7b+0.5b")
    if unknown := [name for name in chosen.split(",") if name not in FAMILIES]:
        parser.error(f"there is no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    found = gpus()
    print("; ".join(gpu.description for gpu in found) if found else "no GPU: this is the CPU", end="\n\n", flush=True)
    columns = {}
    for name in chosen.split(","):
        large, small = FAMILIES[name]
        print(f"{name} …", file=sys.stderr, flush=True)
        files = model(options.folder, large, 0), model(options.folder, small, 1), model(options.folder, small, 1, 2)
        spec = FamilySpec.from_files(files[0], files[1], {"expert": files[2]})
        batches = [int(n) for n in options.batches.split(",")]
        columns[name] = measured(spec, batches, options.steps, options.bandwidth and 1e9 * options.bandwidth)
    labels = list(dict.fromkeys(label for rows in columns.values() for label in rows))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for label in labels:
        print(f"| {label} | {' | '.join(rows.get(label, '') for rows in columns.values())} |")


if __name__ == "__main__":
    main()
