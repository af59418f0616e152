"""How near the floor is a fused step: its time against the sum of its members' own `llama_decode` calls.

    python benchmarks/floor.py --family FAMILY [--steps 40] [--rounds 5] [--prompt-tokens 200]

Both are timed in turn, step by step, in one process, on the same text; the table has medians. A member's column
is llama_decode on its context and the wait for its logits, nothing else; "fused" is `Decoder.step` as `edge-dlf` runs
it: the same calls, the search for α, the fusion and the greedy choice.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from edge_dlf import FusedLlama, FusionParams, SamplingParams
from edge_dlf.engine.backend import Run
from edge_dlf.engine.generation import Generation, GenerationRequest

Times = dict[str, float]
TEXT = "The quick brown fox jumps over the lazy dog. "


class Timer:
    def __enter__(self) -> Timer:
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.ms = 1e3 * (time.perf_counter() - self.started)


def measure(llm: FusedLlama, prompt: list[int], n_steps: int) -> tuple[list[Times], list[Times]]:
    """Milliseconds of one prefill, and of each step, by what was timed: each member, and "fused"."""
    decoder = llm.driver.decoder
    ensemble = decoder.ensemble
    fusion, sampling = FusionParams(), SamplingParams(temperature=0.0)
    roles = ensemble.roles(fusion)
    generation = Generation(GenerationRequest(roles, dict.fromkeys(roles.members, prompt), fusion, sampling))
    names = roles.members

    def rewind(n_tokens: int) -> None:
        for name in names:
            ensemble.shorten(name, 0, n_tokens)

    def fused(_: list[int]) -> Times:
        with Timer() as timer:
            if not ensemble.n_held("large", 0):
                decoder.begin(generation)
            decoder.step([generation])
        return {"fused": timer.ms}

    def alone(tokens: list[int]) -> Times:
        times = {}
        for name in names:
            with Timer() as timer:
                ensemble.decode({name: [Run(0, tokens, 1)]})
            times[name] = timer.ms
        return times

    prefills = []
    for order in ((fused, alone), (alone, fused)) * 2:
        times: Times = {}
        for run in order:
            rewind(0)
            generation.tokens = list(prompt)
            times |= run(prompt)
        prefills.append(times)
    steps = []
    for step in range(n_steps):
        tokens, n_held = generation.tokens[-1:], len(generation.tokens) - 1
        times = {}
        for run in (fused, alone) if step % 2 else (alone, fused):
            rewind(n_held)
            times |= run(tokens)
        steps.append(times)
    return prefills, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    options = parser.parse_args()
    with FusedLlama.from_family(options.family, n_ctx=options.prompt_tokens + options.steps + 8) as llm:
        prompt = (llm.tokenize(TEXT) * options.prompt_tokens)[: options.prompt_tokens]
        measure(llm, prompt, 3)
        rounds = [measure(llm, prompt, options.steps) for _ in range(options.rounds)]
    prefills, steps = ([times for r in rounds for times in r[index]] for index in (0, 1))
    names = [name for name in steps[0] if name != "fused"]
    print(f"| ms | {' | '.join(names)} | sum | fused | fused / sum |")
    print("|---|" + "---|" * (len(names) + 3))
    for label, rows in ((f"prefill of {options.prompt_tokens} tokens", prefills), ("decoding step", steps)):
        cells = [f"{median(times[name] for times in rows):.1f}" for name in names]
        total = median(sum(times[name] for name in names) for times in rows)
        ratio = median(times["fused"] / sum(times[name] for name in names) for times in rows)
        fused = median(times["fused"] for times in rows)
        print(f"| {label} | {' | '.join(cells)} | {total:.1f} | {fused:.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
