"""How near the floor is a fused step: its time against the sum of its members' own `llama_decode` calls.

    python benchmarks/floor.py --family FAMILY [--family OTHER] [--steps 40] [--rounds 5] [--prompt-tokens 200]
                               [--threads N]

Both are timed in turn, step by step, in one process, on the same text; the table has medians. A member's column
is llama_decode on its context and the wait for its logits, nothing else; "fused" is `Decoder.step` as `edge-dlf` runs
it: the same calls, the search for α if the family's own method has one, the fusion and the greedy choice. Several
families take turns, round by round; the last line compares their fused steps with those of the first.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from statistics import median

from edge_dlf import FusedLlama, SamplingParams
from edge_dlf.engine.backend import Run
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.params import params_of

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
    (_, fusion), sampling = params_of(llm.files.spec.defaults), SamplingParams(temperature=0.0)
    roles = ensemble.roles(fusion)
    generation = Generation(GenerationRequest(roles, dict.fromkeys(roles.members, prompt), fusion, sampling))
    names = roles.members

    def rewind(n_tokens: int) -> None:
        for name in names:
            ensemble.shorten(name, 0, n_tokens)

    def fused(_: list[int]) -> Times:
        with Timer() as timer:
            if not ensemble.n_held(names[0], 0):
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


def table(name: str, prompt_tokens: int, prefills: list[Times], steps: list[Times]) -> None:
    names = [name for name in steps[0] if name != "fused"]
    print(f"| {name}, ms | {' | '.join(names)} | sum | fused | fused / sum |")
    print("|---|" + "---|" * (len(names) + 3))
    for label, rows in ((f"prefill of {prompt_tokens} tokens", prefills), ("decoding step", steps)):
        cells = [f"{median(times[name] for times in rows):.1f}" for name in names]
        total = median(sum(times[name] for name in names) for times in rows)
        ratio = median(times["fused"] / sum(times[name] for name in names) for times in rows)
        print(f"| {label} | {' | '.join(cells)} | {total:.1f} | {fused_ms(rows):.1f} | {ratio:.3f} |")


def fused_ms(rows: list[Times]) -> float:
    return median(times["fused"] for times in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, action="append")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    loading = {"n_ctx": options.prompt_tokens + options.steps + 8, "n_threads": options.threads}
    with ExitStack() as stack:
        llms = [stack.enter_context(FusedLlama.from_family(family, **loading)) for family in options.family]
        prompt = (llms[0].tokenize(TEXT) * options.prompt_tokens)[: options.prompt_tokens]
        for llm in llms:
            measure(llm, prompt, 3)
        rounds = [[measure(llm, prompt, options.steps) for llm in llms] for _ in range(options.rounds)]
    speeds = []
    for n, llm in enumerate(llms):
        prefills, steps = ([times for each in rounds for times in each[n][index]] for index in (0, 1))
        table(llm.name, options.prompt_tokens, prefills, steps)
        speeds.append([1 / fused_ms(each[n][1]) for each in rounds])
    for llm, own in list(zip(llms, speeds, strict=True))[1:]:
        ratios = [a / b for a, b in zip(own, speeds[0], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{llm.name}: {median(ratios):.2f} times the tokens a second of {llms[0].name} (by round {spread})")


if __name__ == "__main__":
    main()
